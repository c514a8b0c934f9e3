"""The gradient pass over static copies is the pass over the tensors themselves: everything about captured chunks but the graphs,
which test_gpu.py has."""

from __future__ import annotations

import dataclasses
import warnings
import weakref
from typing import Any

import pytest
import torch
from quietgoose.base.errors import RecipeError
from quietgoose.kernels.testing import assert_close
from quietgoose.thoughts import captured_pass, graphs
from quietgoose.thoughts.anchors import chunk_size
from quietgoose.thoughts.captured_pass import ChunkPass, PassGraphs, standing_in
from quietgoose.thoughts.captured_prefix import PrefixGraphs, PrefixPass
from quietgoose.thoughts.config import preset
from quietgoose.thoughts.gradient import Stream, thought_loss
from quietgoose.thoughts.graphs import CannotCapture, Kept
from torch.utils._python_dispatch import TorchDispatchMode

from .naive import llama, packed, policy_of, qwen2
from .test_gradient import CONFIGS, DISTIL, SMALL, BoundPolicy, gradients, weights_of

LAYOUTS = ([[5, 4], [7], []], [[9], [3, 3], [2]], [[10], [10], [10]])
"""Rows of three micro-batches; those of the last are one document each, with the promise that goes with it."""


def losses(
    policy: Any, config: Any, options: dict, seeds: int = 3, steps: bool = True
) -> list[dict[str, torch.Tensor]]:
    """Value, sums, stats and gradients of micro-batches between which text, weights and trained numbers change."""
    found = []
    for seed in range(seeds):
        rows = packed(LAYOUTS[seed % 3], 10, seed=seed, unlabelled=seed % 2)
        weights = weights_of(config, rows) * (1 + seed)
        loss = thought_loss(policy, rows, config, weights, Stream(seed, seed), **options)
        found.append(
            {"total": loss.total.detach(), "sums": loss.sums, "stats": loss.stats, **gradients(policy, loss.total)}
        )
        if steps:
            with torch.no_grad():
                for parameter in [*policy.model.parameters(), *policy.parameters.parameters()]:
                    parameter.mul_(1.05)
    return found


def assert_alike(one: list[dict], two: list[dict], limit: float = 1e-9) -> None:
    for first, second in zip(one, two, strict=True):
        scale = max(float(x.norm()) for x in second.values())
        for key, want in second.items():
            assert float((first[key] - want).norm()) <= limit * max(float(want.norm()), 1e-2 * scale), key


@pytest.mark.parametrize("chunk", [None, 4, 3, 1])
@pytest.mark.parametrize("name", ["default", "paper", "rlp", "distil", "entropy bonus", "no policy", "entropy anchors"])
def test_equals_the_pass_without_copies(name: str, chunk: int | None) -> None:
    """Three micro-batches through one set of buffers; with 10 anchors, chunks of 4 and 3 have one that is filled up."""
    config = CONFIGS[name]
    want = losses(policy_of(llama(), config, wide=True), config, {"chunk": chunk})
    passes = PassGraphs()
    got = losses(policy_of(llama(), config, wide=True), config, {"chunk": chunk, "passes": passes})
    assert_alike(got, want)
    assert len(passes._passes._made) == 1, "one shape, whatever the text"
    assert all(float(g["meta_2D"].norm()) > 1e-4 for g in want) == config.trains_thoughts


def test_tied_embeddings_biases_and_fp32() -> None:
    config = CONFIGS["bounded"]
    want = losses(policy_of(qwen2(), config), config, {"chunk": 3})
    got = losses(policy_of(qwen2(), config), config, {"chunk": 3, "passes": PassGraphs()})
    assert_alike(got, want, limit=1e-6)


@pytest.mark.parametrize("chunk", [None, 4])
def test_adapters_that_are_bound_are_copied(chunk: int | None) -> None:
    """Each micro-batch brings a new tensor; its numbers reach the copy, the gradient its parameter."""
    config, found = CONFIGS["default"], []
    for passes in (None, PassGraphs()):
        plain = policy_of(llama(), config, wide=True)
        policy = BoundPolicy(plain.model, plain.parameters)
        policy.scale = policy.scale.detach().double().requires_grad_()
        for seed in range(3):
            rows = packed(LAYOUTS[seed], 10, seed=seed)
            loss = thought_loss(
                policy, rows, config, weights_of(config, rows), Stream(3, seed), chunk=chunk, passes=passes
            )
            (slope,) = torch.autograd.grad(loss.total, [policy.scale])
            found.append(slope)
            with torch.no_grad():
                policy.scale.add_(0.3 * torch.randn(policy.scale.shape, generator=torch.Generator().manual_seed(seed)))
    assert float(found[0].norm()) > 1e-4
    assert float((found[0] - found[1]).norm()) > 1e-4
    for one, two in zip(found[:3], found[3:]):
        assert_close("slope", two, one, limit=1e-9)


