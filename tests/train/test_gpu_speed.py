"""On a CUDA device: the real loop never waits for it, and compiled, captured and differently attending steps train alike."""

from __future__ import annotations

import dataclasses
import json
import math
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from quietgoose.train import faults
from quietgoose.train.capture import CannotCapture
from quietgoose.train.checkpoint import Checkpoints
from quietgoose.train.compiled import choose_speed
from quietgoose.train.data.loader import borders
from quietgoose.train.engine import Engine, initialize_distributed
from quietgoose.train.jobs.experts import ExpertJob
from quietgoose.train.jobs.gates import GateJob
from quietgoose.train.loop import train
from quietgoose.train.recipe import ExpertSettings, GateSettings, OptimizerSettings, ResumeSettings, RowTrainSettings
from quietgoose.train.stop import StopControl
from quietgoose.train.strategy import load_strategy
from quietgoose.train.types import Batch, StepBatch
from quietgoose.train.verdict import Pending, Reading
from transformers import LlamaConfig, LlamaForCausalLM

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
NAMES = ("ant", "bee", "cat")
ROWS, LENGTH, VOCABULARY = 6, 256, 512
STEPS = 8
WAITS = ((torch.cuda, "synchronize"), (torch.cuda.Stream, "synchronize"), (torch.cuda.Event, "synchronize"))
OWN = [getattr(owner, name) for owner, name in WAITS]


def forbid_waits(forbidden: bool) -> None:
    """No wait that PyTorch makes by itself (its debug mode sees those) nor one that is asked for outright (that it lets pass,
    as the one of DeepSpeed's communication logger)."""
    torch.cuda.set_sync_debug_mode("error" if forbidden else "default")
    for (owner, name), own in zip(WAITS, OWN):

        def refuse(*given: object, where: str = f"{owner.__name__}.{name}", **more: object) -> None:
            raise AssertionError(f"{where} within a step")

        setattr(owner, name, refuse if forbidden else own)


def make_model(dtype: torch.dtype = torch.bfloat16) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=192, intermediate_size=256, num_hidden_layers=3, num_attention_heads=3,
            num_key_value_heads=1, initializer_range=0.1, attn_implementation="sdpa", tie_word_embeddings=True,
        )
    )  # fmt: skip
    return model.to("cuda", dtype)


class Data:
    """Rows of documents of uneven length; the device must not be waited for in the steps `silent`."""

    micro_count = 2

    def __init__(self, silent: range = range(0)) -> None:
        self.silent, self.newest = silent, -1

    def step(self, step: int) -> StepBatch:
        self.newest = step
        if step in (self.silent.start, self.silent.stop):
            forbid_waits(False)
            torch.cuda.synchronize()
            forbid_waits(step in self.silent)
        g = torch.Generator().manual_seed(step)
        tokens = torch.randint(3, VOCABULARY, (2, ROWS, LENGTH), generator=g)
        labels = torch.randint(3, VOCABULARY, tokens.shape, generator=g)
        labels[torch.rand(labels.shape, generator=g) < 0.7] = -100
        starts = torch.rand(tokens.shape, generator=g) < 0.03
        segment = (starts.cumsum(-1) + 1).int()
        position = torch.arange(LENGTH).expand_as(tokens).clone()
        position -= torch.where(starts, position, 0).cummax(-1).values
        expert = torch.tensor([0, 0, 1, 1, 2, 2])
        micro = tuple(
            Batch(
                tokens[m], labels[m], position[m], segment[m], expert, torch.arange(ROWS),
                (labels[m].flatten() != -100).nonzero().flatten(), torch.arange(3),
                torch.from_numpy(borders(segment[m].numpy(), ROWS * LENGTH + 1)),
            ).map(torch.Tensor.pin_memory)
            for m in range(2)
        )  # fmt: skip
        count = torch.stack([(labels[:, expert == e] != -100).sum() for e in range(3)]).double()
        return StepBatch(step, micro, count, tokens.numel())

    def close(self) -> None:
        forbid_waits(False)


class Again(Data):
    """Two steps' rows in turn: labels are random, so only rows that come again can be learnt."""

    def step(self, step: int) -> StepBatch:
        return dataclasses.replace(super().step(step % 2), step=step)


class Reports:
    def __init__(self) -> None:
        self.losses: list[float] = []
        self.skipped: list[int] = []

    def on_step(self, report) -> None:
        self.losses.append(report.loss)
        if report.skipped:
            self.skipped.append(report.step)

    def on_save(self, path: Path) -> None: ...

    def on_event(self, kind: str, **fields) -> None: ...


