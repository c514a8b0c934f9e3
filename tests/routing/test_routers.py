"""Prepared vectors and the specification of the kernels' routing (`route_group`) together equal an independent fp64
implementation of phatgoose.md 1.3, and its invariants hold."""

from __future__ import annotations

import math

import pytest
import torch
from quietgoose.base.errors import RecipeError
from quietgoose.kernels.routed_lora import route_group
from quietgoose.kernels.routed_lora.layout import ABSENT
from quietgoose.routing.model import attach
from quietgoose.routing.routers import (
    Routing,
    arrow_vectors,
    gate_vectors,
    mean_vectors,
    phatgoose_mean_vectors,
    prepare_arrow,
    prepare_phatgoose,
    random_vectors,
    router_kind,
    standardise,
    uniform,
)


def chosen(
    x_TI: torch.Tensor,
    vectors_NI: torch.Tensor,
    k: int,
    present_N: torch.Tensor | None = None,
    projection: bool = False,
) -> Routing:
    """One site's weights and indices by prepared vectors."""
    absent_N = torch.zeros(len(vectors_NI)) if present_N is None else torch.where(present_N, 0.0, ABSENT)
    weights_STK, index_STK = route_group(x_TI, vectors_NI, absent_N, len(vectors_NI), k, projection)
    return Routing(weights_STK[0], index_STK[0])


def twin(x_TI: torch.Tensor, v_NI: torch.Tensor, k: int) -> tuple[list[list[float]], list[list[int]]]:
    """1.3 in plain Python floats, token by token."""
    weights, indices = [], []

    def norm(vector: list[float]) -> list[float]:
        mean = sum(vector) / len(vector)
        variance = sum((e - mean) ** 2 for e in vector) / len(vector)
        return [(e - mean) / math.sqrt(variance + 1e-5) for e in vector]

    gates = [norm(v) for v in v_NI.tolist()]
    for token in x_TI.tolist():
        x = norm(token)
        z = [sum(a * b for a, b in zip(x, v)) / math.sqrt(len(x)) for v in gates]
        top = max(z)
        e = [math.exp(value - top) for value in z]
        p = [value / sum(e) for value in e]
        chosen = sorted(range(len(p)), key=lambda i: (-z[i], i))[:k]
        total = sum(p[i] for i in chosen) + 1e-6
        weights.append([p[i] / total for i in chosen])
        indices.append(chosen)
    return weights, indices


def data(tokens: int = 50, width: int = 33, experts: int = 7, dtype: torch.dtype = torch.float64):
    g = torch.Generator().manual_seed(3)
    x = torch.randn(tokens, width, generator=g, dtype=dtype) * 3 + 1
    return x, torch.randn(experts, width, generator=g, dtype=dtype) * 0.2 + 0.1


