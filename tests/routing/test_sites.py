"""Targets mean what they mean in PEFT; flat vectors and their views are one memory."""

from __future__ import annotations

import peft
import pytest
import torch
from quietgoose.base.errors import RecipeError
from quietgoose.routing.model import attach, uninstall
from quietgoose.routing.sites import AdapterLayout, GateLayout, all_sites, find_sites, target_names


@pytest.mark.parametrize(
    "targets", [["all-linear"], ["q_proj"], ["mlp.up_proj", "v_proj"], ["model.layers.1.self_attn.o_proj"]]
)
def test_targets_select_what_peft_selects(new_model, targets) -> None:
    model = new_model()
    wanted = "all-linear" if targets == ["all-linear"] else targets
    theirs = peft.get_peft_model(new_model(), peft.LoraConfig(target_modules=wanted))
    adapted = {n for n, m in theirs.base_model.model.named_modules() if isinstance(m, peft.tuners.lora.Linear)}
    names = [site.name for site in find_sites(model, targets)]
    assert set(names) == adapted
    short = target_names(names, [s.name for s in all_sites(model)])
    assert [s.name for s in find_sites(model, short)] == names


def test_bad_targets_are_named(model) -> None:
    with pytest.raises(RecipeError, match=r"CFG-020.*'q_prj'.*Did you mean 'q_proj'"):
        find_sites(model, ["q_prj"])
    with pytest.raises(RecipeError, match=r"CFG-020.*LlamaRMSNorm"):
        find_sites(model, ["input_layernorm"])
    with pytest.raises(RecipeError, match=r"CFG-020.*output head"):
        find_sites(model, ["lm_head"])
    with pytest.raises(RecipeError, match=r"CFG-020.*empty"):
        find_sites(model, [])


def test_sites_of_a_routed_model_are_those_of_the_plain_one(model, equal) -> None:
    before = all_sites(model)
    attach(model, equal)
    assert all_sites(model) == before
    uninstall(model)
    assert all_sites(model) == before


def test_layouts_are_views_and_invert(model) -> None:
    sites = all_sites(model)
    layout = AdapterLayout(sites, tuple(1 + i % 3 for i in range(len(sites))))
    flat = torch.randn(layout.numel)
    views = layout.unflatten(flat)
    assert torch.equal(layout.flatten(views), flat)
    views[sites[3].name][1][0, 0] = 7.0
    assert (flat == 7.0).sum() == 1
    rows = layout.rows(torch.stack([flat, -flat]))
    assert torch.equal(rows[3][1][0], views[sites[3].name][1])
    gates = GateLayout(sites)
    vector = torch.randn(gates.numel)
    assert torch.equal(torch.cat(list(gates.unflatten(vector).values())), vector)
    assert sum(site.in_features for site in sites) == gates.numel
