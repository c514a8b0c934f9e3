"""The path, its random numbers, the schedules of lambda, the moving average."""

from __future__ import annotations

import pytest
import torch
from quietgoose.alignment import path, schedules
from quietgoose.alignment.ema import ShardedAverage, decay_at
from quietgoose.alignment.model_settings import AlignSettings, AverageSettings


def test_the_path_runs_from_data_to_noise_with_its_velocity() -> None:
    x, noise = torch.randn(4, 1, 3, 3), torch.randn(4, 1, 3, 3)
    t = torch.tensor([0.0, 0.25, 0.5, 1.0])
    at = path.interpolate(x, noise, t)
    assert torch.equal(at[0], x[0])
    assert torch.equal(at[3], noise[3])
    step = path.interpolate(x, noise, t + 0.125) - at
    assert torch.allclose(step, 0.125 * path.velocity(x, noise), atol=1e-6)


def test_random_numbers_belong_to_the_place_and_not_to_the_batch() -> None:
    place = torch.arange(100_000, 100_064)
    x = torch.zeros(64, 3, 5, 5)
    labels = torch.arange(64) % 7
    whole = (path.times(1, place), path.noise_like(1, place, x), path.drop_labels(1, place, labels, 0.3, 7))
    part = slice(20, 31)
    parts = (
        path.times(1, place[part]),
        path.noise_like(1, place[part], x[part]),
        path.drop_labels(1, place[part], labels[part], 0.3, 7),
    )
    for one, other in zip(whole, parts):
        assert torch.equal(one[part], other)
    assert not torch.equal(whole[0], path.times(2, place))


def test_their_distributions() -> None:
    place = torch.arange(4000)
    t = path.times(3, place)
    assert float(t.min()) >= 0
    assert float(t.max()) < 1
    assert float(t.mean()) == pytest.approx(0.5, abs=0.02)
    noise = path.noise_like(3, place, torch.zeros(4000, 1, 3, 3))
    assert float(noise.mean()) == pytest.approx(0.0, abs=0.02)
    assert float(noise.std()) == pytest.approx(1.0, abs=0.02)
    assert abs(float(torch.corrcoef(torch.stack([t, noise[:, 0, 0, 0]]))[0, 1])) < 0.05


@pytest.mark.parametrize("classes", [1, 7, 1000, 1234])
def test_dropped_labels_become_the_null_class_of_any_number_of_classes(classes: int) -> None:
    """A null class fixed at 1000 would be a real label, or no row at all."""
    labels = torch.arange(5000) % classes
    made = path.drop_labels(0, torch.arange(5000), labels, 0.1, classes)
    dropped = made == classes
    assert float(dropped.float().mean()) == pytest.approx(0.1, abs=0.02)
    assert torch.equal(made[~dropped], labels[~dropped])
    assert torch.equal(path.drop_labels(0, torch.arange(5000), labels, 0.0, classes), labels)


def test_an_average_that_teaches_sees_less_noise() -> None:
    place, t = torch.arange(1000), torch.rand(1000)
    before = path.earlier(0, place, t, 0.2)
    assert bool((before <= t).all())
    assert bool((before >= 0).all())
    assert float((t - before).max()) <= 0.2 + 1e-6
    assert torch.equal(path.earlier(0, place, t, 0.0), t)


def test_lambda_over_the_training() -> None:
    constant = AlignSettings(weight=0.5)
    assert [schedules.step_weight(constant, s, 10) for s in (0, 9)] == [0.5, 0.5]
    stopped = AlignSettings(weight=0.5, stop=0.5)
    assert [schedules.step_weight(stopped, s, 11) for s in (0, 5, 6, 10)] == [0.5, 0.5, 0.0, 0.0]
    linear = AlignSettings(weight=1.0, schedule="linear")
    assert [schedules.step_weight(linear, s, 4) for s in range(4)] == [1.0, 0.75, 0.5, 0.25]
    cosine = AlignSettings(weight=1.0, schedule="cosine")
    assert schedules.step_weight(cosine, 2, 4) == pytest.approx(0.5)
    assert schedules.step_weight(AlignSettings(weight=0.0), 0, 4) == 0.0
    assert schedules.step_weight(AlignSettings(stop=0.0), 0, 4) == 0.0


def test_lambda_over_the_path() -> None:
    t = torch.tensor([0.0, 0.25, 0.4, 0.5, 0.6, 0.75, 1.0])
    made = schedules.time_weight(AlignSettings(over_time="ends"), t)
    assert made.tolist() == pytest.approx([1.0, 1.0, 0.7, 0.5, 0.7, 1.0, 1.0])
    assert schedules.time_weight(AlignSettings(), t).tolist() == [1.0] * 7


def test_the_average_is_the_recursion_and_its_ramp() -> None:
    settings = AverageSettings(decay=0.9)
    weight, other = torch.randn(5), torch.randn(2, 3)
    average = ShardedAverage(settings, [weight, other])
    want = weight.clone()
    for step in range(12):
        weight.add_(torch.randn(5))
        bad = step in (3, 7)
        average.update(torch.tensor(float(bad)) if step < 5 else float(bad))  # known to the device alone, or here
        if bad:
            continue
        applied = step - (step > 3) - (step > 7)
        decay = min(0.9, (1 + applied) / (10 + applied))
        want = decay * want + (1 - decay) * weight
    assert torch.allclose(average.of(weight), want, atol=1e-5)
    assert torch.equal(average.of(other), other)
    again = ShardedAverage(settings, [weight])
    again.resume(10)
    weight.add_(1.0)
    again.update()
    assert torch.allclose(again.of(weight), weight - min(0.9, 11 / 20), atol=1e-5)
    assert decay_at(AverageSettings(ramp=False), torch.tensor(0.0).double()) == 0.9999
    assert decay_at(AverageSettings(), torch.tensor(100_000.0).double()) == 0.9999