def test_parameters_stay_where_they_were_and_have_no_gradient() -> None:
    config, rows = CONFIGS["default"], packed(LAYOUTS[0], 10)
    policy = policy_of(qwen2(), config)
    before = [(name, id(p)) for name, p in policy.model.named_parameters(remove_duplicate=False)]
    thought_loss(policy, rows, config, weights_of(config, rows), Stream(0, 0), passes=PassGraphs(), chunk=3)
    assert [(name, id(p)) for name, p in policy.model.named_parameters(remove_duplicate=False)] == before
    assert all(p.grad is None for p in policy.model.parameters())
    weight = policy.model.lm_head.weight
    with standing_in(policy.model, {id(weight): weight.detach()}):
        assert policy.model.lm_head.weight is not weight
        assert policy.model.lm_head.weight is policy.model.get_input_embeddings().weight, "a tied one, in both places"
    assert policy.model.lm_head.weight is weight


def test_a_moved_model_is_read_where_it_is_now() -> None:
    config, rows = CONFIGS["default"], packed(LAYOUTS[0], 10)
    policy, passes = policy_of(llama(), config, wide=True), PassGraphs()
    weights = weights_of(config, rows)
    for _ in range(2):
        loss = thought_loss(policy, rows, config, weights, Stream(0, 0), chunk=4, passes=passes)
        got = gradients(policy, loss.total)
        want = gradients(policy, thought_loss(policy, rows, config, weights, Stream(0, 0), chunk=4).total)
        for key in want:
            assert_close(key, got[key], want[key], limit=1e-9)
        for parameter in policy.model.parameters():
            parameter.data = parameter.data * 1.5


def test_a_later_pass_makes_an_earlier_gradient_void() -> None:
    """Totals are static: who goes backward too late is told, not handed another micro-batch's gradient."""
    config, rows = CONFIGS["default"], packed(LAYOUTS[0], 10)
    policy, passes = policy_of(llama(), config), PassGraphs()
    weights = weights_of(config, rows)
    first = thought_loss(policy, rows, config, weights, Stream(0, 0), passes=passes)
    second = thought_loss(policy, rows, config, weights, Stream(0, 1), passes=passes)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        first.total.backward()
    second.total.backward()


def test_passes_that_are_not_used_any_more_are_dropped() -> None:
    """A curriculum's stages have other sizes and weights; the memory of the first goes."""
    rows = packed(LAYOUTS[0], 10)
    policy, passes, alive = policy_of(llama(), CONFIGS["default"]), PassGraphs(), weakref.WeakSet()
    for tokens in (4, 3, 2):
        config = preset("default", **SMALL | {"tokens": tokens})
        thought_loss(policy, rows, config, weights_of(config, rows), Stream(0, 0), passes=passes).total.backward()
        for made, _ in passes._passes._made.values():
            alive.add(made)
    thought_loss(policy, rows, DISTIL, weights_of(DISTIL, rows), Stream(0, 0), passes=passes).total.backward()
    assert len(alive) == 1, "of those three; nothing waits for the garbage collector"
    kept: Kept[object] = Kept(most=3, uses=2)
    first = kept.get("a", object)
    assert kept.get("a", object) is first
    for _ in range(3):
        kept.get("b", object)
    assert kept.get("a", object) is not first


