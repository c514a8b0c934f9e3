"""Distances against plain twins, the judge, floors, and what tells a copy from a sample."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from quietgoose.alignment.distances import (
    Moments,
    ball_radii,
    frechet,
    frechet_spread,
    kernel_distance,
    nearest,
    precision_recall,
)
from quietgoose.alignment.inception import open_inception
from quietgoose.alignment.judge import open_judge
from quietgoose.alignment.judging import Reference, as_bytes, as_images
from quietgoose.alignment.settings import FitSettings, JudgeSettings
from quietgoose.base.errors import ArtifactError, DataError, RecipeError
from quietgoose.base.seeding import generator
from sklearn.metrics.pairwise import polynomial_kernel
from sklearn.neighbors import NearestNeighbors

CPU = torch.device("cpu")
JUDGE = JudgeSettings(width=8, train=FitSettings(steps=40, batch=32, lr=5e-3))


@dataclass
class Settings:
    count: int = 60
    neighbours: int = 3
    subsets: int = 10
    subset_size: int = 30
    bootstrap: int = 5


def clouds(seed: int, count: int = 300, dim: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    mix = torch.randn(dim, dim, generator=random)
    x = torch.randn(count, dim, generator=random) @ mix
    y = 0.7 * torch.randn(count, dim, generator=random) @ mix + 0.4
    return x, y


def test_frechet_is_the_formula_with_scipys_square_root() -> None:
    x, y = clouds(0)
    a, b = x.double().numpy(), y.double().numpy()
    s, t = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(s @ t).real
    wanted = float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s + t - 2 * root))
    assert frechet(Moments.of(x), Moments.of(y)) == pytest.approx(wanted, rel=1e-9)
    assert frechet(Moments.of(x), Moments.of(x)) == pytest.approx(0.0, abs=1e-9)
    flat = x.clone()
    flat[:, 2] = 0.0  # a dead feature: the covariance is singular
    assert frechet(Moments.of(flat), Moments.of(flat)) == pytest.approx(0.0, abs=1e-6)


def test_moments_of_weighted_rows_are_those_of_repeated_rows() -> None:
    x, _ = clouds(1, count=20)
    weight = torch.arange(20).double() % 3
    repeated = x.repeat_interleave(weight.long(), dim=0)
    one, other = Moments.of(x, weight), Moments.of(repeated)
    assert torch.allclose(one.mean_D, other.mean_D)
    assert torch.allclose(one.covariance_DD, other.covariance_DD)
    assert 0 < frechet_spread(x, Moments.of(x), 20, torch.Generator().manual_seed(0)) < 5


def test_the_kernel_distance_is_the_unbiased_one() -> None:
    x, y = clouds(2, count=80)
    value, error = kernel_distance(x, y, 1, 80, torch.Generator().manual_seed(0))
    kernels = [polynomial_kernel(a.double().numpy(), b.double().numpy(), degree=3, gamma=1 / 5, coef0=1)
               for a, b in ((x, x), (y, y), (x, y))]  # fmt: skip
    xx, yy, xy = kernels
    off = 80 * 79
    wanted = (xx.sum() - np.trace(xx)) / off + (yy.sum() - np.trace(yy)) / off - 2 * xy.mean()
    assert value == pytest.approx(float(wanted), rel=1e-9)
    assert np.isnan(error)
    same = [kernel_distance(*(torch.randn(60, 4, generator=torch.Generator().manual_seed(10 * s + k)) for k in (0, 1)), 1, 60,
                            torch.Generator().manual_seed(0))[0] for s in range(60)]  # fmt: skip
    assert abs(np.mean(same)) < 3 * np.std(same) / 60**0.5 + 1e-9  # no bias where there is no difference
    assert min(same) < 0 < max(same)


def test_precision_recall_and_neighbours_against_sklearn() -> None:
    x, y = clouds(3, count=120)
    radius = NearestNeighbors(n_neighbors=4).fit(y.numpy()).kneighbors(y.numpy())[0][:, -1]
    assert np.allclose(ball_radii(y, 3).numpy(), radius, atol=1e-5)
    distance = np.linalg.norm(x.numpy()[:, None] - y.numpy()[None], axis=-1)
    wanted = float((distance <= radius[None]).any(1).mean())
    precision, recall = precision_recall(x, y, 3)
    assert precision == pytest.approx(wanted)
    assert recall == pytest.approx(precision_recall(y, x, 3)[0])
    assert precision_recall(x, x, 3) == (1.0, 1.0)
    assert precision_recall(x + 100.0, x, 3) == (0.0, 0.0)
    near, index = nearest(x, y)
    assert np.allclose(near.numpy(), distance.min(1), atol=1e-4)
    assert index.tolist() == distance.argmin(1).tolist()


@pytest.fixture(scope="module")
def judged(bars, tmp_path_factory) -> tuple:
    train, test = bars(160, 0), bars(80, 1)
    cache = tmp_path_factory.mktemp("cache")
    judge = open_judge(JUDGE, train, test, CPU, cache)
    return judge, train, test, cache


def test_the_judge_is_right_and_found_again(judged) -> None:
    judge, train, test, cache = judged
    assert judge.accuracy > 0.95
    assert judge.task == "classes"
    again = open_judge(JUDGE, train, test, CPU, cache)
    assert again.digest == judge.digest
    assert torch.equal(again.look(train.rows[:9])[1], judge.look(train.rows[:9])[1])
    assert len(list((cache / "judges").glob("*/judge.json"))) == 1
    weights = next((cache / "judges").glob("*/model.safetensors"))
    kept = weights.read_bytes()
    weights.write_bytes(kept[:-2] + bytes([kept[-2] ^ 1, kept[-1]]))
    with pytest.raises(ArtifactError, match="is not what was trained"):
        open_judge(JUDGE, train, test, CPU, cache)
    weights.write_bytes(kept)


def test_without_classes_the_judge_tells_turns(bars, tmp_path: Path) -> None:
    train, test = bars(96, 0), bars(48, 1)
    for images in (train, test):  # a lit corner; which one, the turn decides
        images.num_classes, images.labels = 1, torch.zeros_like(images.labels)
        images.rows = images.rows.mean(dim=(2, 3), keepdim=True).expand(-1, -1, 8, 8).clone()
        images.rows[:, :, :3, :3] = 1.0
        images.flip, images.digest = False, images.digest + "corner"
    judge = open_judge(JUDGE, train, test, CPU, tmp_path)
    assert judge.task == "turns"
    assert judge.accuracy > 0.9
    reference = Reference.of(judge, train, test, Settings(count=40), 40)
    assert "class_accuracy" not in reference.floors["test"]


def test_scores_order_what_must_be_ordered(judged) -> None:
    judge, train, test, _ = judged
    reference = Reference.of(judge, train, test, Settings(), 60)
    assert reference.count == 60
    rows, labels = test.rows[:60], test.labels[:60]
    noisy = (rows + 0.35 * torch.randn(rows.shape, generator=torch.Generator().manual_seed(0))).clamp(-1, 1)
    good = reference.score(as_bytes(rows), labels)
    bad = reference.score(as_bytes(noisy), labels)
    copied = reference.score(as_bytes(train.rows[:60]), train.labels[:60])
    wrong = reference.score(as_bytes(rows), (labels + 1) % 4)
    one_class = reference.score(as_bytes(rows[labels == 0][:15].repeat(4, 1, 1, 1)), torch.zeros(60, dtype=torch.int64))
    floor = reference.floors["test"]["jfd"]
    assert good["jfd"] < 3 * floor + 1e-6
    assert bad["jfd"] > 3 * floor
    assert bad["kid"] > good["kid"]
    assert one_class["recall"] < 0.5 * good["recall"]
    assert good["class_accuracy"] > 0.9 > 0.1 > wrong["class_accuracy"]
    assert copied["copies"] > 0.9
    assert copied["nearest_ratio"] < 0.3
    assert reference.floors["test"]["nearest_ratio"] == pytest.approx(1.0, abs=0.05)
    assert "nearest_ratio" not in reference.floors["train"]
    assert set(good) - set(reference.floors["train"]) == {"nearest_ratio", "copies"}
    with pytest.raises(DataError, match="61 samples against a reference of 60"):
        reference.score(as_bytes(test.rows[:61]), test.labels[:61])


def test_the_count_is_what_the_data_allow(judged, bars) -> None:
    judge, train, test, _ = judged
    assert Reference.of(judge, train, test, Settings(), 10_000).count == 80
    with pytest.raises(DataError, match="DATA-045"):
        Reference.of(judge, train, bars(9, 1), Settings(), 10_000)


def test_fid_only_with_inceptions_weights(judged, tmp_path: Path) -> None:
    class Features(torch.nn.Module):
        def forward(self, images: torch.Tensor, return_features: bool = False) -> torch.Tensor:
            assert return_features
            assert images.shape[1] == 3
            return images.float().mean(dim=1)[:, ::4, ::4].flatten(1)

    torch.jit.script(Features()).save(str(tmp_path / "inception.pt"))
    network = open_inception(tmp_path / "inception.pt", CPU)
    judge, train, test, _ = judged
    reference = Reference.of(judge, train, test, Settings(), 60, network)
    real = as_bytes(test.rows[:60])
    scores = reference.score(real, test.labels[:60])
    order = torch.randperm(160, generator=generator(0, "reference", "train"))
    side = as_bytes(train.rows[order[:60]]).float()
    wanted = frechet(Moments.of(real.float()[:, 0, ::4, ::4].flatten(1)), Moments.of(side[:, 0, ::4, ::4].flatten(1)))
    assert scores["fid"] == pytest.approx(wanted, rel=1e-6)
    assert "fid" not in Reference.of(judge, train, test, Settings(), 60).floors["test"]
    (tmp_path / "no.pt").write_bytes(b"nothing")
    for path, word in (("no.pt", "cannot be opened as TorchScript"), ("absent.pt", "no such file")):
        with pytest.raises(RecipeError, match=word):
            open_inception(tmp_path / path, CPU)


def test_bytes_and_back() -> None:
    every = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    assert torch.equal(as_bytes(as_images(every)), every)
    assert as_bytes(torch.tensor([[[[-3.0, 3.0]]]])).flatten().tolist() == [0, 255]


def test_settings_name_another_judge(judged) -> None:
    judge, train, test, cache = judged
    other = open_judge(replace(JUDGE, seed=7, train=replace(JUDGE.train, steps=2)), train, test, CPU, cache)
    assert other.digest != judge.digest
