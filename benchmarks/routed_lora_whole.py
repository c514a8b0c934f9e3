"""The parts `models` and `decode` of benchmarks/routed_lora.py: base, routed and PEFT, whole forwards and decode steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from measure import Times, peak_of, tidy, time_steps
from quietgoose.cache.decode import compile_decode
from quietgoose.cache.decode_static import StaticKV
from quietgoose.cache.hf import ZipCache
from quietgoose.kernels.routed_lora import masked_hidden, route_group
from quietgoose.kernels.testing import relative_rmse
from quietgoose.routing.model import attach, detach
from routed_lora_models import (
    captured,
    compiled_layers,
    forward,
    make_library,
    make_model,
    peft_arrow,
    peft_single,
    tokens_of,
    without_mask,
)
from torch import Tensor

DEVICE = torch.device("cuda")
DECODE_STEPS = 60
GATE = 3e-2  # bf16 through all layers: kernels against the plain twin, logits


def run_models(report: Any) -> None:
    """Forwards with all logits: base and routed compiled and captured, PEFT's as they run."""
    for shape in report.options.shapes:
        if shape == "tiny" or report.late():
            continue
        model = without_mask(make_model(shape, report.options.layers, DEVICE))
        batches = [b for b in report.options.batches if not (shape != "smollm2" and b == "64x512")]
        bases: dict[tuple[str, str], float] = {}
        _arm(report, model, shape, "base", batches, bases)
        for experts in report.options.model_experts:
            if report.late():
                break
            attach(model, make_library(model, experts), k=2, implementation=report.options.implementation)
            error = _gate(model, report.options.implementation)
            sites = {batch: _gate_sites(model, batch) for batch in batches}
            green = [batch for batch in batches if max(error, sites[batch]) <= GATE]
            found = {"logits_error": error, "sites_error": sites, "implementation": report.options.implementation}
            if green != batches:
                red = [batch for batch in batches if batch not in green]
                report.add(part="models", shape=shape, what=f"routed {experts}", refused=f"red gate: {red}", **found)
            _arm(report, model, shape, f"routed {experts}", green, bases, **found)
            detach(model)
            tidy(DEVICE)
        if not report.options.no_peft and not report.late():
            _peft(report, model, shape, batches, bases)
        del model
        tidy(DEVICE)


def _gate(model: Any, implementation: Any) -> float:
    """Logits of the kernels against the plain twin's (64 and 300 tokens: both sides of the decode crossover)."""
    worst = 0.0
    for length in (40, 300):
        ids = tokens_of(model, 1, length)
        found = [forward(model, ids)()]
        library = model.routing_state.library
        attach(model, library, k=2, implementation="reference")
        found.append(forward(model, ids)())
        attach(model, library, k=2, implementation=implementation)
        worst = max(worst, relative_rmse(*found))
    return worst


def _gate_sites(model: Any, batch: str) -> float:
    """The first layer's linears with as many tokens as `batch` has, B 64 times as large, against plain fp32: logits hide
    what is wrong with small updates, and few tokens what is wrong with kernels that many tokens take."""
    rows, length = (int(n) for n in batch.split("x"))
    worst = 0.0
    for site in list(model.routing_state.modules.values())[:7]:
        bank, position = site.adapter.shared, site.adapter.position
        b_RO, weight_OI = bank.b_RO_of(position), site.base.weight
        torch.manual_seed(3)
        x_TI = torch.randn(rows * length, site.in_features, device=weight_OI.device).to(weight_OI.dtype)
        with torch.no_grad():
            b_RO.mul_(64)
            last = x_TI[-1024:].float()
            weights, index = (t[position, None] for t in _route(bank, last))
            first, slots = sum(bank.shape.slots[:position]), bank.shape.slots[position]
            owners = bank.owner_R[first : first + slots]
            hidden_TR = masked_hidden(
                last, bank.a_RI_of(position).float(), owners, [slots], weights, index, bank.shape.num_experts
            )
            want = last @ weight_OI.float().t() + hidden_TR @ b_RO.float()
            worst = max(worst, relative_rmse(site(x_TI)[-1024:], want))
            b_RO.div_(64)
        bank.forget()
    return worst


def _route(bank: Any, x_TI: Tensor) -> tuple[Tensor, Tensor]:
    return route_group(x_TI, bank.vectors_ZI, bank.absent_Z, bank.shape.num_experts, bank.k)


