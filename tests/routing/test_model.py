"""The routed model: equals a naive loop, one expert equals PEFT's sum, rows are independent, cache and compile work."""

from __future__ import annotations

import pytest
import torch
from quietgoose.base.errors import ArtifactError, QuietGooseError, RecipeError
from quietgoose.base.files import sha256_tensors
from quietgoose.kernels.routed_lora import dense_weights, naive
from quietgoose.routing.library import ExpertLibrary
from quietgoose.routing.model import assign_rows, attach, detach, install, set_router, state
from quietgoose.routing.routed_linear import RoutedLinear


def merged_logits(model, library, weights: dict[str, float], tokens):
    """Logits with sum_i w_i s_i B_i A_i added to the weights themselves."""
    detach(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        for name, weight in weights.items():
            for site, adapter in library[name].adapters.items():
                update = weight * adapter.scale * adapter.b_OR @ adapter.a_RI
                model.get_submodule(site).weight += update
        logits = model(tokens).logits
        for name, parameter in model.named_parameters():
            parameter.copy_(before[name])
    return logits


@pytest.mark.parametrize("pool", ["equal", "mixed"])
@pytest.mark.parametrize("router", ["phatgoose", "random", "arrow", "uniform"])
def test_every_site_equals_the_naive_loop(model, request, tokens, pool: str, router: str) -> None:
    library: ExpertLibrary = request.getfixturevalue(pool)
    attach(model, library, router, k=2)
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def hook(module: RoutedLinear, arguments, output) -> None:
        seen[module.name] = (arguments[0].detach(), output.detach())

    handles = [m.register_forward_hook(hook) for m in state(model).modules.values()]
    with torch.no_grad():
        model(tokens)
    for handle in handles:
        handle.remove()
    assert set(seen) == set(library.sites)
    for site, (x, y) in seen.items():
        module = state(model).modules[site]
        routing = module.route(x)
        weights = dense_weights(routing.weights_TK, routing.index_TK, len(library))
        held = [(i, e.adapters[site]) for i, e in enumerate(library) if site in e.adapters]
        columns = weights[:, [i for i, _ in held]]
        x_TI = x.flatten(0, -2)
        want = module.base(x_TI) + naive(x_TI, [(a.a_RI, a.b_OR, a.scale) for _, a in held], columns)
        torch.testing.assert_close(y.flatten(0, -2), want, rtol=1e-5, atol=1e-5)
        absent = [i for i in range(len(library)) if i not in [j for j, _ in held]]
        assert weights[:, absent].abs().sum() == 0
        assert bool((columns > 0).sum(1).eq(min(2, len(held)) if router != "uniform" else len(held)).all())


def test_single_expert_equals_the_merged_weights(model, mixed, tokens) -> None:
    want = {name: merged_logits(model, mixed, {name: 1.0}, tokens) for name in mixed.names}
    attach(model, mixed, "phatgoose")
    for name in mixed.names:
        set_router(model, f"expert:{name}")
        torch.testing.assert_close(model(tokens).logits, want[name], rtol=1e-4, atol=1e-4)
    with assign_rows(set_router(model, "oracle"), ["cat", "ant", "dog"]):
        logits = model(tokens).logits
    for row, name in enumerate(("cat", "ant", "dog")):
        torch.testing.assert_close(logits[row], want[name][row], rtol=1e-4, atol=1e-4)


def test_one_expert_alone_takes_weight_one(model, equal, tokens) -> None:
    want = merged_logits(model, equal, {"bee": 1.0}, tokens)
    attach(model, equal.restrict(["bee"]), "phatgoose", k=2)
    torch.testing.assert_close(model(tokens).logits, want, rtol=1e-4, atol=1e-4)


def test_uniform_equals_the_product_mean(model, mixed, tokens) -> None:
    want = merged_logits(model, mixed, dict.fromkeys(mixed.names, 0.25), tokens)
    torch.testing.assert_close(attach(model, mixed, "uniform")(tokens).logits, want, rtol=1e-4, atol=1e-4)


def test_permuting_experts_changes_no_output(model, mixed, tokens) -> None:
    with torch.no_grad():
        want = attach(model, mixed)(tokens).logits
        got = attach(model, mixed.restrict(["dog", "bee", "ant", "cat"]))(tokens).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_detach_and_removal_restore_bit_for_bit(model, equal, new_expert, tokens) -> None:
    base_names, base_hash = list(model.state_dict()), sha256_tensors(dict(model.named_parameters()))
    with torch.no_grad():
        base = model(tokens).logits
        four = attach(model, equal)(tokens).logits
        hashes = {e.name: e.tensor_hash() for e in equal}
        five = attach(model, equal.add(new_expert(model, "eel")))(tokens).logits
        library = state(model).library
        again = attach(model, library.remove("eel"))(tokens).logits
        assert {e.name: e.tensor_hash() for e in library.remove("eel")} == hashes
        assert torch.equal(four, again)
        assert not torch.equal(four, five)
        assert not torch.equal(four, base)
        assert torch.equal(detach(model)(tokens).logits, base)
    assert list(model.state_dict()) == base_names
    assert sha256_tensors(dict(model.named_parameters())) == base_hash


def test_padded_batch_equals_single_rows(model, mixed) -> None:
    attach(model, mixed)
    rows = [torch.randint(3, 64, (n,), generator=torch.Generator().manual_seed(n)) for n in (4, 9, 1)]
    padded = torch.zeros(3, 9, dtype=torch.long)
    mask = torch.zeros(3, 9, dtype=torch.long)
    for i, row in enumerate(rows):
        padded[i, 9 - len(row) :], mask[i, 9 - len(row) :] = row, 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        together = model(padded, attention_mask=mask, position_ids=positions).logits
        for i, row in enumerate(rows):
            alone = model(row[None]).logits[0]
            torch.testing.assert_close(together[i, 9 - len(row) :], alone, rtol=1e-4, atol=1e-4)


def test_cached_generation_equals_the_full_forward(model, mixed, tokens) -> None:
    attach(model, mixed)
    out = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=8, do_sample=False, use_cache=True,
        output_logits=True, return_dict_in_generate=True, eos_token_id=None,
    )  # fmt: skip
    with torch.no_grad():
        full = model(out.sequences).logits[:, tokens.shape[1] - 1 : -1]
    torch.testing.assert_close(torch.stack(out.logits, dim=1), full, rtol=1e-4, atol=1e-4)
    assert torch.equal(full.argmax(-1), out.sequences[:, tokens.shape[1] :])