def test_a_graph_has_its_stream_to_itself_while_it_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Libraries keep work space for every stream, and a graph that goes takes that of its stream along."""

    class Fake:
        made = 0

        def __init__(self, device: torch.device) -> None:
            Fake.made += 1
            self.device, self.cuda_stream = device, Fake.made

    monkeypatch.setattr(torch.cuda, "Stream", Fake)
    monkeypatch.setattr(graphs, "_streams", [])
    monkeypatch.setattr(graphs, "_captured_on", weakref.WeakKeyDictionary())
    device, graph = torch.device("cuda:0"), Kept[object]()
    first = graphs.own_stream(device)
    assert graphs.own_stream(device) is first, "nothing was captured on it"
    graphs._captured_on[graph] = first
    assert graphs.own_stream(device) is not first
    assert graphs.own_stream(torch.device("cuda:1")) is not first
    del graph
    assert graphs.own_stream(device) is first
    assert Fake.made == 3


def test_a_model_that_waits_goes_on_uncaptured(monkeypatch: pytest.MonkeyPatch) -> None:
    config, rows = CONFIGS["default"], packed(LAYOUTS[0], 10)
    policy, passes = policy_of(llama(), config, wide=True), PassGraphs()
    weights, asked = weights_of(config, rows), []

    def refuse(self: Any, function: Any) -> None:
        asked.append(self)
        raise CannotCapture("it waits", code="THT-007")

    monkeypatch.setattr(captured_pass.Replayed, "prepare", refuse)
    with pytest.warns(UserWarning, match="QG-THT-007 it waits"):
        got = gradients(policy, thought_loss(policy, rows, config, weights, Stream(0, 0), passes=passes).total)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = gradients(policy, thought_loss(policy, rows, config, weights, Stream(0, 0), passes=passes).total)
    want = gradients(policy, thought_loss(policy, rows, config, weights, Stream(0, 0)).total)
    assert len(asked) == 1
    for key in want:
        assert torch.equal(got[key], want[key])
        assert torch.equal(again[key], want[key])


def test_without_gradients_nothing_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    config, rows = CONFIGS["default"], packed(LAYOUTS[0], 10)
    policy = policy_of(llama(), config)
    monkeypatch.setattr(ChunkPass, "__init__", None)
    with torch.no_grad():
        loss = thought_loss(policy, rows, config, weights_of(config, rows), Stream(0, 0), passes=PassGraphs())
    assert not loss.total.requires_grad


@pytest.mark.parametrize(
    ("count", "most", "size"), [(512, 73, 64), (10, 4, 4), (10, 6, 5), (7, None, 7), (7, 9, 7), (5, 1, 1)]
)
def test_pieces_are_of_one_size(count: int, most: int | None, size: int) -> None:
    assert chunk_size(count, most) == size


class Capturable(TorchDispatchMode):
    """Stands in for a capture: refuses to hand numbers to the host, shapes that depend on them, and tensors made of the host's."""

    REFUSED = (
        "_local_scalar_dense",
        "nonzero",
        "equal",
        "masked_select",
        "_unique2",
        "unique_dim",
        "lift_fresh",
        "bincount",
    )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        picked = name in ("index", "index_put", "index_put_") and any(
            t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1]
        )
        assert name not in self.REFUSED, name
        assert not picked, "a mask as an index"
        return func(*args, **(kwargs or {}))


