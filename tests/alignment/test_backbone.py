"""SiT-down: the published sizes, shapes on every even grid, taps, and what the alignment's gradient reaches."""

from __future__ import annotations

import pytest
import torch
from quietgoose.alignment.backbone import PRESETS, SiTDown, build_backbone, shape_of
from quietgoose.alignment.blocks import axial_rope, hidden_width, rotate
from quietgoose.alignment.model_settings import AlignSettings, BackboneSettings
from quietgoose.alignment.projector import Projector
from quietgoose.alignment.taps import describe_tap, resolve_tap
from quietgoose.base.errors import RecipeError
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

SMALL = BackboneSettings(preset="nano", width=32, heads=2)


def awake(model: nn.Module, seed: int = 0) -> nn.Module:
    """Zero initialisations moved off zero, so that every part shows in the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def inputs(shape: tuple[int, int, int] = (1, 8, 8), rows: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(rows, *shape, generator=generator), torch.rand(rows, generator=generator), torch.arange(rows)


@pytest.mark.parametrize(("name", "millions"), [("B", 199.7), ("L", 686.6), ("XL", 954.4)])
def test_parameters_of_the_published_models(name: str, millions: float) -> None:
    """Within 0.5 %, and exactly the arithmetic of u-repa.md 1.1 (fixed positions counted, as there)."""
    with torch.device("meta"):
        unet = build_backbone(BackboneSettings(preset=name), (4, 32, 32), 1000, 0)
        width, grid = unet.tap_shape(unet.auto_tap())
        projector = Projector(AlignSettings(), width, grid, 768, (16, 16))
    total = sum(p.numel() for module in (unet, projector) for p in module.parameters()) + 256 * width
    d, h, (e, m, k) = width, hidden_width(width), PRESETS[name].blocks
    block = (4 * d * d + 4 * d) + (3 * d * h + 2 * h + d) + (6 * d * d + 6 * d)
    want = (e + m + k) * block + (k + 1) * (2 * d * d + d) + 9 * d * (d // 4) + 9 * d * 4 * d
    want += 256 * d + d + d * d + d + 1001 * d + (16 * d + d) + 256 * d + (2 * d * d + 2 * d + 16 * d + 16)
    want += d * 2048 + 2048 + 2048**2 + 2048 + 2048 * 768 + 768
    assert total == want
    assert abs(total / 1e6 / millions - 1) < 0.005


@pytest.mark.parametrize(("name", "number"), [("B", 8), ("L", 16), ("XL", 18), ("tiny", 6)])
def test_the_default_tap_lies_in_the_middle_of_the_middle(name: str, number: int) -> None:
    """Block 8 of XL, REPA's, would be an encoder block."""
    with torch.device("meta"):
        unet = build_backbone(BackboneSettings(preset=name), (4, 32, 32), 10, 0)
    tap = resolve_tap(unet, "auto")
    assert unet.tap_names().index(tap) + 1 == number
    assert unet.tap_shape(tap)[1] == (8, 8)
    assert resolve_tap(unet, str(number)) == tap
    assert describe_tap(unet, tap).startswith(f"{tap} (block {number} of ")
    with pytest.raises(RecipeError, match=r"QG-CFG-121.*1 to"):
        resolve_tap(unet, "99")
    with pytest.raises(RecipeError, match=r"Did you mean 'middle.1'"):
        resolve_tap(unet, "midle.1")


@pytest.mark.parametrize("sides", [(2, 2), (4, 4), (6, 10), (8, 2)])
def test_down_and_up_keep_every_even_grid(sides: tuple[int, int]) -> None:
    unet = awake(build_backbone(SMALL, (2, *sides), 4, 0))
    x, t, y = inputs((2, *sides))
    assert unet(x, t, y).shape == x.shape
    inner = (sides[0] // 2) * (sides[1] // 2)
    assert unet(x, t, y, tap="middle.0")[1].shape == (3, inner, 32)
    assert unet(x, t, y, tap="decoder.0")[1].shape == (3, 4 * inner, 32)


def test_shapes_that_cannot_be_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"QG-CFG-120.*7x8.*multiples of 2"):
        build_backbone(SMALL, (1, 7, 8), 10, 0)
    with pytest.raises(RecipeError, match=r"blocks.*encoder and decoder alike"):
        shape_of(BackboneSettings(blocks=[1, 2, 3]))
    with pytest.raises(RecipeError, match="multiple of 4"):
        shape_of(BackboneSettings(width=36, heads=6))


def test_it_begins_as_zero_velocity_and_depends_on_everything_later() -> None:
    fresh = build_backbone(SMALL, (1, 8, 8), 10, 0)
    x, t, y = inputs()
    assert float(fresh(x, t, y).detach().abs().max()) == 0.0
    unet = awake(fresh)
    base = unet(x, t, y)
    for changed in (unet(x + 0.5, t, y), unet(x, t * 0.3, y), unet(x, t, y + 4), unet(x, t, torch.full_like(y, 10))):
        assert float((changed - base).detach().abs().max()) > 1e-4
    rows = torch.cat([unet(x[b : b + 1], t[b : b + 1], y[b : b + 1]) for b in range(3)])
    assert torch.allclose(rows, base, atol=1e-5)


