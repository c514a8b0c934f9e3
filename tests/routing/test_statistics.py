"""Statistics equal a plain recount, leave padding out, and feed the average-activation router."""

from __future__ import annotations

import math

import pytest
import torch
from quietgoose.base.errors import DataError
from quietgoose.routing.model import attach, set_router, state
from quietgoose.routing.statistics import average_activation, collect, entropy, load, site_means, token_votes


def test_collect_reports_what_the_forward_used(model, mixed, tokens) -> None:
    attach(model, mixed, k=2)
    with torch.no_grad():
        before = model(tokens).logits
        routings = collect(model, {"input_ids": tokens})
        assert torch.equal(model(tokens).logits, before)
    assert set(routings) == set(mixed.sites)
    for site, routing in routings.items():
        held = [site in e.adapters for e in mixed]
        assert routing.index_TK.shape == (33, min(2, sum(held)))
        assert all(held[i] for i in routing.index_TK.unique().tolist())
    assert not any(m._forward_pre_hooks for m in state(model).modules.values())
    votes = token_votes(routings, 4)
    torch.testing.assert_close(votes.sum(1), torch.ones(33), rtol=0, atol=1e-4)
    recount = torch.zeros(33, 4)
    for routing in routings.values():
        for t in range(33):
            for w, i in zip(routing.weights_TK[t].tolist(), routing.index_TK[t].tolist()):
                recount[t, i] += w / len(routings)
    torch.testing.assert_close(votes, recount, rtol=1e-4, atol=1e-5)
    mask = torch.zeros(3, 11, dtype=torch.bool)
    mask[1, :4] = True
    torch.testing.assert_close(load(routings, 4, mask), votes[11:15].sum(0) / votes[11:15].sum())
    torch.testing.assert_close(load(routings, 4).sum(), torch.tensor(1.0))


def test_entropy_has_its_known_ends(model, equal, tokens) -> None:
    attach(model, equal, "uniform")
    assert entropy(collect(model, {"input_ids": tokens})) == pytest.approx(math.log(4), abs=1e-5)
    set_router(model, "expert:cat")
    routings = collect(model, {"input_ids": tokens})
    assert entropy(routings) == 0.0
    assert load(routings, 4).tolist() == [0, 0, 1, 0]


def test_means_leave_padding_out(model, equal, tokens) -> None:
    attach(model, equal, "expert:ant")
    mask = torch.ones(3, 11)
    mask[0] = 0
    batches = [({"input_ids": tokens[:2]}, mask[:2]), ({"input_ids": tokens[2:]}, mask[2:])]
    means = site_means(model, batches)
    seen: list[torch.Tensor] = []
    site = "model.layers.1.mlp.down_proj"
    handle = state(model).modules[site].register_forward_pre_hook(lambda m, a: seen.append(a[0].detach()))
    model(tokens)
    handle.remove()
    torch.testing.assert_close(means[site], seen[0][1:].flatten(0, 1).mean(0), rtol=1e-4, atol=1e-5)
    with pytest.raises(DataError, match=r"DATA-010"):
        site_means(model, [({"input_ids": tokens}, torch.zeros(3, 11))])


def test_average_activation_routes_an_experts_own_tokens_to_it(new_model, new_expert) -> None:
    """Two groups of tokens whose embeddings point opposite ways: each group's mean must win its own tokens."""
    model = new_model()
    direction = torch.randn(24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.model.embed_tokens.weight[:32] += 3 * direction
        model.model.embed_tokens.weight[32:] -= 3 * direction
    from quietgoose.routing.library import ExpertLibrary

    library = ExpertLibrary(new_expert(model, n, gates=False, strength=0.01) for n in ("ant", "bee"))
    attach(model, library, "uniform")
    g = torch.Generator().manual_seed(1)
    groups = {
        "ant": torch.randint(3, 32, (4, 9), generator=g),
        "bee": torch.randint(32, 64, (4, 9), generator=g),
    }
    batches = {name: [({"input_ids": group}, torch.ones(4, 9))] for name, group in groups.items()}
    vectors = average_activation(model, batches)
    set_router(model, "average_activation", k=1, vectors=vectors)
    for index, group in enumerate(groups.values()):
        routing = collect(model, {"input_ids": group})["model.layers.0.self_attn.q_proj"]
        assert float((routing.index_TK == index).float().mean()) > 0.95
