"""Sites that read one input share their work: same numbers, made once, nothing left behind; kernels equal the twin."""

from __future__ import annotations

import copy

import pytest
import torch
from quietgoose.kernels.testing import assert_close
from quietgoose.routing.library import ExpertLibrary
from quietgoose.routing.model import attach, detach, set_router, state
from quietgoose.routing.shared import SharedBank, sharing_groups
from torch.utils.checkpoint import checkpoint

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def banks(model) -> list[SharedBank]:
    return [m for m in model.modules() if isinstance(m, SharedBank)]


def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[SharedBank, str]]:
    """Every making of parts from now on, as (bank, what)."""
    made: list[tuple[SharedBank, str]] = []
    for name in ("_linears", "_hidden", "_grouped"):
        own = getattr(SharedBank, name)

        def counted(self, x, own=own, name=name):
            made.append((self, name))
            return own(self, x)

        monkeypatch.setattr(SharedBank, name, counted)
    return made


@pytest.fixture
def small(new_model, new_expert):
    """One layer on the device (the interpreter takes its time), and experts of mixed ranks and sites."""
    model = new_model(num_hidden_layers=1)
    first = "model.layers.0.self_attn.q_proj"
    library = ExpertLibrary(
        [
            new_expert(model, "ant", rank=1, alpha=1),
            new_expert(model, "bee", rank=9, rslora=True, targets=("q_proj", "down_proj")),
            new_expert(model, "cat", rank=3, targets=("q_proj", "v_proj", "gate_proj"), rank_pattern={first: 5}),
        ]
    )
    return model.to(DEVICE), library


def test_groups_by_the_names_of_model_families() -> None:
    llama = [f"layers.0.self_attn.{n}" for n in ("q_proj", "k_proj", "v_proj", "o_proj")]
    mlp = [f"layers.0.mlp.{n}" for n in ("gate_proj", "up_proj", "down_proj")]
    assert sharing_groups([*llama, *mlp]) == [tuple(llama[:3]), (llama[3],), tuple(mlp[:2]), (mlp[2],)]
    t5 = ["block.0.layer.1.EncDecAttention.q", "block.0.layer.1.EncDecAttention.k", "block.0.layer.0.SelfAttention.v"]
    assert sharing_groups(t5) == [(name,) for name in t5]
    assert sharing_groups(["x.v_proj", "x.q_proj", "y.q_proj", "q_proj"]) == [
        ("x.q_proj", "x.v_proj"), ("y.q_proj",), ("q_proj",),
    ]  # fmt: skip


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_one_making_a_group_and_nothing_left(small, tokens, monkeypatch, implementation) -> None:
    model, library = small
    attach(model, library, implementation=implementation)
    made = calls(monkeypatch)
    with torch.no_grad():
        model(tokens[:1, :2].to(DEVICE))
    assert len(made) == len(banks(model)) == 4
    assert {name for _, name in made} == {"_linears" if implementation == "triton" else "_hidden"}
    assert all(bank._input is None for bank in banks(model))


def test_the_table_is_asked_with_the_dtype_and_the_widest_rank(small, tokens, monkeypatch) -> None:
    """A program of `grouped` holds a whole rank: wide ones are another formulation's."""
    model, library = small
    attach(model, library, implementation="triton")
    asked: list[tuple] = []
    monkeypatch.setattr("quietgoose.routing.shared.formulation", lambda *size: asked.append(size) or "stock")
    monkeypatch.setattr("quietgoose.routing.shared.by_pairs", lambda *size: bool(asked.append(size)))
    with torch.no_grad():
        model(tokens[:1, :2].to(DEVICE))
    want = {(2, max(b.shape.slots), b.a_RI.shape[1], True, b.shape.widest) for b in banks(model)}
    assert {size[-1] for size in want} == {1, 3, 9}
    assert set(asked) == want
    asked.clear()
    model(tokens[:1, :2].to(DEVICE))
    assert set(asked) == want


@pytest.mark.parametrize(
    ("router", "method"),
    [
        ("phatgoose", "decode"),
        ("phatgoose", "fused"),
        ("phatgoose", "stock"),
        ("arrow", "grouped"),
        ("arrow", "decode"),
    ],
)
def test_kernels_equal_the_plain_model(small, tokens, monkeypatch, router, method) -> None:
    monkeypatch.setattr("quietgoose.routing.shared.formulation", lambda *_: method)
    monkeypatch.setattr("quietgoose.routing.shared.by_pairs", lambda *_: method == "grouped")
    model, library = small
    tokens = tokens[:1, :3].to(DEVICE)
    with torch.no_grad():
        want = attach(model, library, router, implementation="reference")(tokens).logits
        got = attach(model, library, router, implementation="triton")(tokens).logits
    assert_close("logits", got, want, limit=1e-5)