def test_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = build_backbone(SMALL, (1, 8, 8), 10, 3)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second, third = build_backbone(SMALL, (1, 8, 8), 10, 3), build_backbone(SMALL, (1, 8, 8), 10, 4)
    assert torch.equal(state, torch.get_rng_state())
    pairs = list(zip(first.parameters(), second.parameters(), third.parameters()))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert any(not torch.equal(a, c) for a, _, c in pairs)


@pytest.mark.parametrize("merge", ["enc_out", "patch_embed", "none"])
def test_the_merge_after_the_upsampling(merge: str) -> None:
    settings = BackboneSettings(preset="nano", width=32, heads=2, extra_merge=merge)  # type: ignore[arg-type]
    unet = awake(build_backbone(settings, (1, 8, 8), 10, 0))
    assert (unet.merge is None) == (merge == "none")
    assert unet(*inputs()).shape == (3, 1, 8, 8)


def test_recomputing_activations_changes_no_gradient() -> None:
    grads = []
    for wanted in (False, True):
        unet = awake(build_backbone(SMALL, (1, 8, 8), 10, 0))
        unet.activation_checkpointing = wanted
        unet(*inputs()).square().sum().backward()
        grads.append([p.grad for p in unet.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_rope_turns_by_rows_and_columns_and_knows_differences_only() -> None:
    grid, head = (3, 5), 8
    rope = axial_rope(head, grid)
    q, k = torch.randn(head), torch.randn(head)

    def score(a: int, b: int) -> float:
        turned = [rotate(v.expand(1, 1, 15, head), rope)[0, 0, n] for v, n in ((q, a), (k, b))]
        return float(turned[0] @ turned[1])

    assert score(0, 1) == pytest.approx(score(5, 6), abs=1e-5)  # one column to the right, in any row
    assert score(0, 5) == pytest.approx(score(7, 12), abs=1e-5)  # one row down, in any column
    assert score(0, 1) != pytest.approx(score(0, 5), abs=1e-3)


def gradients(unet: SiTDown, projector: Projector, tap: str) -> tuple[set[str], set[str]]:
    """Parts of the U-Net (and the projector) that a loss on the tapped tokens reaches."""
    x, t, y = inputs()
    projector(unet(x, t, y, tap=tap)[1], t).square().sum().backward()
    reached = {n for n, p in unet.named_parameters() if p.grad is not None and bool(p.grad.abs().max() > 0)}
    return reached, {n for n, p in projector.named_parameters() if p.grad is not None}


def test_the_alignment_reaches_the_projector_and_what_lies_before_the_tap() -> None:
    unet = awake(build_backbone(BackboneSettings(preset="nano", width=32, heads=2, blocks=[2, 3, 2]), (1, 8, 8), 10, 0))
    tap = unet.auto_tap()
    projector = Projector(AlignSettings(hidden=16), *unet.tap_shape(tap), 6, (8, 8))
    reached, projected = gradients(unet, projector, tap)
    assert tap == "middle.1"
    heads = {
        name.split(".")[0] if "." not in name.partition(".")[2] else ".".join(name.split(".")[:2]) for name in reached
    }
    assert {n.split(".")[0] for n in heads} == {"patches", "time", "label", "encoder", "down", "middle"}
    assert not any(name.startswith("middle.2") for name in reached)
    assert projected == {name for name, _ in projector.named_parameters()}


@pytest.mark.parametrize("order", ["before", "inside", "after"])
@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_orders_of_projecting_and_upsampling(order: str, kind: str) -> None:
    if (order, kind) == ("inside", "conv"):
        return
    settings = AlignSettings(hidden=16, order=order, projector=kind, time_aware=True)  # type: ignore[arg-type]
    torch.manual_seed(0)
    projector = Projector(settings, 12, (2, 3), 5, (4, 6))
    tokens, t = torch.randn(2, 6, 12), torch.tensor([0.1, 0.9])
    made = projector(tokens, t)
    assert made.shape == (2, 24, 5)
    assert projector.time is not None
    assert torch.equal(made, projector(tokens, 1 - t))  # begins as the identity in t
    awake(projector.time)
    assert not torch.equal(projector(tokens, t), projector(tokens, 1 - t))


def test_projecting_first_costs_less_and_is_another_function() -> None:
    flops, outputs = {}, {}
    for order in ("before", "inside", "after"):
        torch.manual_seed(0)
        projector = Projector(AlignSettings(hidden=32, order=order), 16, (4, 4), 8, (8, 8))
        torch.manual_seed(1)
        tokens = torch.randn(2, 16, 16)
        with FlopCounterMode(display=False) as counter:
            outputs[order] = projector(tokens, torch.rand(2))
        flops[order] = counter.get_total_flops()
    assert flops["after"] < flops["inside"] < flops["before"]
    assert flops["before"] == 4 * flops["after"]
    assert not torch.allclose(outputs["before"], outputs["after"], atol=1e-4)  # SiLU is not linear