def _arm(
    report: Any, model: Any, shape: str, what: str, batches: list[str], bases: dict[tuple[str, str], float], **more: Any
) -> None:
    for batch in batches:
        if report.late():
            return
        ids = tokens_of(model, *(int(n) for n in batch.split("x")))
        for mode in ("compiled graph", "graph", "calls"):
            try:
                found = _time(model, ids, mode)
            except Exception as problem:
                report.add(part="models", shape=shape, batch=batch, what=what, mode=mode, failed=str(problem)[:300])
                tidy(DEVICE)
                continue
            if what == "base":
                bases[batch, mode] = found["ms"]
            share = round(found["ms"] / bases[batch, mode], 3) if (batch, mode) in bases else None
            report.add(part="models", shape=shape, batch=batch, what=what, mode=mode, **found, share=share, **more)
            more = {}


def _time(model: Any, ids: Tensor, mode: str) -> dict[str, Any]:
    work = forward(model, ids)

    def clocked() -> Times:
        if mode == "compiled graph":
            with compiled_layers(model):
                return time_steps(captured(work), DEVICE, 200, 0.7, 5)
        return time_steps(captured(work) if mode == "graph" else work, DEVICE, 200, 0.7, 5)

    return with_peak(clocked)


def with_peak(clocked: Callable[[], Times]) -> dict[str, Any]:
    """The times, and MiB at the peak beyond what stood."""
    times, peak = peak_of(clocked, DEVICE)
    return {**times.short(), "peak_mib": round((peak or 0) / 2**20, 1)}


def _peft(report: Any, model: Any, shape: str, batches: list[str], bases: dict[tuple[str, str], float]) -> None:
    """PEFT's single LoRA and Arrow with 16 adapters, eager calls (Arrow copies from the host at every forward)."""
    for what, make in (("peft single", peft_single), ("peft arrow 16", lambda m: peft_arrow(m, 16, 2))):
        try:
            peer = make(model)
        except Exception as problem:
            report.add(part="models", shape=shape, what=what, failed=str(problem)[:300])
            continue
        for batch in batches:
            if report.late():
                break
            ids = tokens_of(model, *(int(n) for n in batch.split("x")))
            try:
                work = forward(peer, ids)
                found = with_peak(lambda: time_steps(work, DEVICE, 200, 0.7))
                share = round(found["ms"] / bases[batch, "calls"], 3) if (batch, "calls") in bases else None
                report.add(part="models", shape=shape, batch=batch, what=what, mode="calls", **found, share=share)
            except Exception as problem:
                report.add(part="models", shape=shape, batch=batch, what=what, failed=str(problem)[:300])
                tidy(DEVICE)
        peer.unload()


def run_decode(report: Any) -> None:
    """One token a row after a prompt of 256: captured steps of the base and of routed models, same settings."""
    for shape in report.options.shapes:
        if shape == "tiny" or report.late():
            continue
        model = make_model(shape, report.options.layers, DEVICE)
        bases: dict[tuple[str, str, int], float] = {}
        for experts in (0, *report.options.model_experts):
            if experts:
                attach(model, make_library(model, experts), k=2, implementation=report.options.implementation)
            for cache in report.options.caches:
                for fuse in report.options.fuse:
                    for rows in report.options.rows:
                        if report.late():
                            return
                        _decode(report, model, shape, experts, cache, fuse, rows, bases)
            detach(model)
            tidy(DEVICE)
        del model
        tidy(DEVICE)


def _decode(
    report: Any, model: Any, shape: str, experts: int, cache: str, fuse: Any, rows: int,
    bases: dict[tuple[str, str, int], float],
) -> None:  # fmt: skip
    where = {"part": "decode", "shape": shape, "experts": experts, "cache": cache, "fuse": fuse, "rows": rows}
    try:
        torch._dynamo.reset()
        held = StaticKV(model.config, capacity=512) if cache == "static" else ZipCache(model.config, capacity=512)
        decode = compile_decode(model, held, fuse=fuse)
        logits = decode.prefill(tokens_of(model, rows, 256))
        token = logits.argmax(-1)
        for _ in range(4):
            token = decode.step(token).argmax(-1)
        found = time_steps(lambda: decode.step(token), DEVICE, DECODE_STEPS, 10.0, DECODE_STEPS).short()
        decode.close()
    except Exception as problem:
        report.add(**where, failed=f"{type(problem).__name__}: {str(problem)[:300]}")
        return
    if not experts:
        bases[cache, fuse, rows] = found["ms"]
    share = round(found["ms"] / bases[cache, fuse, rows], 3) if (cache, fuse, rows) in bases else None
    report.add(**where, **found, share=share)