@pytest.mark.parametrize("method", ["split", "split_fused"])
def test_one_product_of_the_library_routes_a_16_bit_model(small, tokens, monkeypatch, method) -> None:
    """A and gates stay parts of one matrix when the model is cast, and when it is given another router."""
    model, library = small
    tokens = tokens[:1, :3].to(DEVICE)
    attach(model, library, implementation="triton")
    model.half()
    for router in ("phatgoose", "arrow"):
        set_router(model, router)
        for bank in banks(model):
            whole = bank.stack_PI.untyped_storage().data_ptr()
            parts = (bank.a_RI, bank.high_ZI, bank.low_ZI)
            assert all(part.untyped_storage().data_ptr() == whole for part in parts)
        found = []
        for name in ("stock", method):
            monkeypatch.setattr("quietgoose.routing.shared.formulation", lambda *_, n=name: n)
            with torch.no_grad():
                found.append(model(tokens).logits)
        assert_close(router, found[1], found[0].double(), limit=5e-3)


def test_a_bias_that_only_some_sites_of_a_group_have(small, tokens) -> None:
    model, library = small
    attention = model.model.layers[0].self_attn
    for name in ("q_proj", "v_proj"):  # as in Whisper: k has none
        linear = getattr(attention, name)
        linear.bias = torch.nn.Parameter(torch.linspace(-1, 1, linear.out_features, device=DEVICE))
    tokens = tokens[:1, :2].to(DEVICE)
    with torch.no_grad():
        want = attach(model, library, implementation="reference")(tokens).logits
        got = attach(model, library, implementation="triton")(tokens).logits
    assert_close("logits", got, want, limit=1e-5)


def test_choices_are_those_of_the_twin(small) -> None:
    model, mixed = small
    found: dict[str, list[torch.Tensor]] = {}
    for implementation in ("reference", "triton"):
        attach(model, mixed, k=3, implementation=implementation)
        for name, module in state(model).modules.items():
            x = torch.randn(50, module.in_features, generator=torch.Generator().manual_seed(1)).to(DEVICE)
            routing = module.route(x)
            assert routing.index_TK.dtype == torch.int64
            found.setdefault(name, []).extend(routing)
    for name, (weights, index, kernel_weights, kernel_index) in found.items():
        assert torch.equal(index, kernel_index), name
        torch.testing.assert_close(weights, kernel_weights, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["fused", "grouped"])
def test_gradients_of_the_kernels_equal_the_twins(small, tokens, monkeypatch, method) -> None:
    """With respect to the input embeddings, through routing and experts of all layers."""
    monkeypatch.setattr("quietgoose.routing.shared.formulation", lambda *_: method)
    monkeypatch.setattr("quietgoose.routing.shared.by_pairs", lambda *_: method == "grouped")
    model, mixed = small
    embeds = model.model.embed_tokens(tokens[:1, :3].to(DEVICE)).detach()
    gradients = []
    for implementation in ("reference", "triton"):
        attach(model, mixed, implementation=implementation)
        x = embeds.clone().requires_grad_()
        model(inputs_embeds=x).logits.square().mean().backward()
        gradients.append(x.grad)
    assert_close("embeddings", gradients[1], gradients[0], dtype=torch.float32, direction="gradient")


def test_pairs_are_sorted_once_for_a_group_and_its_backward(small, tokens, monkeypatch) -> None:
    grouped = pytest.importorskip("quietgoose.kernels.routed_lora.grouped")
    sizes: list[tuple[int, ...]] = []
    sort = grouped.sort_pairs
    monkeypatch.setattr(
        grouped, "sort_pairs", lambda index, count: sizes.append(tuple(index.shape)) or sort(index, count)
    )
    monkeypatch.setattr("quietgoose.routing.shared.by_pairs", lambda *_: True)
    model, library = small
    attach(model, library, implementation="triton")
    x = model.model.embed_tokens(tokens[:1, :3].to(DEVICE)).detach().requires_grad_()
    model(inputs_embeds=x).logits.square().mean().backward()
    assert sizes == [(3, 3, 2), (1, 3, 2), (2, 3, 2), (1, 3, 2)]  # q k v, o, gate up, down
    assert x.grad.abs().max() > 0


