"""Evaluation, report, export and sampling of a U-Net: from the `urepa` stage's folder to images of a loaded export."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from quietgoose.alignment.backbone import build_backbone
from quietgoose.alignment.judging import as_bytes
from quietgoose.alignment.model_settings import BackboneSettings
from quietgoose.alignment.samplers import sample_rows
from quietgoose.alignment.settings import SamplerSettings
from quietgoose.base.errors import ArtifactError, RecipeError
from quietgoose.base.files import read_json, sha256_json
from quietgoose.launch.sample import main as sample_command
from quietgoose.train.data.images import open_images
from quietgoose.train.evaluate_images import points, run_evaluate
from quietgoose.train.export_images import export_sampler, run_export
from quietgoose.train.image_report import write_report_of_images
from quietgoose.train.image_results import final_point, read_image_results, table
from quietgoose.train.image_sampling import draw_samples, held_out_loss, velocity_of
from quietgoose.train.image_settings import ImageEvaluation, ImageSettings
from quietgoose.train.run_folder import RunFolder
from quietgoose.train.settings import load_recipe
from quietgoose.train.unet_folder import UNetCard, load_unet, save_unet, save_weights, step_folder

import quietgoose

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
OPTIONS = [
    "--config", str(ROOT / "launch/recipes/urepa_digits.yaml"), "--evaluate.images.at", "[2]",
    "--evaluate.images.at_count", "40", "--evaluate.images.count", "60", "--urepa.train.steps", "5",
    "--evaluate.images.samplers",
    '{"ode": {"steps": 3, "batch": 25}, "a_guided": {"method": "sde", "steps": 3, "guidance": 2.0, "batch": 25}}',
    "--evaluate.images.judge.train.steps", "20", "--images.limit", "200", "--images.holdout", "0.2",
]  # fmt: skip


def weights(seed: int) -> dict[str, torch.Tensor]:
    """Of a nano U-Net, drawn at random throughout: as built, its last layer is zero and every sample the noise."""
    unet = build_backbone(BackboneSettings(preset="nano"), (1, 8, 8), 10, seed=0)
    random = torch.Generator().manual_seed(seed)
    return {name: p + 0.05 * torch.randn(p.shape, generator=random) for name, p in unet.named_parameters()}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> SimpleNamespace:
    """A run folder whose `urepa` stage is finished, evaluated and exported."""
    root = tmp_path_factory.mktemp("run")
    recipe = load_recipe([*OPTIONS, "--output", str(root), "--images.cache", str(root.parent / "cache")])
    folder = RunFolder(root)
    images = open_images(recipe.images)
    card = UNetCard(recipe.urepa.backbone, images.shape, images.classes, images.digest, 5, "middle.0", "teacher")

    def trained(average: int, raw: int) -> dict[str, torch.Tensor]:
        return {
            **{f"average/backbone.{name}": tensor.detach() for name, tensor in weights(average).items()},
            **{f"backbone.{name}": tensor.detach() for name, tensor in weights(raw).items()},
            "projector.layers.0.weight": torch.ones(2, 2),
        }

    with folder.staging("urepa") as staging:
        save_unet(card, trained(1, 2), staging)
        save_weights(trained(3, 4), step_folder(staging, 2))
    folder.seal("urepa", {})
    events: list[tuple[str, dict]] = []
    context = SimpleNamespace(
        recipe=recipe, folder=folder, device=CPU, world=SimpleNamespace(rank=0, size=1, is_main=True),
        event=lambda kind, **facts: events.append((kind, facts)), progress=lambda *a: None, facts={"hardware": "a <b> machine"},
    )  # fmt: skip
    for name, stage in (("evaluate", run_evaluate), ("export", run_export)):
        writer = stage(context)
        with folder.staging(name) as staging:
            writer(staging)
        folder.seal(name, {})
    return SimpleNamespace(
        root=root, recipe=recipe, folder=folder, images=images, evaluated=folder.result("evaluate"), events=events,
        export=root / "export", context=context,
    )  # fmt: skip


def test_every_point_is_judged_at_its_count_beside_its_floors(run) -> None:
    results = read_image_results(run.evaluated)
    found = [(p["step"], p["weights"], p["sampler"], p["count"]) for p in results["points"]]
    assert found == [
        (2, "average", "ode", 40), (5, "average", "ode", 40), (5, "average", "ode", 60), (5, "average", "a_guided", 60),
        (5, "raw", "ode", 60),
    ]  # fmt: skip
    assert set(results["floors"]) == {"40", "60"}
    scores = [p["scores"] for p in results["points"]]
    names = {"jfd", "kid", "precision", "recall", "class_accuracy", "nearest_ratio", "copies", "velocity_loss"}
    assert all(names <= set(one) for one in scores)
    assert results["floors"]["60"]["test"]["jfd"] < scores[2]["jfd"]  # these U-Nets were never trained
    losses = [one["velocity_loss"] for one in scores]  # one for each set of weights: average and raw, at both steps
    assert losses[1] == losses[2] == losses[3]
    assert len(set(losses)) == 3
    logged = [facts for kind, facts in run.events if kind == "samples"]
    assert [facts["step"] for facts in logged] == [2, 5, 5, 5, 5]
    assert logged[0]["average.ode.40"]["jfd"] == scores[0]["jfd"]


def test_the_table_shows_floors_before_points_of_one_count(run) -> None:
    header, rows = table(read_image_results(run.evaluated))
    assert header[:3] == ["", "samples", "JFD"]
    assert "FID" not in header
    assert [row[1] for row in rows] == ["60"] * 5 + ["40"] * 4
    assert [row[0][:5] for row in rows[:2]] == ["floor", "floor"]
    text = (run.evaluated / "image_results.md").read_text()
    assert "not FID" in text
    assert (run.evaluated / "image_results.csv").read_text().count("\n") == 1 + 4 + 5


def test_the_verdict_s_point_is_of_the_first_sampler_and_the_full_count(run) -> None:
    final = final_point(read_image_results(run.evaluated))
    assert (final["count"], final["sampler"], final["weights"]) == (60, "ode", "average")
    assert next(iter(read_image_results(run.evaluated)["samplers"])) == "ode"  # not the first of the alphabet
    assert quietgoose.load(run.export, device="cpu").settings.method == "euler"


def test_the_samples_are_those_of_the_weights(run) -> None:
    picture = Image.open(run.evaluated / "samples" / "00000005_average_ode.png")
    assert picture.mode == "L"
    names = sorted(path.stem for path in (run.evaluated / "samples").glob("*.png"))
    assert names == ["00000002_average_ode", "00000005_average_a_guided", "00000005_average_ode", "00000005_raw_ode"]  # fmt: skip
    contents = {path.read_bytes() for path in (run.evaluated / "samples").glob("*.png")}
    assert len(contents) == 4


def test_the_report_holds_everything_and_asks_for_nothing(run) -> None:
    (run.root / "events.jsonl").write_text(
        json.dumps({"kind": "step", "stage": "urepa", "step": 1, "losses": {"velocity": 1.5}}) + "\n"
    )
    page = write_report_of_images(run.root, run.evaluated, "a </script><b>run", run.context.facts).read_text()
    assert page.count("</script>") == 2
    assert "<b>" not in page
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    assert policy is not None
    assert "img-src data:;" in policy[1]
    assert "unsafe" not in policy[1]
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    assert len(data["pictures"]) == 4
    assert data["pictures"][0]["caption"].startswith("step 5")
    assert all(one["source"].startswith("data:image/png;base64,") for one in data["pictures"])
    assert {chart["title"] for chart in data["scores"]} >= {"JFD, 40 samples", "KID-J, 40 samples"}
    assert data["scores"][0]["lines"][0]["steps"] == [2, 5]
    assert data["curves"][0]["lines"][0]["values"] == [1.5]
    assert not re.search(r"(src|href)=\"?https?:", page)


def test_a_page_too_large_leaves_pictures_out_and_says_so(run, tmp_path: Path, monkeypatch) -> None:
    from quietgoose.evaluation import images_report

    monkeypatch.setattr(images_report, "MAX_BYTES", 30_000)
    pictures = [images_report.Picture(f"number {n}", os.urandom(6000)) for n in range(4)]
    page = images_report.write_images_report(tmp_path / "r.html", "t", [], pictures, []).read_text()
    assert "number 0" in page
    assert "number 3" not in page
    assert re.search(r"Left out to keep this page small: [1-3] of 4 pictures", page)


def test_a_page_is_filled_to_its_limit_with_few_renders(tmp_path: Path, monkeypatch) -> None:
    from quietgoose.evaluation import images_report

    made: list[int] = []
    real = images_report.render
    monkeypatch.setattr(images_report, "MAX_BYTES", 60_000)
    monkeypatch.setattr(images_report, "render", lambda *a, **k: made.append(len(a[1]["pictures"])) or real(*a, **k))
    events = ({"stage": "s", "step": n, "losses": {"a": 1.0}} for n in (1, 2))  # can be read once
    pictures = [images_report.Picture(f"<\u202e\u00e4{n}>", os.urandom(3000)) for n in range(20)]
    page = images_report.write_images_report(
        tmp_path / "r.html", "t", [], pictures, [], events=events, notes=["n"]
    ).read_bytes()
    shown = page.count(b"data:image/png;base64,")
    assert made == [0, shown]
    assert 60_000 - 5000 < len(page) <= 60_000
    data = json.loads(page.decode().split('id="data">')[1].split("</script>")[0])
    assert data["notes"] == ["n", f"Left out to keep this page small: {20 - shown} of 20 pictures."]
    assert len(data["pictures"]) == shown
    assert data["curves"][0]["lines"][0]["steps"] == [1, 2]
    whole = images_report.write_images_report(tmp_path / "w.html", "t", [], pictures[:3], [], notes=["n"]).read_text()
    assert '"notes":["n"]' in whole


def test_the_export_has_the_average_and_no_projector(run) -> None:
    manifest = read_json(run.export / "quietgoose.json")
    assert set(manifest["files"]) == {"model.safetensors", "README.md", "samples.png"}
    loaded = quietgoose.load(run.export, device="cpu")
    for name, tensor in weights(1).items():
        assert torch.equal(loaded.unet.get_parameter(name), tensor.detach())
    assert not any("projector" in name for name, _ in loaded.unet.named_parameters())
    assert (
        manifest["results"]["final"]["scores"]["jfd"] == final_point(read_image_results(run.evaluated))["scores"]["jfd"]
    )
    assert "JFD" in (run.export / "README.md").read_text()


def test_a_loaded_export_draws_the_same_images_bit_for_bit(run) -> None:
    loaded = quietgoose.load(run.export, device="cpu")
    unet = load_unet(run.folder.result("urepa"), "average")
    labels = torch.arange(60) % 10
    settings = run.recipe.evaluate.images.samplers["a_guided"]
    drawn = draw_samples(
        velocity_of(unet, CPU, half=False), labels, (1, 8, 8), settings, 10, 4, CPU, lambda images: images
    )
    again = loaded.sample(60, seed=4, method="sde", steps=3, guidance=2.0, batch=25)
    assert again.dtype == torch.uint8
    assert torch.equal(again, drawn)
    assert not torch.equal(loaded.sample(60, seed=5, method="sde", steps=3, guidance=2.0, batch=25), drawn)


def test_labels_of_the_sampler(run) -> None:
    loaded = quietgoose.load(run.export, device="cpu")
    assert loaded.labels(4).tolist() == [0, 1, 2, 3]
    assert loaded.labels(3, "7").tolist() == loaded.labels(3, 7).tolist() == [7, 7, 7]
    assert loaded.labels(3, ["1", 2, "3"]).tolist() == loaded.labels(3, torch.tensor([1, 2, 3])).tolist() == [1, 2, 3]
    assert not torch.equal(loaded.sample(2, 1), loaded.sample(2, 8))
    for bad, word in ((10, "0 to 9"), ("cat", "0 to 9 or a class"), ([1, 2], "2 for 3 images")):
        with pytest.raises(RecipeError, match=f"CFG-094.*{word}"):
            loaded.sample(3, bad)
    for options, word in (({"n": 0}, "at least 1"), ({"method": "ddim"}, "euler, heun, sde"), ({"steps": 0}, "steps")):
        with pytest.raises(RecipeError, match=f"CFG-094.*{word}"):
            loaded.sample(**{"n": 2, **options})


def test_arguments_that_cannot_be_are_refused_by_name(run) -> None:
    loaded = quietgoose.load(run.export, device="cpu")
    assert loaded.labels(2, np.array([3, 4])).tolist() == loaded.labels(2, [np.int64(3), 4]).tolist() == [3, 4]
    for bad in ([1.5, 1.5], 1.5, [True, 1], [None, 1], torch.tensor([1.0, 2.0]), [[1], [2]]):
        with pytest.raises(RecipeError, match=r"CFG-094.*allowed are 0 to 9 or a class"):
            loaded.sample(2, bad)
    for options, word in (
        ({"guidance": float("nan")}, "guidance"), ({"guidance": float("inf")}, "guidance"), ({"guidance": "much"}, "guidance"),
        ({"steps": 2.5}, "steps: 2.5; a whole number"), ({"batch": "2"}, "batch"), ({"n": 2.0}, "n: 2.0"),
        ({"seed": 0.5}, "seed"), ({"n": True}, "n: True"),
    ):  # fmt: skip
        with pytest.raises(RecipeError, match=f"CFG-094.*{word}"):
            loaded.sample(**{"n": 2, **options})
    images = loaded.sample(2, steps=1)
    for columns in (0, -1, 1.5):
        with pytest.raises(RecipeError, match="CFG-094 columns"):
            loaded.grid(images, columns=columns)
    with pytest.raises(RecipeError, match="CFG-094 columns: 8 for 0 images"):
        loaded.grid(images[:0])


def test_an_export_of_images_is_none_of_words(run, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"CFG-031 .*draws images, so it has no tokenizer"):
        quietgoose.load_tokenizer(run.export)
    with pytest.raises(RecipeError, match=r"CFG-031 .*draws images, so it has no experts"):
        quietgoose.merge(run.export, tmp_path / "merged")


@pytest.mark.parametrize(
    ("field", "value", "word"),
    [
        ("unet", {"format": 1}, "describes no U-Net"),
        ("unet.shape", ["a", 8, 8], "describes no U-Net"),
        ("unet.shape", 3, "describes no U-Net"),
        ("unet.classes", [1, 2], "classes are no names"),
        ("unet.backbone.width", "wide", "describes no U-Net"),
        ("samplers", [], "samplers is"),
        ("samplers", [{"name": "ode", "steps": "many"}], "describes no U-Net"),
        ("samplers", [{"name": "ode", "steps": 0}], "at least 1"),
        ("samplers", [{"name": "ode", "stps": 3}], "stps"),
        ("vae", "here", "vae is"),
        ("dtype", None, "dtype is"),
    ],
)
def test_a_damaged_manifest_of_images_is_one_plain_error(run, tmp_path: Path, field: str, value, word: str) -> None:
    copy = tmp_path / "export"
    shutil.copytree(run.export, copy)
    manifest = place = read_json(copy / "quietgoose.json")
    *path, last = field.split(".")
    for part in path:
        place = place[part]
    place[last] = value
    (copy / "quietgoose.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=f"EXP-003.*{word}"):
        quietgoose.load(copy, device="cpu")


def test_weights_that_the_manifest_does_not_name_are_refused(run, tmp_path: Path) -> None:
    copy = tmp_path / "export"
    shutil.copytree(run.export, copy)
    manifest = read_json(copy / "quietgoose.json")
    del manifest["files"]["model.safetensors"]
    (copy / "quietgoose.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=r"EXP-004.*model.safetensors: would be opened"):
        quietgoose.load(copy, device="cpu")


def test_an_export_that_changed_or_is_asked_for_words_is_refused(run, tmp_path: Path) -> None:
    copy = tmp_path / "export"
    shutil.copytree(run.export, copy)
    with pytest.raises(RecipeError, match=r"CFG-031.*draws images"):
        quietgoose.load(copy, router="uniform")
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    with pytest.raises(ArtifactError, match="EXP-004"):
        quietgoose.load(copy)


def test_the_command_writes_grids_arrays_and_files(run, tmp_path: Path, capsys) -> None:
    common = ["--model", str(run.export), "--count", "6", "--steps", "2", "--batch", "6", "--device", "cpu"]
    assert sample_command([*common, "--out", str(tmp_path / "a.png"), "--columns", "3"]) == 0
    assert Image.open(tmp_path / "a.png").size == (26 * 6, 17 * 6)
    assert sample_command([*common, "--out", str(tmp_path / "a.npz"), "--labels", "3,8", "--guidance", "1.5"]) == 0
    arrays = np.load(tmp_path / "a.npz")
    assert arrays["images"].shape == (6, 1, 8, 8)
    assert arrays["labels"].tolist() == [3, 8] * 3
    loaded = quietgoose.load(run.export, device="cpu")
    wanted = loaded.sample(6, ["3", "8"] * 3, guidance=1.5, steps=2, batch=6)
    assert np.array_equal(arrays["images"], wanted.numpy())
    assert sample_command([*common, "--out", str(tmp_path / "many"), "--sampler", "a_guided"]) == 0
    assert len(list((tmp_path / "many").glob("*.png"))) == 6
    capsys.readouterr()
    for bad, word in (
        (["--labels", "11"], "0 to 9"),
        (["--sampler", "x"], "ode, a_guided"),
        (["--out", "a.gif"], "FILE.png"),
    ):
        assert sample_command([*common, *bad]) == 2
        assert word in capsys.readouterr().err
    assert sample_command(["--model", str(tmp_path)]) == 2
    assert "quietgoose.json" in capsys.readouterr().err


def test_the_command_tries_place_and_folder_before_it_draws(run, tmp_path: Path, capsys, monkeypatch) -> None:
    from quietgoose.train import export

    monkeypatch.setattr(export, "load", lambda *a, **k: pytest.fail("refused first"))
    (tmp_path / "file").write_text("")
    (tmp_path / "a.png").mkdir()
    common = ["--model", str(run.export), "--count=2"]
    for out in ("file/a.png", "file/many", "file", "a.png", "file/a.npz"):
        assert sample_command([*common, "--out", str(tmp_path / out)]) == 6
        assert f"QG-IO-010 --out {tmp_path / out}" in capsys.readouterr().err
    assert sample_command([*common, "--out", str(tmp_path / "a.gif")]) == 2
    assert "FILE.png" in capsys.readouterr().err
    assert sample_command(["--model", str(run.root), "--out", str(tmp_path / "b.png")]) == 2
    assert f"there is an export in {run.export}" in capsys.readouterr().err
    assert sample_command([*common, "--device=cuda:77", "--out", str(tmp_path / "b.png")]) == 2
    assert "QG-CFG-082 --device cuda:77" in capsys.readouterr().err


def test_points_without_a_curve() -> None:
    settings = ImageEvaluation(
        count=100, at_count=50, raw=False, samplers={"a": SamplerSettings(), "b": SamplerSettings()}
    )
    assert [(p.step, p.weights, p.sampler, p.count) for p in points(settings, [])] == [
        (None, "average", "a", 100), (None, "average", "b", 100),
    ]  # fmt: skip
    plain = points(ImageEvaluation(count=100, raw=True, samplers={"a": SamplerSettings()}), [5])
    assert [(p.step, p.weights, p.count) for p in plain] == [
        (5, "average", 100),
        (None, "average", 100),
        (None, "raw", 100),
    ]


def test_the_held_out_loss_is_that_of_fixed_times_and_noise(tmp_path: Path) -> None:
    images = open_images(ImageSettings(limit=64, holdout=0.3, cache=str(tmp_path)), "test")

    def nothing(x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x)

    value = held_out_loss(nothing, images, 64, 16, 0, CPU)
    clean = images.pixels(torch.arange(64))
    assert value == pytest.approx(1.0 + float(clean.square().mean()), rel=0.1)  # E |eps - x|^2
    assert held_out_loss(nothing, images, 64, 64, 0, CPU) == pytest.approx(value, rel=1e-6)
    times: list[torch.Tensor] = []
    held_out_loss(lambda x, t, labels: times.append(t) or x, images, 64, 16, 0, CPU)
    assert torch.allclose(torch.cat(times).sort().values, (torch.arange(64) + 0.5) / 64)


WORKER = """
import sys, torch, torch.distributed as dist
from quietgoose.alignment.backbone import build_backbone
from quietgoose.alignment.judging import as_bytes
from quietgoose.alignment.model_settings import BackboneSettings
from quietgoose.alignment.settings import SamplerSettings
from quietgoose.train.image_sampling import draw_samples, velocity_of
rank, world, store, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
if world > 1:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
unet = build_backbone(BackboneSettings(preset="nano"), (1, 8, 8), 10, seed=0)
random = torch.Generator().manual_seed(0)
for p in unet.parameters():
    p.data += 0.05 * torch.randn(p.shape, generator=random)