def make_job(kind: str, settings: RowTrainSettings, strategy: str, misrouting: float = 0.0):
    model = make_model()
    speed = choose_speed(model, "sdpa", settings, torch.device("cuda"), strategy)
    experts = ExpertSettings(rank=4, alpha=4.0, train=settings, misrouting=misrouting)
    if kind == "experts":
        return ExpertJob(model, speed.attention, NAMES, experts, 0, speed.mode).cuda()
    first = ExpertJob(make_model(), "sdpa", NAMES, experts, 0)
    flats = {f"bank.flat_{n}": torch.randn_like(first.bank.flat(n)) * 0.1 for n in NAMES}
    from quietgoose.routing.library import ExpertLibrary

    return GateJob(
        model, speed.attention, ExpertLibrary(first.experts(flats)), GateSettings(settings), speed.mode
    ).cuda()


def run(tmp_path: Path, job, strategy: str, data: Data, steps: int = STEPS) -> tuple[Reports, dict[str, torch.Tensor]]:
    """`steps` steps of the real loop."""
    initialize_distributed()
    settings = OptimizerSettings(lr=1e-2, clip=0.5)
    engine = Engine(job, job.parameter_groups(), settings, steps, 2, load_strategy(strategy), NAMES, "cuda")
    assert engine.lag == 1
    reports, stop = Reports(), StopControl(tmp_path)
    try:
        train(
            engine, data, Checkpoints(tmp_path / "checkpoints"), [reports], stop, steps, every=1000,
            resume=ResumeSettings("never"),
        )  # fmt: skip
        return reports, engine.trainable()
    finally:
        data.close()
        stop.close()
        engine.destroy()


@pytest.mark.parametrize("wait", [
    lambda: torch.cuda.synchronize(), lambda: torch.cuda.current_stream().synchronize(), lambda: torch.cuda.Event().synchronize(),
    lambda: torch.ones(1, device="cuda").item(),
])  # fmt: skip
def test_every_wait_is_seen(wait) -> None:
    forbid_waits(True)
    try:
        with pytest.raises((AssertionError, RuntimeError)):
            wait()
    finally:
        forbid_waits(False)
    wait()


@pytest.mark.parametrize("kind", ["experts", "gates"])
@pytest.mark.parametrize("compile_", ["off", "layers", "graph"])
@pytest.mark.parametrize("strategy", ["zero0", "zero1", "zero2"])
def test_no_step_waits_for_the_device(monkeypatch, tmp_path: Path, kind: str, compile_: str, strategy: str) -> None:
    torch._dynamo.reset()
    job = make_job(kind, RowTrainSettings(compile=compile_), strategy)
    data, read, waited = Data(silent=range(3, STEPS - 1)), Pending.read, []

    def reads(pending: Pending, layout: object) -> Reading:
        """The one wait that is meant: for a step's verdict, when the next step has been given to the device."""
        silent = data.newest in data.silent
        if silent and pending.reading is None:
            assert pending.step < data.newest, "the verdict of the newest step: the device has nothing left to do"
            waited.append(pending.step)
        try:
            torch.cuda.Event.synchronize = OWN[2]
            return read(pending, layout)
        finally:
            forbid_waits(silent)

    monkeypatch.setattr(Pending, "read", reads)
    reports, _ = run(tmp_path, job, strategy, data)
    assert waited == list(range(2, STEPS - 2))
    assert all(math.isfinite(loss) for loss in reports.losses)
    assert reports.losses[-1] != reports.losses[0]


@pytest.mark.parametrize("kind", ["experts", "misrouting", "gates"])
@pytest.mark.parametrize("compile_", ["layers", "graph"])
def test_fast_steps_train_as_plain_ones(tmp_path: Path, kind: str, compile_: str) -> None:
    curves = {}
    for mode in ("off", compile_):
        torch._dynamo.reset()
        settings = RowTrainSettings(compile=mode, attention="base")
        job = make_job(kind.replace("misrouting", "experts"), settings, "zero2", 0.3 if kind == "misrouting" else 0.0)
        curves[mode] = run(tmp_path / mode, job, "zero2", Again())[0].losses
    plain, fast = curves["off"], curves[compile_]
    assert fast == pytest.approx(plain, rel=1e-2)
    assert sum(plain[-2:]) < 0.96 * sum(plain[:2])  # on a CPU .74, .78 with misrouting, .95 for gates


