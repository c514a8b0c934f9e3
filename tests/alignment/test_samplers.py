"""Samplers on a Gaussian whose velocity is known, guidance, and noise by number (u-repa.md, tests 12 and 13)."""

from __future__ import annotations

import pytest
import torch
from quietgoose.alignment.noise import normal
from quietgoose.alignment.samplers import sample, sample_rows
from quietgoose.alignment.settings import SamplerSettings, check_sampler
from quietgoose.base.errors import RecipeError

MU, SPREAD = 0.7, 0.5
SHAPE = (1, 2, 2)


def gaussian(x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """E[eps - x | x_t] for data N(MU, SPREAD^2): u-repa.md, section 2, test 12."""
    t = t[:, None, None, None]
    variance = (1 - t) ** 2 * SPREAD**2 + t**2
    return (t - (1 - t) * SPREAD**2) * (x - (1 - t) * MU) / variance - MU


@pytest.mark.parametrize(
    ("method", "steps", "tolerance"), [("euler", 400, 0.012), ("heun", 60, 0.012), ("sde", 400, 0.015)]
)
def test_a_gaussian_comes_out_with_its_mean_and_spread(method: str, steps: int, tolerance: float) -> None:
    settings = SamplerSettings(method=method, steps=steps, last=0.01)
    index = torch.arange(8000)
    drawn = sample_rows(gaussian, index, torch.zeros(8000, dtype=torch.int64), SHAPE, settings, 1, seed=3)
    assert drawn.dtype == torch.float32
    assert abs(float(drawn.mean()) - MU) < tolerance
    assert abs(float(drawn.std()) - SPREAD) < tolerance


def test_the_sde_is_not_the_ode() -> None:
    """Its noise must matter: with the noise of its steps left out the spread is far too small."""
    settings = SamplerSettings(method="sde", steps=200, last=0.01)
    noise = normal(0, torch.arange(4000), SHAPE)
    labels = torch.zeros(4000, dtype=torch.int64)
    silent = sample(gaussian, noise, labels, settings, 1, lambda step: torch.zeros_like(noise))
    assert float(silent.std()) < 0.5 * SPREAD
    with pytest.raises(RecipeError, match="needs the noise"):
        sample(gaussian, noise, labels, settings, 1)


def test_heun_is_better_than_euler_at_as_many_calls() -> None:
    noise = normal(1, torch.arange(2000), SHAPE).double()
    exact = MU + SPREAD * noise  # the flow of a Gaussian is linear
    labels = torch.zeros(2000, dtype=torch.int64)
    error = {}
    for method, steps in (("euler", 20), ("heun", 10)):
        drawn = sample(gaussian, noise, labels, SamplerSettings(method=method, steps=steps), 1)
        error[method] = float((drawn - exact).abs().mean())
    assert error["heun"] < 0.6 * error["euler"]


def test_guidance_runs_inside_its_interval_only_and_one_is_none() -> None:
    calls: list[int] = []

    def velocity(x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        calls.append(int(labels[0]))
        return torch.full_like(x, float(labels[0]))

    noise, labels, classes = torch.zeros(2, *SHAPE), torch.tensor([3, 3]), 7
    settings = SamplerSettings(steps=10, guidance=2.0, guidance_low=0.25, guidance_high=0.65)
    drawn = sample(velocity, noise, labels, settings, classes)
    # t = 1.0, 0.9, ... 0.1: inside are 0.6, 0.5, 0.4, 0.3
    assert calls.count(classes) == 4
    assert calls.count(3) == 10
    assert torch.allclose(drawn, torch.full_like(drawn, -(0.6 * 3.0 + 0.4 * (7.0 + 2.0 * (3.0 - 7.0)))), atol=1e-5)
    calls.clear()
    sample(velocity, noise, labels, SamplerSettings(steps=10, guidance=1.0), classes)
    assert calls == [3] * 10


def test_the_null_label_is_the_number_of_classes() -> None:
    seen: set[int] = set()

    def velocity(x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        seen.update(labels.tolist())
        return x

    sample(velocity, torch.zeros(2, *SHAPE), torch.tensor([0, 4]), SamplerSettings(steps=2, guidance=1.5), 5)
    assert seen == {0, 4, 5}


@pytest.mark.parametrize("method", ["euler", "sde"])
def test_sample_number_i_is_the_same_in_any_batch(method: str) -> None:
    settings = SamplerSettings(method=method, steps=8)
    labels = torch.zeros(10, dtype=torch.int64)
    whole = sample_rows(gaussian, torch.arange(10), labels, SHAPE, settings, 1, seed=5)
    part = sample_rows(gaussian, torch.tensor([7, 2]), labels[:2], SHAPE, settings, 1, seed=5)
    assert torch.equal(part, whole[[7, 2]])
    other = sample_rows(gaussian, torch.arange(10), labels, SHAPE, settings, 1, seed=6)
    assert not torch.equal(other, whole)


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (4, 8, 8)])
def test_noise_is_normal_and_names_tell_draws_apart(shape: tuple[int, int, int]) -> None:
    count = 40_000 // (shape[0] * shape[1] * shape[2]) + 2
    drawn = normal(0, torch.arange(count), shape)
    assert drawn.shape == (count, *shape)
    assert abs(float(drawn.mean())) < 0.03
    assert abs(float(drawn.std()) - 1) < 0.03
    assert abs(float((drawn**4).mean()) - 3) < 0.3
    flat = drawn.flatten(1)
    if flat.shape[1] > 1:  # the two halves of Box-Muller's pairs are independent
        half = flat.shape[1] // 2
        assert abs(float((flat[:, 0] * flat[:, half]).mean())) < 5 / count**0.5
    for other in (normal(1, torch.arange(count), shape), normal(0, torch.arange(count), shape, 1, 0)):
        assert abs(float((drawn * other).mean())) < 0.03


def test_what_a_sampler_must_not_be() -> None:
    assert check_sampler(SamplerSettings(), "s") == []
    bad = SamplerSettings(method="sde", steps=1, guidance=-1, guidance_low=0.8, guidance_high=0.2, last=0.0, batch=0)
    assert [line.split(":")[0] for line in check_sampler(bad, "s")] == [
        "s.steps", "s.batch", "s.guidance_low, s.guidance_high".replace(", s.", ", "), "s.last", "s.guidance",
    ]  # fmt: skip
