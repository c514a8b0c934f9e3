"""Teachers: trained here, from a file, kept features, grids that differ (u-repa.md, tests 7 and 14)."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from quietgoose.alignment.features import CachedTeacher, OnlineFeatures, serve_features
from quietgoose.alignment.fitting import fit
from quietgoose.alignment.settings import FitSettings, TeacherSettings
from quietgoose.alignment.teachers import open_teacher, resize_tokens
from quietgoose.alignment.training import build_vit, train_teacher
from quietgoose.alignment.vit import MaskedAutoencoder
from quietgoose.base.errors import ArtifactError, NumericError, RecipeError, StorageError
from torch import nn

CPU = torch.device("cpu")
SMALL = TeacherSettings(
    patch=2,
    width=32,
    layers=2,
    heads=2,
    decoder_width=16,
    decoder_layers=1,
    train=FitSettings(steps=60, batch=32, lr=3e-3),
)


@dataclass
class Picked:
    index_B: torch.Tensor
    flipped_B: torch.Tensor


PICKED = Picked(torch.tensor([5, 0, 31, 5]), torch.tensor([False, True, True, True]))


def test_the_self_taught_teacher_learns_without_labels_and_is_found_again(bars, tmp_path: Path) -> None:
    images, held = bars(96, 0), bars(40, 1)
    folder = train_teacher(SMALL, images, CPU, tmp_path, held_out=held)
    facts = json.loads((folder / "teacher.json").read_text())
    torch.manual_seed(0)
    untrained = MaskedAutoencoder(build_vit(SMALL, images.pixel_shape), 1, 0.6, 16, 1)
    order = torch.rand(40, 16, generator=torch.Generator().manual_seed(0)).argsort(1)
    assert facts["loss"] < 0.5 * float(untrained(held.rows, order).detach())
    assert facts["probe_accuracy"] > 0.9
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert (
        train_teacher(replace(SMALL, cache="off"), images, CPU, tmp_path) == folder
    )  # how features are kept is no matter
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    assert train_teacher(replace(SMALL, seed=1), images, CPU, tmp_path) != folder
    scrambled = bars(96, 0)
    scrambled.labels = scrambled.labels.flip(0)
    again = train_teacher(SMALL, scrambled, CPU, tmp_path / "other")
    assert (again / "model.safetensors").read_bytes() == (
        folder / "model.safetensors"
    ).read_bytes()  # labels are not read


def test_the_labelled_teacher_and_what_is_no_training(bars, tmp_path: Path) -> None:
    images = bars(64, 0)
    settings = replace(SMALL, kind="label", train=FitSettings(steps=20, batch=32, lr=3e-3))
    teacher = open_teacher(settings, images, CPU, train_teacher(settings, images, CPU, tmp_path))
    assert teacher is not None
    assert (teacher.dim, teacher.grid) == (32, (4, 4))
    with pytest.raises(RecipeError, match="random is not trained"):
        train_teacher(replace(SMALL, kind="random"), images, CPU, tmp_path)


def test_a_teacher_of_other_settings_or_changed_weights_is_refused(bars, tmp_path: Path) -> None:
    images = bars(64, 0)
    folder = train_teacher(SMALL, images, CPU, tmp_path)
    with pytest.raises(ArtifactError, match="was trained with other mask_ratio"):
        open_teacher(replace(SMALL, mask_ratio=0.5), images, CPU, folder)
    with pytest.raises(ArtifactError, match="was trained with other images"):
        open_teacher(SMALL, bars(64, 7), CPU, folder)
    with pytest.raises(ArtifactError, match="put 'teacher' before 'urepa'"):
        open_teacher(SMALL, images, CPU, None)
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-3] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(ArtifactError, match="is not what was trained"):
        open_teacher(SMALL, images, CPU, folder)


def test_random_and_no_teacher(bars) -> None:
    images = bars(40, 0)
    one, other = (open_teacher(replace(SMALL, kind="random", seed=s), images, CPU) for s in (0, 1))
    again = open_teacher(replace(SMALL, kind="random"), images, CPU)
    assert one is not None
    assert other is not None
    assert again is not None
    assert one.digest == again.digest != other.digest
    heads = open_teacher(
        replace(SMALL, kind="random", heads=SMALL.heads * 2), images, CPU
    )  # the same weights, other tokens
    assert heads is not None
    assert heads.digest != one.digest
    tokens = one.features(images.rows[:3])
    assert tokens.shape == (3, 16, 32)
    assert tokens.dtype == torch.float32
    assert torch.equal(tokens, again.features(images.rows[:3]))
    assert not any(p.requires_grad for p in one.module.parameters())
    assert open_teacher(replace(SMALL, kind="none"), images, CPU) is None


@pytest.mark.parametrize("flip", [True, False])
def test_kept_features_are_the_teacher_s_own(bars, tmp_path: Path, flip: bool) -> None:
    images = bars(40, 0, flip=flip)
    teacher = open_teacher(replace(SMALL, kind="random"), images, CPU)
    assert teacher is not None
    kept, online = CachedTeacher(teacher, images, tmp_path), OnlineFeatures(teacher, images)
    picked = PICKED if flip else replace(PICKED, flipped_B=torch.zeros(4, dtype=torch.bool))
    assert torch.allclose(kept.features_for(picked), online.features_for(picked), atol=4e-3)
    if flip:  # a mirrored image has tokens of its own, not mirrored tokens
        plain = kept.features_for(replace(PICKED, flipped_B=torch.zeros(4, dtype=torch.bool)))
        assert float((plain[1] - kept.features_for(PICKED)[1]).abs().max()) > 0.05
    again = CachedTeacher(teacher, images, tmp_path)
    assert again.was_there
    assert torch.equal(again.features_for(picked), kept.features_for(picked))
    assert kept.nbytes == (2 if flip else 1) * 40 * 16 * 32 * 2


def test_a_killed_filling_goes_on_and_foreign_features_are_refused(bars, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("quietgoose.alignment.features.PORTION", 16)
    images = bars(40, 0)
    teacher = open_teacher(replace(SMALL, kind="random"), images, CPU)
    assert teacher is not None
    whole = CachedTeacher(teacher, images, tmp_path / "a")
    calls: list[int] = []

    def killed(what: str, done: int, total: int) -> None:
        calls.append(done)
        if len(calls) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        CachedTeacher(teacher, images, tmp_path / "b", killed)
    half = next((tmp_path / "b" / "features").glob("*.building")) / "features.f16"
    half.write_bytes(half.read_bytes()[:-7])  # torn inside a row
    calls.clear()
    calls.append(-1)
    rest = CachedTeacher(teacher, images, tmp_path / "b", lambda what, done, total: calls.append(done))
    assert calls[1:] == [4, 5, 6]  # of six portions the torn one and those after it
    name = "features.f16"
    assert (rest.folder / name).read_bytes() == (whole.folder / name).read_bytes()
    other = open_teacher(replace(SMALL, kind="random", seed=5), images, CPU)
    assert other is not None
    foreign = CachedTeacher(other, images, tmp_path / "b")
    (rest.folder / name).write_bytes((foreign.folder / name).read_bytes())
    with pytest.raises(ArtifactError, match="kept features differ from the teacher's"):
        CachedTeacher(teacher, images, tmp_path / "b")
    (rest.folder / name).write_bytes((whole.folder / name).read_bytes()[:-2])
    with pytest.raises(ArtifactError, match="bytes, not"):
        CachedTeacher(teacher, images, tmp_path / "b")


def test_where_features_are_kept(bars, tmp_path: Path) -> None:
    images = bars(40, 0)
    teacher = open_teacher(replace(SMALL, kind="random"), images, CPU)
    assert teacher is not None
    told: list[dict] = []
    for cache, gib, kind in (
        ("off", 1.0, "online"),
        ("auto", 0.0, "online"),
        ("auto", 1.0, "disk"),
        ("disk", 0.0, "disk"),
    ):
        settings = replace(SMALL, kind="random", cache=cache, cache_gib=gib)
        source = serve_features(teacher, images, settings, tmp_path, event=lambda kind, **facts: told.append(facts))
        assert source.kind == kind == told[-1]["source"]
        assert (source.dim, source.grid, source.digest) == (32, (4, 4), teacher.digest)
    huge = replace(teacher, dim=1 << 40)
    with pytest.raises(StorageError, match=r"IO-002.*teacher.cache off"):
        serve_features(huge, images, replace(SMALL, cache="disk"), tmp_path / "fresh")


def test_grids_that_differ(bars) -> None:
    tokens = torch.arange(16.0).reshape(1, 16, 1).repeat(2, 1, 3)
    assert resize_tokens(tokens, (4, 4), (4, 4)) is tokens
    small = resize_tokens(tokens, (4, 4), (2, 2))
    assert small[0, :, 0].tolist() == [2.5, 4.5, 10.5, 12.5]  # means of 2x2
    wide = resize_tokens(tokens, (4, 4), (5, 8))
    assert wide.shape == (2, 40, 3)
    assert float(wide[0, 0, 0]) == pytest.approx(0.0, abs=1e-6)
    assert float(wide[0, -1, 0]) == pytest.approx(15.0)
    images = bars(40, 0)
    own, resized = (open_teacher(replace(SMALL, kind="random", grid=g), images, CPU) for g in (None, 3))
    assert own is not None
    assert resized is not None
    assert (resized.own_grid, resized.grid) == ((4, 4), (3, 3))
    assert resized.digest != own.digest
    assert torch.allclose(
        resized.features(images.rows[:2]), resize_tokens(own.features(images.rows[:2]), (4, 4), (3, 3)), atol=1e-6
    )


@pytest.mark.parametrize("kind", ["dinov2", "registers", "vit"])
def test_a_teacher_from_a_file(bars, tmp_path: Path, kind: str) -> None:
    import transformers as hf

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4, "image_size": 20}
    if kind == "dinov2":
        model = hf.Dinov2Model(hf.Dinov2Config(**shape))
    elif kind == "registers":
        model = hf.Dinov2WithRegistersModel(hf.Dinov2WithRegistersConfig(**shape, num_register_tokens=3))
    else:
        model = hf.ViTModel(hf.ViTConfig(**shape, intermediate_size=64), add_pooling_layer=False)
    model.eval().save_pretrained(tmp_path / "vit")
    (tmp_path / "vit" / "preprocessor_config.json").write_text(
        '{"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}'
    )
    images = bars(40, 0)
    settings = TeacherSettings(kind="file", path=str(tmp_path / "vit"), resize=24)
    teacher = open_teacher(settings, images, CPU)
    assert teacher is not None
    assert (teacher.dim, teacher.grid) == (32, (6, 6))
    tokens = teacher.features(images.rows[:2])
    unit = ((images.rows[:2] + 1) / 2).expand(-1, 3, -1, -1)
    big = nn.functional.interpolate(unit, (24, 24), mode="bicubic", antialias=True)
    ready = (big - torch.tensor([0.5, 0.4, 0.3])[:, None, None]) / torch.tensor([0.2, 0.3, 0.4])[:, None, None]
    options = {"interpolate_pos_encoding": True} if kind == "vit" else {}
    with torch.no_grad():
        hidden = model(pixel_values=ready, **options).last_hidden_state
    before = {"dinov2": 1, "registers": 4, "vit": 1}[kind]
    assert hidden.shape[1] == before + 36
    assert torch.allclose(tokens, hidden[:, before:], atol=1e-4)
    with pytest.raises(RecipeError, match=r"resize: 22 is no multiple of the patch, 4; 20 or 24"):
        open_teacher(replace(settings, resize=22), images, CPU)
    with pytest.raises(RecipeError, match=r"needs a folder with config.json"):
        open_teacher(replace(settings, path=str(tmp_path)), images, CPU)
    other = open_teacher(replace(settings, resize=20), images, CPU)
    assert other is not None
    assert other.digest != teacher.digest


def test_a_stopped_fit_goes_on_as_if_it_had_not_been(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("quietgoose.alignment.fitting.SAVE_SECONDS", -1.0)
    monkeypatch.setattr("quietgoose.alignment.fitting.LOOK_EVERY", 5)
    x = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    settings = FitSettings(steps=30, batch=8, lr=1e-2)

    def run(stop_at: int | None, state: Path | None) -> nn.Module:
        torch.manual_seed(1)
        module = nn.Linear(3, 1)

        def loss_at(step: int) -> torch.Tensor:
            if step == stop_at:
                raise KeyboardInterrupt
            rows = x[(torch.arange(8) * 7 + step) % 64]
            return (module(rows) - rows.sum(1, keepdim=True)).square().mean()

        fit(module, loss_at, settings, CPU, what="test", state=state)
        return module

    straight = run(None, None)
    state = tmp_path / "state.pt"
    with pytest.raises(KeyboardInterrupt):
        run(18, state)
    resumed = run(None, state)
    assert torch.equal(resumed.weight, straight.weight)
    with pytest.raises(NumericError, match=r"NUM-010.*lower its lr"):
        fit(nn.Linear(3, 1), lambda step: straight.bias.sum() * float("nan") + sum(p.sum() for p in resumed.parameters()) * 0
            + torch.zeros((), requires_grad=True), settings, CPU, what="test")  # fmt: skip