def test_oracle_generation_keeps_rows_apart(model, equal, tokens) -> None:
    attach(model, equal, "oracle")
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    with assign_rows(model, ["dog", "ant", "bee"]):
        mixed_rows = model.generate(tokens, attention_mask=torch.ones_like(tokens), **settings)
    for row, name in enumerate(("dog", "ant", "bee")):
        set_router(model, f"expert:{name}")
        one = model.generate(tokens[row : row + 1], attention_mask=torch.ones(1, 11, dtype=torch.long), **settings)
        assert torch.equal(one[0], mixed_rows[row])
    set_router(model, "oracle")
    with pytest.raises(QuietGooseError, match=r"RTE-002.*assign_rows"):
        model(tokens)
    with assign_rows(model, [0, 1]), pytest.raises(QuietGooseError, match=r"RTE-002.*2 rows.*33 tokens"):
        model(tokens)
    with pytest.raises(RecipeError, match=r"RTE-002"), assign_rows(model, [0, 4]):
        pass


@pytest.mark.parametrize("pool", ["equal", "mixed"])
def test_compiles_without_graph_breaks(model, request, tokens, pool: str) -> None:
    attach(model, request.getfixturevalue(pool))
    with torch.no_grad():
        want = model(tokens, use_cache=False).logits
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(tokens, use_cache=False).logits, want, rtol=1e-4, atol=1e-5)