def watch(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Everything that is captured on a GPU runs as `Capturable`; the names of what ran."""
    ran: list[str] = []

    def watched(own: Any) -> Any:
        def run(self: Any) -> None:
            ran.append(own.__name__)
            with Capturable():
                own(self)

        return run

    for owner, method in ((ChunkPass, "_once"), (PrefixPass, "_forward"), (PrefixPass, "_backward")):
        monkeypatch.setattr(owner, method, watched(getattr(owner, method)))
    return ran


@pytest.mark.parametrize(
    ("name", "recompute"), [*((name, False) for name in CONFIGS), ("default", True), ("distil", True)]
)
def test_nothing_in_a_chunk_or_a_prefix_asks_for_numbers(
    name: str, recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a CUDA graph cannot hold, found without one."""
    config, rows, ran = CONFIGS[name], packed(LAYOUTS[0], 10), watch(monkeypatch)
    weights, policy = weights_of(config, rows), policy_of(llama(), config)
    options = {"chunk": 4, "recompute": recompute, "passes": PassGraphs(), "prefixes": PrefixGraphs()}
    thought_loss(policy, rows, config, weights, Stream(0, 0), **options).total.backward()
    assert set(ran) == {"_once", "_forward", "_backward"}
    with pytest.raises(AssertionError, match="_local_scalar_dense"), Capturable():
        weights.sum().item()


# ----------------------------------------------------------------------------------------------------------- the prefix


@pytest.mark.parametrize("name", ["default", "rlp", "distil"])
@pytest.mark.parametrize("make", [llama, qwen2])
def test_a_prefix_over_copies_equals_the_plain_one(name: str, make: Any) -> None:
    """Two of the three micro-batches need a mask, the last one none: two shapes."""
    config, prefixes = CONFIGS[name], PrefixGraphs()
    want = losses(policy_of(make(), config, wide=True), config, {"chunk": 4})
    options = {"chunk": 4, "passes": PassGraphs(), "prefixes": prefixes}
    assert_alike(losses(policy_of(make(), config, wide=True), config, options), want)
    assert len(prefixes._passes._made) == 2


@pytest.mark.parametrize("adapters", ["bound", "none"])
def test_a_frozen_model_has_a_prefix_too(adapters: str) -> None:
    """Bound adapters reach its last layer alone; without any nothing of it has a gradient."""
    config, found = CONFIGS["default"], []
    for options in ({}, {"prefixes": PrefixGraphs(), "passes": PassGraphs()}):
        plain = policy_of(llama(), config, wide=True)
        plain.model.requires_grad_(False)
        policy: Any = plain
        if adapters == "bound":
            policy = BoundPolicy(plain.model, plain.parameters)
            policy.scale = policy.scale.detach().double().requires_grad_()
        for seed in range(2):
            rows = packed(LAYOUTS[seed], 10, seed=seed)
            loss = thought_loss(policy, rows, config, weights_of(config, rows), Stream(3, seed), chunk=4, **options)
            inputs = [policy.scale] if adapters == "bound" else []
            found.append(torch.autograd.grad(loss.total, [policy.parameters.meta_2D, *inputs]))
    for one, two in zip(found[2:], found[:2]):
        for got, want in zip(one, two, strict=True):
            assert float(want.norm()) > 1e-4
            assert_close("gradient", got, want, limit=1e-9)


@pytest.mark.parametrize("layout", [0, 2])
def test_a_later_prefix_makes_an_earlier_one_void(layout: int) -> None:
    """Also one of another shape (here without a mask): on a GPU both work in one pool."""
    config, prefixes = CONFIGS["default"], PrefixGraphs()
    policy = policy_of(llama(), config)
    first, second = (
        thought_loss(policy, rows, config, weights_of(config, rows), Stream(0, 0), prefixes=prefixes)
        for rows in (packed(LAYOUTS[0], 10), packed(LAYOUTS[layout], 10, seed=1))
    )
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        first.total.backward()
    second.total.backward()


# ------------------------------------------------------------------------------------------------- layers that run again


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("name", ["default", "rlp", "distil"])
def test_layers_that_run_again_change_nothing(name: str, captured: bool) -> None:
    config = CONFIGS[name]
    options = {"chunk": 4, "recompute": True, "passes": PassGraphs() if captured else None}
    policy = policy_of(llama(), config, wide=True)
    assert_alike(losses(policy, config, options), losses(policy_of(llama(), config, wide=True), config, {"chunk": 4}))
    assert all("forward" not in vars(module) for module in policy.model.modules())


def test_a_bound_adapter_reaches_layers_that_run_again() -> None:
    config, rows, found = CONFIGS["default"], packed(LAYOUTS[0], 10), []
    for recompute in (False, True):
        plain = policy_of(llama(), config, wide=True)
        policy = BoundPolicy(plain.model, plain.parameters)
        weights = weights_of(config, rows)
        loss = thought_loss(policy, rows, config, weights, Stream(3, 0), chunk=3, recompute=recompute)
        found.append(torch.autograd.grad(loss.total, [policy.scale])[0])
    assert_close("slope", found[1], found[0], limit=1e-6)


def test_layers_that_run_again_keep_their_input_alone() -> None:
    from .test_memory import _Kept

    config, peaks = preset("default", tokens=8, lookahead=2), []
    for recompute in (False, True):
        policy, rows, kept = policy_of(llama(num_hidden_layers=6), config), packed([[24]], 24), _Kept()
        policy.model.requires_grad_(False)
        with torch.autograd.graph.saved_tensors_hooks(kept.pack, kept.unpack):
            thought_loss(policy, rows, config, torch.ones(4), Stream(0, 0), recompute=recompute).total.backward()
        peaks.append(kept.peak)
    assert peaks[1] < 0.5 * peaks[0]


def test_a_model_without_such_layers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from quietgoose.thoughts import recompute

    class Other(torch.nn.Module):
        pass

    monkeypatch.setattr(recompute, "GradientCheckpointingLayer", Other)
    config, rows = CONFIGS["default"], packed(LAYOUTS[0], 10)
    with pytest.raises(RecipeError, match=r"CFG-103.*activation_checkpointing"):
        thought_loss(policy_of(llama(), config), rows, config, weights_of(config, rows), Stream(0, 0), recompute=True)


def test_a_padded_chunk_counts_its_anchors_once() -> None:
    """The anchors that fill a chunk up stand somewhere, see something and count nowhere."""
    config, rows = preset("default", **SMALL, banned=(0, 1, 7)), packed(LAYOUTS[2], 10)
    policy, found = policy_of(llama(), config, wide=True), []
    for chunk in (10, 4):
        loss = thought_loss(
            policy, rows, config, weights_of(config, rows), Stream(0, 0), chunk=chunk, passes=PassGraphs()
        )
        assert bool(loss.stats.isfinite().all())
        found.append(loss)
    assert_close("stats", found[0].stats, found[1].stats, limit=1e-9)
    assert dataclasses.asdict(config)["samples"] == 2