@pytest.mark.parametrize("k", [1, 2, 7])
def test_phatgoose_equals_the_fp64_twin(k: int) -> None:
    x, v = data()
    weights, index = chosen(x, prepare_phatgoose(v), k)
    want_weights, want_index = twin(x, v, k)
    assert index.tolist() == want_index
    torch.testing.assert_close(weights, torch.tensor(want_weights, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_fp32_and_bf16_tokens_stay_close_to_fp64() -> None:
    x, v = data()
    exact, index = chosen(x, prepare_phatgoose(v), 2)
    single, single_index = chosen(x.float(), prepare_phatgoose(v.float()), 2)
    assert single.dtype == torch.float32
    assert torch.equal(index, single_index)
    torch.testing.assert_close(single.double(), exact, rtol=1e-4, atol=1e-6)
    half = x.to(torch.bfloat16)
    rounded, _ = chosen(half, prepare_phatgoose(v.float()), 2)
    again, _ = chosen(half.double(), prepare_phatgoose(v), 2)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded.double(), again, rtol=1e-4, atol=1e-6)


def test_shift_and_scale_of_tokens_leave_the_choice() -> None:
    x, v = data()
    prepared = prepare_phatgoose(v)
    _, index = chosen(x, prepared, 3)
    assert torch.equal(chosen(x + 17.0, prepared, 3).index_TK, index)
    assert torch.equal(chosen(x * 5.0, prepared, 3).index_TK, index)


def test_weights_are_the_softmax_over_the_chosen() -> None:
    x, v = data()
    weights, index = chosen(x, prepare_phatgoose(v), 2)
    scores = torch.nn.functional.layer_norm(x, x.shape[-1:]) @ prepare_phatgoose(v).t()
    torch.testing.assert_close(weights, scores.gather(1, index).softmax(1), rtol=0, atol=4e-6)
    torch.testing.assert_close(weights.sum(1), torch.ones(50, dtype=torch.float64), rtol=0, atol=1e-5)


def test_permuting_experts_permutes_the_index() -> None:
    x, v = data()
    order = torch.tensor([3, 1, 6, 0, 2, 5, 4])
    weights, index = chosen(x, prepare_phatgoose(v), 2)
    permuted = chosen(x, prepare_phatgoose(v[order]), 2)
    torch.testing.assert_close(permuted.weights_TK, weights, rtol=1e-12, atol=1e-14)
    assert torch.equal(order[permuted.index_TK], index)


def test_ties_go_to_the_lower_index() -> None:
    """Whole numbers, so that the products are exact and the ties real."""
    x = torch.randint(1, 4, (50, 8), generator=torch.Generator().manual_seed(0)).double()
    v = torch.ones(40, 8, dtype=torch.float64)
    v[7] = 2.0
    assert chosen(x, v, 3, projection=True).index_TK.tolist() == [[7, 0, 1]] * 50


def test_absent_experts_are_never_chosen() -> None:
    x, v = data()
    present = torch.tensor([False, True, False, True, True, False, True])
    weights, index = chosen(x, prepare_phatgoose(v), 2, present)
    alone = chosen(x, prepare_phatgoose(v[present]), 2)
    assert present[index].all()
    assert torch.equal(present.nonzero()[:, 0][alone.index_TK], index)
    torch.testing.assert_close(weights, alone.weights_TK, rtol=1e-12, atol=1e-12)
    for routing in (chosen(x, v, 2, present, projection=True), uniform(x, v, present)):
        assert (routing.weights_TK * ~present[routing.index_TK]).abs().max() == 0


def test_arrow_vector_is_the_top_right_singular_vector(model, new_expert) -> None:
    expert = new_expert(model, "ant", rank=5, targets=("up_proj",))
    for site, vector in arrow_vectors(expert).items():
        adapter = expert.adapters[site]
        want = torch.linalg.svd(adapter.b_OR.double() @ adapter.a_RI.double()).Vh[0]
        assert abs(float(want @ vector.double())) == pytest.approx(1.0, abs=1e-6)


def test_arrow_scores_the_absolute_projection() -> None:
    x, v = data()
    weights, index = chosen(x, prepare_arrow(v), 2, projection=True)
    scores = (x @ torch.nn.functional.normalize(v, dim=1).t()).abs() / 10
    assert torch.equal(index, scores.topk(2).indices)
    torch.testing.assert_close(weights, scores.topk(2).values.softmax(1), rtol=0, atol=5e-6)


def test_random_vectors_do_not_depend_on_the_other_experts(equal) -> None:
    all_of_them, some = random_vectors(equal, 1), random_vectors(equal.restrict(["cat"]), 1)
    site = equal.sites[0]
    assert torch.equal(all_of_them[site]["cat"], some[site]["cat"])
    assert not torch.equal(all_of_them[site]["cat"], random_vectors(equal, 2)[site]["cat"])
    assert not torch.equal(all_of_them[site]["cat"], all_of_them[site]["dog"])


def test_uniform_is_one_over_n() -> None:
    x, v = data()
    assert torch.equal(uniform(x, v).weights_TK, torch.full((50, 7), 1 / 7, dtype=torch.float64))


def test_unknown_router_and_missing_gates(equal, model, new_expert) -> None:
    with pytest.raises(RecipeError, match=r"CFG-023.*Did you mean 'phatgoose'"):
        router_kind("fatgoose")
    with pytest.raises(RecipeError, match=r"CFG-022.*eel has no gates"):
        gate_vectors(equal.add(new_expert(model, "eel", gates=False)))


def test_phatgoose_mean_scores_by_what_each_has_of_its_own(mixed) -> None:
    """Gate and mean each less what the site's experts share, in equal parts, whatever the lengths of the two."""
    means = {e.name: {s: torch.randn(v.shape) + 3 for s, v in e.gates.items()} for e in mixed}
    held = mixed.with_gates({e.name: e.gates for e in mixed}, means)
    vectors = phatgoose_mean_vectors(held)

    def unit(v_NI: torch.Tensor) -> torch.Tensor:
        return (v_NI - v_NI.mean(1, keepdim=True)) / v_NI.std(1, correction=0, keepdim=True)

    shared_sites = 0
    for site in held.sites:
        of = [e for e in held if site in e.gates]
        wanted = 0
        for parts in ([e.gates[site] for e in of], [means[e.name][site] for e in of]):
            standard = unit(torch.stack(parts).double())
            wanted = wanted + unit(standard - standard.mean(0) if len(of) > 1 else standard)
        shared_sites += len(of) > 1
        for expert, row in zip(of, wanted, strict=True):
            torch.testing.assert_close(vectors[site][expert.name].double(), row, rtol=1e-3, atol=1e-3)
            assert torch.equal(mean_vectors(held)[site][expert.name], means[expert.name][site])
    assert shared_sites
    scaled = held.with_gates(
        {e.name: {s: 1000 * v for s, v in e.gates.items()} for e in mixed},
        {name: {s: 50 * v for s, v in of.items()} for name, of in means.items()},
    )
    for site, of_expert in phatgoose_mean_vectors(scaled).items():
        for name, vector in of_expert.items():
            torch.testing.assert_close(vector, vectors[site][name], rtol=1e-3, atol=1e-3)
    alone = held.restrict([held.names[-1]])
    for site, of_expert in phatgoose_mean_vectors(alone).items():
        for name, vector in of_expert.items():
            wanted = standardise(alone[name].gates[site]) + standardise(means[name][site])
            torch.testing.assert_close(vector, wanted, rtol=1e-4, atol=1e-4)


def test_copies_of_one_expert_are_left_whole(equal, model) -> None:
    """They have nothing of their own; a site of copies scores by what they are, and is not refused as untrained."""
    gates = equal["ant"].gates
    means = {s: torch.randn(v.shape) for s, v in gates.items()}
    copies = equal.with_gates(dict.fromkeys(equal.names, gates), dict.fromkeys(equal.names, means))
    for site, of_expert in phatgoose_mean_vectors(copies).items():
        for vector in of_expert.values():
            torch.testing.assert_close(
                vector, standardise(gates[site]) + standardise(means[site]), rtol=1e-4, atol=1e-4
            )
    attach(model, copies.restrict(["ant", "bee"]), "phatgoose_mean")


def test_what_all_means_share_does_not_route(equal) -> None:
    """A large part that every expert's mean activation has in common, as real ones have, leaves the vectors as they are."""
    torch.manual_seed(0)
    site = equal.sites[0]
    width = equal["ant"].gates[site].shape[0]
    own = {name: torch.randn(width) for name in equal.names}
    own = {name: standardise(v) for name, v in own.items()}
    common = standardise(torch.randn(width))

    def held(shared: float):
        means = {e.name: {s: own[e.name] + shared * common if s == site else torch.randn(v.shape)
                          for s, v in e.gates.items()} for e in equal}  # fmt: skip
        return phatgoose_mean_vectors(equal.with_gates({e.name: e.gates for e in equal}, means))[site]

    plain, drowned = held(0.0), held(20.0)
    for name in equal.names:
        assert torch.cosine_similarity(plain[name], drowned[name], dim=0) > 0.9, name