def test_gradients_reach_tokens_through_experts_and_router(model, mixed) -> None:
    attach(model, mixed)
    module = state(model).modules["model.layers.0.self_attn.q_proj"].double()
    x = torch.randn(2, 3, 24, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(module, (x,), atol=1e-4, rtol=1e-3, eps=1e-7)


def test_bf16_base_computes_in_bf16_and_routes_in_fp32(model, mixed, tokens) -> None:
    attach(model.to(torch.bfloat16), mixed)
    module = state(model).modules["model.layers.0.mlp.down_proj"]
    x = torch.randn(5, 40, dtype=torch.bfloat16)
    assert module(x).dtype == torch.bfloat16
    assert module.route(x).weights_TK.dtype == torch.float32
    assert state(model).bank("model.layers.0.mlp.down_proj").a_RI.dtype == torch.bfloat16


def test_errors_name_the_cause(model, equal, new_model, new_expert, tokens) -> None:
    with pytest.raises(QuietGooseError, match=r"RTE-001"):
        set_router(model, "uniform")
    with pytest.raises(RecipeError, match=r"CFG-021.*Did you mean 'bee'"):
        attach(model, equal, "expert:beee")
    assert not any(isinstance(m, RoutedLinear) for m in model.modules())
    for router in ("average_activation", "phatgoose_mean"):
        with pytest.raises(RecipeError, match=r"CFG-022.*average_activation: expert ant has no mean activations"):
            attach(model, equal, router)
    with pytest.raises(RecipeError, match=r"CFG-024.*at least 1"):
        attach(model, equal, k=0)
    with pytest.raises(ArtifactError, match=r"EXP-002.*another base"):
        attach(new_model(hidden_size=32), equal)
    with pytest.raises(ArtifactError, match=r"EXP-002.*no such module"):
        attach(new_model(num_hidden_layers=1), equal)
    with pytest.raises(RecipeError, match=r"CFG-021.*empty"):
        attach(model, ExpertLibrary())
    zero = {site: torch.zeros(equal["ant"].adapters[site].a_RI.shape[1]) for site in equal.sites}
    with pytest.raises(ArtifactError, match=r"EXP-003.*zero"):
        equal["ant"].with_gates(zero)
    with pytest.raises(RecipeError, match=r"CFG-021.*two experts"):
        equal.add(new_expert(model, "ant"))
    attach(model, equal)
    vectors = {site: {n: equal[n].gates[site] for n in equal.names} for site in equal.sites}
    vectors[equal.sites[3]]["cat"] = torch.zeros_like(vectors[equal.sites[3]]["cat"])
    with pytest.raises(ArtifactError, match=r"EXP-003.*cat"):
        set_router(model, "phatgoose", vectors=vectors)


REFUSALS = {
    "an expert without gates": lambda m, lib, new, base: attach(m, lib.add(new(base(), "eel", gates=False))),
    "an unknown router": lambda m, lib, new, base: attach(m, lib, "phatgose"),
    "an unknown expert": lambda m, lib, new, base: attach(m, lib.remove("cat"), "expert:cat"),
    "no expert": lambda m, lib, new, base: attach(m, lib.restrict([])),
    "k of none": lambda m, lib, new, base: attach(m, lib, k=0),
    "a removal that was not": lambda m, lib, new, base: attach(m, state(m).library.remove("cow")),
    "another base": lambda m, lib, new, base: attach(m, lib.add(new(base(hidden_size=32), "eel"))),
    "a deeper base": lambda m, lib, new, base: attach(m, lib.add(new(base(num_hidden_layers=3), "eel"))),
    "a router that lacks its vectors": lambda m, lib, new, base: set_router(m, "average_activation"),
    "an unknown router alone": lambda m, lib, new, base: set_router(m, "arow"),
    "no experts a token": lambda m, lib, new, base: set_router(m, "random", k=0),
    "vectors that end half way": lambda m, lib, new, base: set_router(m, "random", vectors=half(lib)),
    "a stranger for every token": lambda m, lib, new, base: set_router(m, "expert:cow"),
}


def half(library: ExpertLibrary):
    """Other vectors than the experts' own, for all sites but the last."""
    return {site: {e.name: torch.ones_like(e.gates[site]) + e.adapters[site].a_RI[0] for e in library}
            for site in library.sites[:-1]}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_what_is_refused_leaves_the_model_as_it_was(model, equal, new_expert, new_model, tokens, case: str) -> None:
    attach(model, equal, "phatgoose", k=2)
    before = state(model)
    with torch.no_grad():
        want = model(tokens).logits
        with pytest.raises(QuietGooseError):
            REFUSALS[case](model, equal, new_expert, new_model)
        assert torch.equal(model(tokens).logits, want)
    assert state(model) is before
    assert (before.router, before.k, before.library) == ("phatgoose", 2, equal)
    assert dict(model.named_modules()).keys() >= before.modules.keys()
    assert all(model.get_submodule(site) is module for site, module in before.modules.items())


def test_what_is_refused_leaves_a_plain_model_plain(model, equal, tokens) -> None:
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(RecipeError, match=r"CFG-022"):
        attach(model, equal, "average_activation")
    with pytest.raises(ArtifactError, match=r"EXP-002"):
        install(model, ["model.layers.0.self_attn.q_proj", "model.norm"])
    assert [name for name, _ in model.named_modules()] == names
    assert not any(module._forward_hooks for module in model.modules())


def test_an_attach_again_leaves_one_hook_a_group(model, equal, tokens) -> None:
    attach(model, equal)
    hooks = sum(len(module._forward_hooks) for module in model.modules())
    assert hooks > 0
    attach(model, equal.remove("cat"))
    assert sum(len(module._forward_hooks) for module in model.modules()) == hooks
