"""diffusers' UNet2DModel as the U-Net: its taps, its gradient, a training with it, and its absence."""

from __future__ import annotations

import sys

import pytest
import torch
from quietgoose.alignment.backbone import build_backbone
from quietgoose.alignment.model_settings import AlignSettings, BackboneSettings
from quietgoose.alignment.taps import describe_tap, resolve_tap
from quietgoose.base.errors import EnvironmentProblem, RecipeError
from quietgoose.train.data.image_steps import AlignBatch
from quietgoose.train.jobs.urepa import TeacherShape, UrepaJob
from quietgoose.train.recipe import TrainSettings
from quietgoose.train.recipe_images import UrepaSettings

OPTIONS = {
    "block_out_channels": [16, 32], "layers_per_block": 1, "norm_num_groups": 8, "attention_head_dim": 16,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
}  # fmt: skip
SETTINGS = BackboneSettings(kind="diffusers", diffusers=OPTIONS)


@pytest.fixture
def needs_diffusers() -> None:
    pytest.importorskip("diffusers", reason="the extra 'images' is not installed")


@pytest.mark.usefixtures("needs_diffusers")
def test_its_mid_block_is_the_tap() -> None:
    unet = build_backbone(SETTINGS, (1, 8, 8), 5, 0)
    assert unet.tap_names() == ("down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1")
    assert resolve_tap(unet, "auto") == resolve_tap(unet, "3") == "mid_block"
    assert describe_tap(unet, "mid_block") == "mid_block (block 3 of 5, 4x4 tokens of width 32)"
    x, t, labels = torch.randn(3, 1, 8, 8), torch.rand(3), torch.tensor([0, 4, 5])  # 5 is the null class
    v = unet(x, t, labels)
    assert v.shape == x.shape
    for name in unet.tap_names():
        again, tokens = unet(x, t, labels, tap=name)
        width, (height, length) = unet.tap_shape(name)
        assert tokens.shape == (3, height * length, width)
        assert torch.equal(again, v)
    assert not torch.allclose(unet(x, t + 0.1, labels), v)
    assert not torch.allclose(unet(x, t, torch.tensor([1, 1, 1])), v)
    hooks = [len(m._forward_hooks) for m in unet.modules()]
    assert sum(hooks) == 0  # none stays behind


@pytest.mark.usefixtures("needs_diffusers")
def test_it_is_aligned_like_the_other() -> None:
    """The alignment's gradient ends at the mid block; a few steps raise the cosine."""
    train = TrainSettings(steps=20, rows_per_expert=4, micro_rows=4)
    settings = UrepaSettings(backbone=SETTINGS, align=AlignSettings(hidden=16), train=train)
    unet = build_backbone(SETTINGS, (1, 8, 8), 5, 0)
    job = UrepaJob(unet, settings, 20, 0, TeacherShape(6, (8, 8)))
    generator = torch.Generator().manual_seed(0)
    images, teacher = torch.randn(4, 1, 8, 8, generator=generator), torch.randn(4, 64, 6, generator=generator)
    batch = AlignBatch(images, torch.arange(4), torch.arange(4), teacher)
    job.begin_step(0, torch.tensor([0.0, 0.25, 0.25]))
    job(batch).total.backward()
    reached = {
        n.split(".")[1] for n, p in unet.named_parameters() if p.grad is not None and float(p.grad.abs().max()) > 0
    }
    assert {"conv_in", "down_blocks", "mid_block", "time_embedding", "class_embedding"} == reached
    adam = torch.optim.Adam(job.parameters(), lr=1e-2)
    cosines = []
    for step in range(20):
        job.begin_step(step, torch.full((3,), 0.25))
        adam.zero_grad()
        terms = job(batch)
        terms.total.backward()
        adam.step()
        cosines.append(float(-terms.sum_E[1]) / 4)
    assert cosines[-1] > cosines[0] + 0.05


@pytest.mark.usefixtures("needs_diffusers")
def test_options_it_refuses() -> None:
    for options, message in (
        ({"bla": 1}, "QG-CFG-120.*bla"),
        ({"in_channels": 3}, "QG-CFG-120.*comes from the images"),
        ({**OPTIONS, "up_block_types": ["UpBlock2D"]}, "QG-CFG-120"),
    ):
        with pytest.raises(RecipeError, match=message):
            build_backbone(BackboneSettings(kind="diffusers", diffusers=options), (1, 8, 8), 5, 0)


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(EnvironmentProblem, match=r"QG-ENV-005.*quietgoose\[images\]"):
        build_backbone(SETTINGS, (1, 8, 8), 5, 0)