cpu = torch.device("cpu")
settings = SamplerSettings(method="sde", steps=3, guidance=1.5, batch=4)
images = draw_samples(velocity_of(unet, cpu, half=False), torch.arange(18) % 10, (1, 8, 8), settings, 10, 7, cpu, lambda x: x)
torch.save(images, f"{out}.{rank}")
"""


def test_samples_are_the_same_for_any_number_of_processes(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = []
    for world in (1, 2):
        for rank in range(world):
            words = [str(rank), str(world), str(tmp_path / f"store{world}"), str(tmp_path / f"images{world}")]
            started.append(subprocess.Popen([sys.executable, "-c", WORKER, *words], env=environment, cwd=tmp_path))
    assert [process.wait(timeout=100) for process in started] == [0] * 3
    wanted = torch.load(tmp_path / "images1.0")
    assert wanted.shape == (18, 1, 8, 8)
    assert len({sha256_json(image.tolist()) for image in wanted}) == 18
    for rank in range(2):
        assert torch.equal(torch.load(tmp_path / f"images2.{rank}"), wanted)


def test_an_export_of_a_latent_u_net_brings_its_autoencoder(run, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        in_channels=3, out_channels=3, down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
        block_out_channels=(8,), layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=8,
    )  # fmt: skip
    vae.save_pretrained(tmp_path / "vae")
    recipe = load_recipe([*OPTIONS, "--output", str(tmp_path), "--images.vae", str(tmp_path / "vae")])
    unet = build_backbone(recipe.urepa.backbone, (4, 8, 8), 10, seed=0)
    card = UNetCard(recipe.urepa.backbone, (4, 8, 8), tuple("0123456789"), "data", 5)
    trained = {f"average/backbone.{name}": p.detach() + 0.02 for name, p in unet.named_parameters()}
    save_unet(card, trained, tmp_path / "unet")
    (tmp_path / "export").mkdir()
    export_sampler(tmp_path / "export", tmp_path / "unet", recipe, tmp_path / "nothing", channels=1)
    shutil.rmtree(tmp_path / "vae")
    loaded = quietgoose.load(tmp_path / "export", device="cpu")
    images = loaded.sample(4, seed=2)
    assert images.shape == (4, 1, 8, 8)
    sampler = recipe.evaluate.images.samplers["ode"]
    latents = sample_rows(
        velocity_of(loaded.unet, CPU, half=False), torch.arange(4), torch.arange(4), (4, 8, 8), sampler, 10, 2
    )
    decoded = vae.decode(latents / vae.config.scaling_factor).sample.clamp(-1, 1).mean(1, keepdim=True)
    assert int((images.int() - as_bytes(decoded).int()).abs().max()) <= 1
