"""Fast training computes what plain training does: compiled layers, groups of rows, places known beforehand, attentions."""

from __future__ import annotations

import dataclasses
import itertools
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from quietgoose.base.errors import QuietGooseError, RecipeError
from quietgoose.kernels import linear_loss
from quietgoose.routing.library import ExpertLibrary
from quietgoose.routing.row_adapter import RowAdapter
from quietgoose.train import capture, compiled
from quietgoose.train.data import packed_attention
from quietgoose.train.data.attention import FLEX, VARLEN, document_borders, model_inputs
from quietgoose.train.data.loader import borders
from quietgoose.train.jobs.experts import ExpertJob
from quietgoose.train.jobs.gates import GateJob
from quietgoose.train.recipe import ExpertSettings, GateSettings, RowTrainSettings
from quietgoose.train.settings import load_recipe
from quietgoose.train.types import Batch
from quietgoose.train.verdict import Layout, coefficients
from torch.nn import functional

TOOLS = runpy.run_path(str(Path(__file__).with_name("test_expert_gate_jobs.py")))
NAMES = TOOLS["NAMES"]
CPU = torch.device("cpu")
RECIPES = Path(__file__).resolve().parents[2] / "launch" / "recipes"


@pytest.fixture
def quick_compiler(monkeypatch):
    """The same tracing and the same autograd graphs, without the minutes of a code generator."""
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **k: compile_module(self, backend="aot_eager", **k))
    head = torch.compile(linear_loss.plain_slope, backend="aot_eager", dynamic=True, fullgraph=True)
    monkeypatch.setattr(linear_loss, "_compiler", lambda: head)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


def expert_job(mode: str = "off", **settings) -> ExpertJob:
    train = RowTrainSettings(activation_checkpointing=settings.pop("recompute", False))
    job = ExpertJob(
        TOOLS["make_model"](), "sdpa", NAMES, ExpertSettings(rank=2, alpha=4.0, train=train, **settings), 0, mode
    ).train()
    TOOLS["randomise"](job)
    return job


def gate_job(mode: str = "off") -> GateJob:
    first = expert_job()
    library = ExpertLibrary(first.experts(TOOLS["trained"](first)))
    job = GateJob(TOOLS["make_model"](), "sdpa", library, GateSettings(), mode).train()
    TOOLS["randomise"](job)
    return job


def batch_of(seed: int = 0) -> Batch:
    """Four rows of nine tokens, two of each expert, three documents a row, half of the tokens labelled."""
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, 50, (4, 9), generator=g)
    labels = torch.randint(3, 50, (4, 9), generator=g)
    labels[torch.rand(labels.shape, generator=g) < 0.5] = -100
    segment = torch.tensor([1, 1, 1, 2, 2, 2, 2, 3, 3]).expand(4, -1).int().contiguous()
    position = torch.tensor([0, 1, 2, 0, 1, 2, 3, 0, 1]).expand(4, -1).contiguous()
    return Batch(tokens, labels, position, segment, torch.tensor([0, 0, 1, 1]), torch.arange(4) + seed)


def known(batch: Batch) -> Batch:
    """With what the loader says beforehand."""
    labels = batch.labels_BT.flatten()
    return dataclasses.replace(batch, label_L=(labels != -100).nonzero().flatten(), group_G=torch.tensor([0, 1]))


def result(job, batch: Batch) -> torch.Tensor:
    """Loss sums and every gradient in one vector."""
    if hasattr(job, "begin_step"):
        job.begin_step(3, torch.ones(2))
    for group in job.parameter_groups():
        for parameter in group["params"]:
            parameter.grad = None
    sums = job(batch).sum_E
    sums.sum().backward()
    return torch.cat([sums.detach(), *(p.grad for group in job.parameter_groups() for p in group["params"])])