@pytest.mark.parametrize("kind", ["experts", "misrouting", "gates"])
@pytest.mark.parametrize("compile_", ["layers", "graph"])
def test_gradients_of_fast_steps_are_as_near_to_fp32_as_plain_ones(kind: str, compile_: str) -> None:
    """Trained tensors would not tell: AdamW turns the rounding of a small gradient into a whole step."""
    found = {}
    batch = Data().step(0).micro[0].to("cuda")
    for mode in ("fp32", "off", compile_):
        torch._dynamo.reset()
        settings = RowTrainSettings(compile="off" if mode == "fp32" else mode, attention="base")
        job = make_job(kind.replace("misrouting", "experts"), settings, "zero2", 0.3 if kind == "misrouting" else 0.0)
        if mode == "fp32":
            job.float()
        for number, name in enumerate(NAMES):
            flat = job.bank.flat(name)
            flat.data.copy_(torch.randn(flat.shape, generator=torch.Generator().manual_seed(number)) * 0.1)
        for _ in range(2):  # the second replays
            for name in NAMES:
                job.bank.flat(name).grad = None
            sums = job(batch).sum_E
            sums.sum().backward()
        found[mode] = (sums.detach(), torch.cat([job.bank.flat(n).grad for n in NAMES]))
    want_sums, want = found["fp32"]
    errors = {mode: float((found[mode][1] - want).norm() / want.norm()) for mode in ("off", compile_)}
    assert errors[compile_] < 1.3 * errors["off"] + 1e-3, errors
    torch.testing.assert_close(found[compile_][0], want_sums, rtol=1e-2, atol=1e-1)


@pytest.mark.parametrize("kind", ["experts", "gates"])
def test_a_model_that_waits_for_the_device_goes_on_with_compiled_layers(kind: str) -> None:
    """Found before the capture, so that nothing is spoilt: the same sums as uncompiled ones; asked for outright, an error."""
    batch, found = Data().step(0).micro[0].to("cuda"), {}
    for wanted in ("off", "auto", "graph"):
        torch._dynamo.reset()
        job = make_job(kind, RowTrainSettings(compile=wanted, attention="base"), "zero2")
        job.model.model.norm.register_forward_hook(lambda module, given, made: made * float(made.isfinite().all()))
        if wanted == "graph":
            with pytest.raises(CannotCapture, match=r"waits for the device.*set train.compile: layers"):
                job(batch)
            continue
        with pytest.warns(match="auto goes on with layers") if wanted == "auto" else nullcontext():
            sums = job(batch).sum_E
        sums.sum().backward()
        found[wanted] = sums.detach()
    torch.testing.assert_close(found["auto"], found["off"], rtol=1e-2, atol=1e-1)


@pytest.mark.parametrize("attention", ["flex", "varlen"])
def test_attentions_agree(attention: str) -> None:
    torch._dynamo.reset()
    found = {}
    batch = Data().step(0).micro[0].to("cuda")
    for wanted in ("base", attention):
        job = make_job("experts", RowTrainSettings(compile="layers", attention=wanted), "zero2")
        for name in NAMES:
            flat = job.bank.flat(name)
            flat.data.copy_(torch.randn(flat.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
        sums = job(batch).sum_E
        sums.sum().backward()
        found[wanted] = (sums.detach(), torch.cat([job.bank.flat(n).grad for n in NAMES]))
    (want_sums, want), (sums, got) = found["base"], found[attention]
    torch.testing.assert_close(sums, want_sums, rtol=5e-3, atol=1e-2)
    assert (got - want).norm() / want.norm() < 3e-2


def test_a_bad_step_changes_nothing_and_is_told_late(tmp_path: Path, monkeypatch) -> None:
    """Step 3 is not finite: the device leaves weights, moments and step counts alone, without being asked."""
    settings = RowTrainSettings(compile="off")
    plan = [{"rank": 0, "step": 3, "point": "loss", "action": "nan"}]
    monkeypatch.setenv("QG_FAULT_TESTS", "1")
    monkeypatch.setenv("QG_FAULT_PLAN", json.dumps(plan))
    faults._plan.cache_clear()
    reports, with_bad = run(tmp_path / "bad", make_job("experts", settings, "zero2"), "zero2", Data())
    monkeypatch.delenv("QG_FAULT_PLAN")
    faults._plan.cache_clear()
    assert reports.skipped == [3]

    class Without(Data):
        def step(self, step: int) -> StepBatch:
            return dataclasses.replace(super().step(step + (step >= 3)), step=step)

    _, without = run(tmp_path / "without", make_job("experts", settings, "zero2"), "zero2", Without(), STEPS - 1)
    for name, tensor in without.items():
        assert (with_bad[name] - tensor).norm() / tensor.norm() < 2e-2, "the same steps but for rounding"


def test_activation_checkpointing_compiles(tmp_path: Path) -> None:
    torch._dynamo.reset()
    job = make_job("experts", RowTrainSettings(compile="layers", activation_checkpointing=True), "zero2")
    reports, _ = run(tmp_path, job, "zero2", Data())
    assert all(math.isfinite(loss) for loss in reports.losses)
