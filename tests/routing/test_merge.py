"""Merges: the product mean is exact; TIES and DARE are PEFT's, checked against the products they should give."""

from __future__ import annotations

import pytest
import torch
from quietgoose.base.errors import RecipeError
from quietgoose.routing.library import ExpertLibrary
from quietgoose.routing.merge import mean_of_products, peft_merge
from quietgoose.routing.model import attach


def product(expert, site: str) -> torch.Tensor:
    adapter = expert.adapters[site]
    return adapter.scale * adapter.b_OR @ adapter.a_RI


def test_mean_of_products_is_exact_and_not_the_product_of_means(model, mixed, equal, tokens) -> None:
    for library in (mixed, equal):
        merged = mean_of_products(library)
        for site in library.sites:
            want = sum(product(e, site) for e in library if site in e.adapters) / len(library)
            torch.testing.assert_close(product(merged, site), want, rtol=1e-4, atol=1e-5)
            assert merged.card.scale_at(site) == 1.0
            assert merged.card.rank_at(site) == merged.adapters[site].a_RI.shape[0]
        uniform = attach(model, library, "uniform")(tokens).logits
        alone = attach(model, ExpertLibrary([merged]), "expert:merged")(tokens).logits
        torch.testing.assert_close(alone, uniform, rtol=1e-4, atol=1e-4)
    site = equal.sites[0]
    apart = torch.stack([e.adapters[site].b_OR for e in equal]).mean(0) @ torch.stack(
        [e.adapters[site].a_RI for e in equal]
    ).mean(0)
    assert not torch.allclose(product(mean_of_products(equal), site), apart * 2.0, atol=1e-2)


def test_ties_on_products_equals_a_plain_implementation(model, new_expert) -> None:
    """Trim to the largest half, elect signs by summed value, average the agreeing ones (TIES, eq. 1-3), then SVD."""
    library = ExpertLibrary(new_expert(model, n, rank=r, targets=("k_proj",)) for n, r in (("ant", 2), ("bee", 5)))
    merged = peft_merge(library, "ties_svd", density=0.5)
    for site in library.sites:
        trimmed = []
        for expert in library:
            flat = product(expert, site).flatten()
            keep = flat.abs().topk(int(flat.numel() * 0.5)).indices
            trimmed.append(torch.zeros_like(flat).index_copy(0, keep, flat[keep]) / 2)
        stacked = torch.stack(trimmed)
        agree = (stacked.sign() == torch.where(stacked.sum(0) >= 0, 1.0, -1.0)) & (stacked != 0)
        want = (stacked * agree).sum(0) / agree.sum(0).clamp(min=1)
        u, s, v = torch.linalg.svd(want.view(12, 24), full_matrices=False)
        want = u[:, :5] * s[:5] @ v[:5]
        torch.testing.assert_close(product(merged, site), want, rtol=1e-3, atol=1e-4)


def test_dare_keeps_the_mean_at_density_one_and_follows_its_seed(model, new_expert) -> None:
    library = ExpertLibrary(new_expert(model, n, rank=3, targets=("q_proj",)) for n in ("ant", "bee"))
    state = torch.get_rng_state()
    first, again, other = (peft_merge(library, "dare_linear", 0.6, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert first.tensor_hash() == again.tensor_hash() != other.tensor_hash()
    full = peft_merge(library.restrict(["ant"]).add(library["bee"]), "dare_linear_svd", 1.0)
    exact = mean_of_products(library)
    for site in library.sites:
        u, s, v = torch.linalg.svd(product(exact, site), full_matrices=False)
        torch.testing.assert_close(product(full, site), u[:, :3] * s[:3] @ v[:3], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["ties", "dare_ties"])
def test_merges_apart_need_one_rank_and_one_target_set(model, new_expert, mixed, kind) -> None:
    library = ExpertLibrary([new_expert(model, "ant", rank=2), new_expert(model, "bee", rank=3)])
    with pytest.raises(RecipeError, match=rf"CFG-025.*{kind}_svd"):
        peft_merge(library, kind)
    with pytest.raises(RecipeError, match=r"CFG-025.*lacks some sites"):
        peft_merge(mixed, kind)
    with pytest.raises(RecipeError, match=r"CFG-025.*Did you mean 'ties'"):
        peft_merge(library, "tise")
    with pytest.raises(RecipeError, match=r"CFG-025.*density"):
        peft_merge(library, kind, density=0)
    with pytest.raises(RecipeError, match=r"CFG-021"):
        mean_of_products(ExpertLibrary())


def test_a_merge_opens_anywhere_an_expert_does(model, equal, tokens) -> None:
    merged = peft_merge(equal, "ties", density=0.5)
    assert merged.card.rank == 4
    logits = attach(model, equal.add(merged), "expert:ties")(tokens).logits
    assert torch.isfinite(logits).all()