@pytest.mark.parametrize("make", [expert_job, gate_job])
def test_groups_and_known_places_change_nothing(make) -> None:
    job = make()
    torch.testing.assert_close(result(job, known(batch_of())), result(job, batch_of()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ["experts", "misrouting", "gates"])
def test_compiled_layers_equal_eager_ones_and_are_one_graph(quick_compiler, case: str) -> None:
    make = {"experts": expert_job, "gates": gate_job, "misrouting": lambda m="off": expert_job(m, misrouting=0.5)}[case]
    plain, fast = make(), make("layers")
    for seed in (0, 1, 2):
        batch = known(batch_of(seed))
        torch.testing.assert_close(result(fast, batch), result(plain, batch), rtol=1e-4, atol=1e-4)
    assert quick_compiler["stats"]["unique_graphs"] == 3, (
        "the first layer (no gradient of its input), the others, the head"
    )
    assert not quick_compiler["graph_break"]


def test_compiled_code_takes_every_base_product(quick_compiler, monkeypatch) -> None:
    """No site of a compiled layer adds its adapter by itself."""
    batch = known(batch_of())
    want = result(expert_job(), batch)
    monkeypatch.setattr(RowAdapter, "forward", lambda *given: pytest.fail("the base's product was made apart"))
    torch.testing.assert_close(result(expert_job("layers"), batch), want, rtol=1e-4, atol=1e-4)


LISTENERS = {
    "forward": lambda base: base.register_forward_hook(lambda module, given, made: made * 3),
    "before": lambda base: base.register_forward_pre_hook(lambda module, given: given[0] * 3),
}


@pytest.mark.parametrize("what", LISTENERS)
def test_a_base_that_is_listened_to_is_called(quick_compiler, what: str) -> None:
    """Compiled code takes the base's product with the adapter's, but never past a hook of the base."""
    plain, fast, batch = expert_job(), expert_job("layers"), known(batch_of())
    quiet = result(plain, batch)
    for job in (plain, fast):
        LISTENERS[what](job.model.model.layers[1].mlp.up_proj.base)
    want = result(plain, batch)
    torch.testing.assert_close(result(fast, batch), want, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(want, quiet, rtol=1e-2)


@pytest.mark.parametrize(("part", "bias"), [("weight", False), ("weight", True), ("bias", True)])
def test_a_base_that_is_trained_is_called(monkeypatch, part: str, bias: bool) -> None:
    """The operator has no gradient of the base."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    adapter, base = RowAdapter("site", 1.0), torch.nn.Linear(4, 3, bias=bias).requires_grad_(False)
    assert adapter.takes_base(base)
    base.get_parameter(part).requires_grad_()
    assert not adapter.takes_base(base)


def test_compiled_layers_recompute_activations(quick_compiler) -> None:
    batch = known(batch_of())
    want = result(expert_job(), batch)
    torch.testing.assert_close(result(expert_job("layers", recompute=True), batch), want, rtol=1e-4, atol=1e-4)
    assert quick_compiler["stats"]["unique_graphs"] >= 1


@pytest.mark.parametrize(
    ("settings", "device", "strategy", "want"),
    [
        ({}, "cpu", "zero2", "off"),
        ({}, "cuda", "zero2", "graph"),
        ({"activation_checkpointing": True}, "cuda", "zero2", "layers"),
        ({}, "cuda", "zero3", "off"),
        ({"compile": "off"}, "cuda", "zero2", "off"),
        ({"compile": "layers"}, "cpu", "zero1", "layers"),
        ({"compile": "graph"}, "cuda", "zero0", "graph"),
    ],
)
def test_mode(settings, device: str, strategy: str, want: str) -> None:
    assert compiled.choose_mode(RowTrainSettings(**settings), torch.device(device), strategy)[0] == want


@pytest.mark.parametrize(
    ("settings", "device", "strategy", "why"),
    [
        ({"compile": "layers"}, "cuda", "zero3", "ZeRO-3 gathers"),
        ({"compile": "graph"}, "cpu", "zero2", "need a CUDA device"),
        ({"compile": "graph", "activation_checkpointing": True}, "cuda", "zero2", "no use for"),
    ],
)
def test_impossible_modes(settings, device: str, strategy: str, why: str) -> None:
    with pytest.raises(RecipeError, match=why):
        compiled.choose_mode(RowTrainSettings(**settings), torch.device(device), strategy)


@pytest.mark.parametrize(
    ("options", "code", "why"),
    [
        (
            ["--experts.train.compile=layers", "--strategy=zero3"],
            "CFG-032",
            "experts.train.compile: layers is impossible",
        ),
        (["--gates.train.parallel=expert", "--gates.train.strategy=zero3"], "DIST-005", "gates.train.parallel: expert"),
        (["--gates.train.compile=graph", "--gates.train.activation_checkpointing=true"], "CFG-032", "graph has no use"),
    ],
)
def test_contradictions_are_told_before_anything_is_loaded(options: list[str], code: str, why: str) -> None:
    with pytest.raises(RecipeError, match=why) as raised:
        load_recipe(["--config", str(RECIPES / "nano_demo.yaml"), *options])
    assert code in str(raised.value)


def test_attention_of_a_training() -> None:
    cuda, bf16 = torch.device("cuda"), torch.bfloat16
    assert compiled.choose_attention("auto", "sdpa", CPU, torch.float32, "off") == "sdpa"
    assert compiled.choose_attention("auto", "sdpa", cuda, torch.float32, "layers") == "sdpa"
    assert compiled.choose_attention("base", "eager", cuda, bf16, "layers") == "eager"
    assert compiled.choose_attention("flex", "sdpa", cuda, bf16, "layers") == FLEX
    for wanted, device, dtype, mode, why in (
        ("flex", cuda, bf16, "off", "train.compile: layers"),
        ("varlen", cuda, torch.float32, "layers", "bfloat16"),
        ("flex", CPU, bf16, "layers", "a CUDA device"),
    ):
        with pytest.raises(RecipeError, match=why):
            compiled.choose_attention(wanted, "sdpa", device, dtype, mode)


def test_flex_attention_reads_documents_as_sdpa_does(monkeypatch) -> None:
    """Uncompiled and without gradients: what a CPU can do of it."""
    monkeypatch.setattr(packed_attention, "_compiled_flex", lambda: packed_attention.flex_attention)
    model, batch = TOOLS["make_model"](), batch_of()
    with torch.no_grad():
        want = model.model(**model_inputs(batch), use_cache=False).last_hidden_state
        model.set_attn_implementation(FLEX)
        got = model.model(**model_inputs(batch, FLEX), use_cache=False).last_hidden_state
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_varlen_attention_is_handed_every_document_once(monkeypatch) -> None:
    """The flash kernel needs a GPU (test_gpu_speed.py); what it is given and what becomes of it does not."""

    def kernel(q, k, v, borders, key_borders, longest, longest_key, scale=None, **options):
        assert borders is key_borders
        assert longest == longest_key
        parts = []
        for first, last in itertools.pairwise(borders.tolist()):
            one = (x[first:last].transpose(0, 1) for x in (q, k, v))
            out = functional.scaled_dot_product_attention(*one, is_causal=True, scale=scale, enable_gqa=True)
            parts.append(out.transpose(0, 1))
        return torch.cat(parts)

    monkeypatch.setattr(packed_attention, "varlen_attn", kernel)
    model, batch = TOOLS["make_model"](), batch_of()
    with torch.no_grad():
        want = model.model(**model_inputs(batch), use_cache=False).last_hidden_state
        model.set_attn_implementation(VARLEN)
        got = model.model(**model_inputs(batch, VARLEN), use_cache=False).last_hidden_state
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    model.model.layers[0].self_attn.attention_dropout = 0.1
    with pytest.raises(RecipeError, match="no attention dropout"):
        model.train().model(**model_inputs(batch, VARLEN), use_cache=False)


def test_borders_are_the_devices_and_have_one_length() -> None:
    segment = batch_of().segment_BT
    found = torch.from_numpy(borders(segment.numpy(), 20))
    device = document_borders(segment)
    assert torch.equal(found[: len(device)], device)
    assert found.shape == (20,)
    assert set(found[len(device) :].tolist()) == {segment.numel()}


@pytest.mark.parametrize("limit", [0.0, 0.5])
def test_the_device_and_the_host_clip_alike(limit: float) -> None:
    layout = Layout(("x", "y"), ("x", "y"), ("extra",))
    vector = torch.tensor([1.0, 2.0, 4.0, 0.01, 0.0, 0.0, 7.0], dtype=torch.float64)
    reading = layout.read(vector, torch.tensor([2.0, 0.0]))
    assert (reading.losses, reading.flags, reading.extra) == ({"x": 0.5, "y": 2.0}, (0.0, 0.0), {"extra": 7.0})
    bad, found = layout.on_device(vector, limit)
    assert bad.item() == 0.0
    for name, value in coefficients(reading.norms, limit).items():
        assert found[name].item() == pytest.approx(value, rel=1e-7)
    assert layout.on_device(vector.index_fill(0, torch.tensor([3]), torch.nan), limit)[0].item() == 1.0


@pytest.mark.parametrize("make", [expert_job, gate_job])
def test_a_replayed_trunk_hands_gradients_to_the_parameters(make, monkeypatch) -> None:
    """The wiring of `graph` without a device: what would be replayed is computed again, through leaves that are no parameters."""

    class Again:
        def __init__(self, run, batch, shares, pool) -> None:
            with torch.enable_grad():
                self.made, self.leaves = run(batch, shares)
            self.hidden, self.grad_hidden = self.made.detach(), torch.zeros_like(self.made)
            self.forward_graph, self.backward_graph = (
                SimpleNamespace(replay=lambda: None),
                SimpleNamespace(replay=self.back),
            )

        def back(self) -> None:
            self.gradients = torch.autograd.grad(self.made, self.leaves, self.grad_hidden, retain_graph=True)

        def load(self, batch, shares) -> None: ...

    monkeypatch.setattr(capture, "Capture", Again)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: 0)
    plain, fast, batch = make(), make(), known(batch_of())
    parameters = [p for group in fast.parameter_groups() for p in group["params"]]
    fast._trunk = capture.CapturedTrunk(fast._run, lambda: parameters)
    for _ in range(2):
        torch.testing.assert_close(result(fast, batch), result(plain, batch), rtol=1e-5, atol=1e-6)
    parameters[0].data = parameters[0].data.clone()
    with pytest.raises(QuietGooseError, match="moved after the capture"):
        fast(batch)
