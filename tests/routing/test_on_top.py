"""A LoRA on top: it is that LoRA, over whatever lies below, and below nothing changes."""

from __future__ import annotations

import copy

import pytest
import torch
from quietgoose.base.errors import QuietGooseError
from quietgoose.routing.expert import ExpertCard
from quietgoose.routing.library import ExpertLibrary
from quietgoose.routing.model import attach, detach, state
from quietgoose.routing.on_top import FlatLora, TopLora, as_expert, flat_of
from quietgoose.routing.sites import AdapterLayout, all_sites, find_sites

TOKENS = torch.arange(2, 18).reshape(2, 8)
CARD = ExpertCard("thoughts", 3, 6.0, ("all-linear",))


def random_flat(layout: AdapterLayout, seed: int = 0) -> torch.Tensor:
    return torch.randn(layout.numel, generator=torch.Generator().manual_seed(seed)) * 0.2


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def test_over_the_base_it_is_that_expert(new_model) -> None:
    layout = AdapterLayout.uniform(all_sites(new_model()), 3)
    flat = random_flat(layout)
    expert = as_expert(CARD, layout, flat)
    assert torch.equal(flat_of(expert, layout), flat)
    model, other = new_model(), new_model()
    top = TopLora(model, layout, CARD.scale_at(""))
    plain = logits(model)
    top.use(flat)
    attach(other, ExpertLibrary([expert]), "expert:thoughts", 1)
    torch.testing.assert_close(logits(model), logits(other), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(model), plain, atol=1e-3)
    top.use(None)
    assert torch.equal(logits(model), plain)


def test_over_routed_experts_it_adds_its_own_product(model, equal) -> None:
    attach(model, equal, "phatgoose", 2)
    routed = logits(model)
    sites = find_sites(model, ["q_proj"])[:1]
    layout = AdapterLayout.uniform(sites, 3)
    flat = random_flat(layout)
    module = state(model).modules[sites[0].name]
    x = torch.randn(2, 5, sites[0].in_features)
    with torch.no_grad():
        before = module(x)
        top = TopLora(model, layout, 2.0)
        with top.bound(flat):
            after = module(x)
            assert not torch.allclose(logits(model), routed)
    ((a, b),) = layout.unflatten(flat).values()
    torch.testing.assert_close(after, before + 2.0 * x @ a.T @ b.T, rtol=1e-5, atol=1e-5)
    assert torch.equal(logits(model), routed), "outside the block it is off"
    assert state(model).bank(sites[0].name) is not None, "the router still finds its bank"


def test_gradients_reach_the_vector_and_nothing_else(model, equal) -> None:
    attach(model.requires_grad_(False), equal, "phatgoose", 2)
    layout = AdapterLayout.uniform(all_sites(model), 3)
    lora = FlatLora(layout, "thoughts", 0)
    top = TopLora(model, layout, 1.0)
    with top.bound(lora()):
        model(TOKENS).logits.square().mean().backward()
    gradient = lora.flat_P.grad
    assert gradient is not None
    pairs = layout.unflatten(gradient)
    assert all(bool(b.abs().sum() > 0) for _, b in pairs.values()), "B is zero at first and must move"
    assert all(p.grad is None for p in model.parameters())


def test_initial_numbers_do_nothing_and_depend_on_seed_and_site_only(new_model) -> None:
    model = new_model()
    sites = all_sites(model)
    plain = logits(model)
    few, many = (FlatLora(AdapterLayout.uniform(chosen, 2), "thoughts", 7) for chosen in (sites[:2], sites))
    shared = few.flat_P.numel()
    assert torch.equal(few.flat_P, many.flat_P[:shared])
    top = TopLora(model, AdapterLayout.uniform(sites, 2), 1.0)
    with top.bound(many()):
        assert torch.equal(logits(model), plain)
    detach(model)
    assert torch.equal(logits(model), plain)


def test_a_vector_of_another_layout_is_refused(new_model) -> None:
    model = new_model()
    top = TopLora(model, AdapterLayout.uniform(all_sites(model), 2), 1.0)
    with pytest.raises(QuietGooseError, match="RTE-004"):
        top.use(torch.zeros(5))


def attached(new_model, equal) -> tuple[torch.nn.Module, TopLora]:
    """Routed experts, and a LoRA on top for good."""
    model = new_model()
    attach(model, equal, "phatgoose", 2)
    layout = AdapterLayout.uniform(all_sites(model), 3)
    top = TopLora(model, layout, 2.0)
    top.use(random_flat(layout))
    return model, top


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_it_is_cast_with_the_model(new_model, equal, dtype) -> None:
    """The numbers of a model that had this dtype before the LoRA came, and still what it was behind `bound`."""
    model, top = attached(new_model, equal)
    keys = set(model.state_dict())
    model.to(dtype)
    assert set(model.state_dict()) == keys
    assert not any("kept_P" in key for key in keys), "the LoRA has a file of its own"
    other = new_model()
    attach(other, equal, "phatgoose", 2)
    other.to(dtype)
    late = TopLora(other, top.layout, 2.0)
    late.use(random_flat(top.layout))
    assert torch.equal(logits(model), logits(other))
    with top.bound(None), late.bound(None):
        off = logits(other)
        assert torch.equal(logits(model), off)
        model.float()
        assert torch.equal(logits(model), logits(other.float())), "casting does not switch it on"
    assert not torch.allclose(logits(model), off.float(), atol=1e-3)
    with top.bound(random_flat(top.layout).requires_grad_()):
        assert model(TOKENS).logits.dtype == torch.float32
    assert torch.equal(logits(model), logits(other))


def test_it_moves_with_the_model(new_model, equal) -> None:
    model, top = attached(new_model, equal)
    model.to("meta")
    assert model(TOKENS.to("meta")).logits.is_meta
    top.use(torch.zeros(top.layout.numel))
    assert model(TOKENS.to("meta")).logits.is_meta, "a vector is brought to where the model is"


def test_a_copied_model_has_a_lora_of_its_own(new_model, equal) -> None:
    model, top = attached(new_model, equal)
    before = logits(model)
    twin = copy.deepcopy(model)
    top.use(None)
    twin.double()
    assert not torch.equal(logits(model), before)
    torch.testing.assert_close(logits(twin).float(), before, rtol=1e-4, atol=1e-5)