def test_places_of_slots_within_a_site_are_made_once(small) -> None:
    model, library = small
    attach(model, library)
    for bank in banks(model):
        count, first = bank.shape.num_experts, 0
        for position, slots in enumerate(bank.shape.slots):
            mine = slice(position * count, (position + 1) * count)
            for again, want in zip(bank._own_slots(position), (bank.start_Z[mine] - first, bank.rank_Z[mine])):
                assert torch.equal(again, want)
            first += slots
            assert all(a is b for a, b in zip(bank._own_slots(position), bank._own_slots(position)))
    model.to(torch.bfloat16)
    assert all(table.dtype == torch.int32 for bank in banks(model) for table in bank._own_slots(0))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_checkpointed_layers_give_the_same_gradients(small, implementation, reentrant) -> None:
    model, library = small
    attach(model, library, implementation=implementation)
    layer = model.model.layers[0]
    x = torch.randn(1, 5, 24, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    places = model.model.rotary_emb(x, torch.arange(5, device=DEVICE)[None])

    def run(x: torch.Tensor) -> torch.Tensor:
        out = layer(x, position_embeddings=places)
        return out[0] if isinstance(out, tuple) else out

    gradients = []
    for function in (run, lambda x: checkpoint(run, x, use_reentrant=reentrant)):
        leaf = x.clone().requires_grad_()
        function(leaf).square().sum().backward()
        gradients.append(leaf.grad)
        assert all(bank._input is None for bank in banks(model))
    # reentrant: the first pass runs without gradients, hence by the inference formulation, rounded otherwise
    assert_close("x", gradients[1], gradients[0], dtype=torch.float32, direction="gradient")


def test_a_site_that_is_fed_something_else_makes_its_own(model, equal) -> None:
    """As in cross attention: k sees another tensor; v never gets called. The parent's end drops what waits."""
    attach(model, equal)
    attention = model.model.layers[0].self_attn
    one, other = torch.randn(2, 3, 24), torch.randn(2, 3, 24)
    with torch.no_grad():
        alone = [attention.q_proj(one.clone()), attention.k_proj(other.clone())]
        together = [attention.q_proj(one), attention.k_proj(other)]
        for a, b in zip(alone, together):
            assert torch.equal(a, b)
        again = attention.q_proj(one)
        assert torch.equal(again, alone[0])
        bank = state(model).bank("model.layers.0.self_attn.q_proj").shared
        assert bank._input is not None
        places = model.model.rotary_emb(one, torch.arange(3)[None])
        attention(hidden_states=other, position_embeddings=places, attention_mask=None)
        assert bank._input is None


def test_inference_after_training_and_the_other_way_round(model, equal) -> None:
    """The same tensor object under another gradient mode is made anew."""
    attach(model, equal)
    attention = model.model.layers[0].self_attn
    x = torch.randn(2, 3, 24, requires_grad=True)
    with torch.no_grad():
        attention.q_proj(x)
    assert attention.k_proj(x).requires_grad
    attention.v_proj(x)
    y = attention.q_proj(x)
    with torch.no_grad():
        assert not attention.k_proj(x).requires_grad
    assert y.requires_grad


def test_hooks_go_with_the_experts(model, equal, tokens) -> None:
    before = [len(m._forward_hooks) for m in model.modules()]
    for _ in range(3):
        attach(model, equal)
    assert sum(len(m._forward_hooks) for m in model.modules()) == 2 * 2
    detach(model)
    assert [len(m._forward_hooks) for m in model.modules()] == before


def test_casting_a_routed_model_keeps_its_scores_in_fp32(model, mixed) -> None:
    attach(model, mixed)
    vectors = [bank.vectors_ZI.clone() for bank in banks(model)]
    model.to(torch.bfloat16)
    for bank, before in zip(banks(model), vectors):
        assert bank.a_RI.dtype == bank.b_RO_of(0).dtype == bank.high_ZI.dtype == torch.bfloat16
        assert torch.equal(bank.vectors_ZI, before)
        assert bank.absent_Z.dtype == bank.shift_Z.dtype == torch.float32
        whole = bank.high_ZI.double() + bank.low_ZI.double()
        assert_close("two parts", whole, before.double(), limit=2.0**-17)
    model.float()
    assert all(bank.high_ZI.numel() == 0 for bank in banks(model))


def test_a_copy_is_independent(model, equal, tokens) -> None:
    attach(model, equal)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        want = model(tokens).logits
        set_router(model, "arrow")
        assert torch.equal(twin(tokens).logits, want)
    assert len({id(bank) for m in (model, twin) for bank in banks(m)}) == 16


def test_banks_are_registered_once(model, equal) -> None:
    attach(model, equal)
    buffers = [b.data_ptr() for _, b in model.named_buffers() if b.numel()]
    assert len(buffers) == len(set(buffers))
    assert list(model.state_dict()) == [n for n in model.state_dict() if "adapter" not in n]


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_the_whole_forward_compiles_in_one_graph(small, tokens, implementation) -> None:
    model, library = small
    attach(model, library, implementation=implementation)
    tokens = tokens[:1, :3].to(DEVICE)
    counted: list[list[str]] = []

    def backend(graph, inputs):
        counted.append([str(node.target) for node in graph.graph.nodes])
        return graph.forward

    with torch.no_grad():
        want = model(tokens, use_cache=False).logits
        got = torch.compile(model, fullgraph=True, backend=backend)(tokens, use_cache=False).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert len(counted) == 1
    if implementation == "triton":
        assert sum("routed_linears" in target for target in counted[0]) == 4
