"""What only a GPU can show: kept features in its memory, bf16 sampling, compiled velocity, training of teacher and judge."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from quietgoose.alignment.backbone import build_backbone
from quietgoose.alignment.features import CachedTeacher
from quietgoose.alignment.judge import open_judge
from quietgoose.alignment.model_settings import BackboneSettings
from quietgoose.alignment.noise import normal
from quietgoose.alignment.samplers import sample_rows
from quietgoose.alignment.settings import FitSettings, JudgeSettings, SamplerSettings, TeacherSettings
from quietgoose.alignment.teachers import open_teacher
from quietgoose.alignment.training import train_teacher
from quietgoose.train.data.image_steps import ImageSteps
from quietgoose.train.data.images import ImageLoader, open_images
from quietgoose.train.image_sampling import velocity_of
from quietgoose.train.image_settings import ImageSettings

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
GPU, CPU = torch.device("cuda"), torch.device("cpu")
SMALL = TeacherSettings(
    patch=2,
    width=64,
    layers=2,
    heads=2,
    decoder_width=64,
    decoder_layers=1,
    train=FitSettings(steps=60, batch=64, lr=3e-3),
)


@dataclass
class Picked:
    index_B: torch.Tensor
    flipped_B: torch.Tensor


def test_batches_are_those_of_the_cpu(tmp_path: Path) -> None:
    images = open_images(ImageSettings(flip=True, limit=100, cache=str(tmp_path)))
    for step in (0, 5):
        one, other = ImageLoader(images, 32, 1).at(step), ImageLoader(images, 32, 1, device=GPU).at(step)
        assert other.images_BCHW.is_cuda
        for name in ("images_BCHW", "labels_B", "index_B", "flipped_B"):
            assert torch.equal(getattr(one, name), getattr(other, name).cpu())


@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_steps_are_made_ready_on_the_device(tmp_path: Path, device: str) -> None:
    images = open_images(ImageSettings(flip=True, limit=100, cache=str(tmp_path)))
    data = ImageSteps(ImageLoader(images, 32, 1, device=device), ["velocity"], 32)
    made = [data.step(number) for number in range(3)]
    data.close()
    assert all(step.micro[0].images_BCHW.is_cuda for step in made)
    assert torch.equal(made[2].micro[0].images_BCHW.cpu(), ImageLoader(images, 32, 1).at(2).images_BCHW)


def test_noise_is_that_of_the_cpu_to_rounding() -> None:
    index = torch.arange(50)
    assert torch.allclose(normal(3, index, (3, 8, 8)), normal(3, index.to(GPU), (3, 8, 8)).cpu(), atol=2e-5)


def test_teacher_features_and_judge(bars, tmp_path: Path) -> None:
    images, held = bars(192, 0, side=16), bars(80, 1, side=16)
    folder = train_teacher(SMALL, images, GPU, tmp_path, held_out=held)
    teacher = open_teacher(SMALL, images, GPU, folder)
    assert teacher is not None
    assert next(teacher.module.parameters()).is_cuda
    kept = CachedTeacher(teacher, images, tmp_path)
    assert kept.resident
    picked = Picked(torch.tensor([5, 0, 131, 5], device=GPU), torch.tensor([False, True, True, True], device=GPU))
    online = teacher.features(images.pixels(picked.index_B, picked.flipped_B, GPU))
    cosine = torch.nn.functional.cosine_similarity(kept.features_for(picked), online, dim=-1)
    assert float(cosine.min()) > 0.999
    settings = JudgeSettings(width=16, train=FitSettings(steps=60, batch=64, lr=5e-3))
    assert open_judge(settings, images, held, GPU, tmp_path).accuracy > 0.9


def test_sampling_in_bf16_compiled_and_again() -> None:
    torch.manual_seed(0)
    unet = build_backbone(BackboneSettings(preset="nano", width=128), (1, 8, 8), 10, seed=0)
    for parameter in unet.parameters():
        parameter.data += 0.03 * torch.randn_like(parameter)
    unet.to(GPU).eval().requires_grad_(False)
    index, labels = torch.arange(64, device=GPU), torch.arange(64, device=GPU) % 10
    settings = SamplerSettings(steps=10, guidance=1.5, guidance_high=0.7, batch=64)

    def draw(**options: bool) -> torch.Tensor:
        return sample_rows(velocity_of(unet, GPU, **options), index, labels, (1, 8, 8), settings, 10, seed=1)

    exact, half = draw(half=False), draw(half=True)
    assert torch.equal(half, draw(half=True))
    scale = float(exact.std())
    assert float((half - exact).pow(2).mean().sqrt()) < 0.03 * scale
    assert float((draw(half=True, compiled=True) - half).pow(2).mean().sqrt()) < 0.03 * scale
