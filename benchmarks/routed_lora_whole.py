"""The parts `models`, `profile` and `decode` of benchmarks/routed_lora.py: base, routed and PEFT, whole forwards and decode steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from measure import Times, heaviest_kernels, peak_of, tidy, time_steps, worst
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
from routed_lora_peers import checked_rows
from torch import Tensor

DECODE_STEPS = 60
GATE = 3e-2  # of a site's output
LOGITS_GATE = 1.2  # kernels may be so many times as far from the model in fp32 as the plain twin in 16 bits is


def run_models(report: Any) -> None:
    """Forwards with all logits: base and routed compiled and captured, PEFT's as they run."""
    device = torch.device(report.options.device)
    for shape in report.options.shapes:
        if report.late():
            return
        model = without_mask(make_model(shape, report.options.layers, device))
        batches = [b for b in report.options.batches if not (shape != "smollm2" and b == "64x512")]
        bases: dict[tuple[str, str], float] = {}
        _arm(report, model, shape, "base", batches, bases)
        for experts in report.options.model_experts:
            if report.late():
                break
            try:
                _routed(report, model, shape, experts, batches, bases)
            except Exception as problem:
                what = f"routed {experts}"
                report.add(
                    part="models", shape=shape, what=what, failed=f"{type(problem).__name__}: {str(problem)[:300]}"
                )
            detach(model)
            tidy(device)
        if not report.options.no_peft and not report.late():
            _peft(report, model, shape, batches, bases)
        del model
        tidy(device)


def _routed(
    report: Any, model: Any, shape: str, experts: int, batches: list[str], bases: dict[tuple[str, str], float]
) -> None:
    attach(model, make_library(model, experts), k=2, implementation=report.options.implementation)
    error, twin = _gate(model, report.options.implementation)
    sites = {batch: _gate_sites(model, batch) for batch in batches}
    green = [batch for batch in batches if error <= LOGITS_GATE * twin and sites[batch] <= GATE]
    found = {"logits_error": error, "logits_error_plain": twin, "sites_error": sites}
    found["implementation"] = report.options.implementation
    if green != batches:
        red = [batch for batch in batches if batch not in green]
        report.add(part="models", shape=shape, what=f"routed {experts}", refused=f"red gate: {red}", **found)
    _arm(report, model, shape, f"routed {experts}", green, bases, **found)


def _gate(model: Any, implementation: Any) -> tuple[float, float]:
    """How far the logits of the kernels, and of their plain twin, are from the plain twin's in fp32 (40 and 300 tokens: both
    sides of the decode crossover). 16 bits turn choices that are nearly level, which the layers that follow multiply: the more
    experts, the more of them, whoever computes. So the two are held against each other."""
    errors, dtype, library = [], model.dtype, model.routing_state.library
    for length in (40, 300):
        ids, found = tokens_of(model, 1, length), []
        for kind, how in ((dtype, implementation), (dtype, "reference"), (torch.float32, "reference")):
            _cast(model, kind)
            attach(model, library, k=2, implementation=how)
            found.append(forward(model, ids)().float())
        errors.append([relative_rmse(logits, found[2]) for logits in found[:2]])
    _cast(model, dtype)
    attach(model, library, k=2, implementation=implementation)
    kernels, twin = zip(*errors)
    return worst(list(kernels)), max(twin)


def _cast(model: Any, dtype: torch.dtype) -> None:
    """Weights alone: rotary frequencies stay in fp32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def _gate_sites(model: Any, batch: str) -> float:
    """The first layer's linears with as many tokens as `batch` has, B 64 times as large, against plain fp32: logits hide
    what is wrong with small updates, and few tokens what is wrong with kernels that many tokens take."""
    rows, length = (int(n) for n in batch.split("x"))
    errors = []
    checked_C = checked_rows(rows * length, model.device)
    for site in list(model.routing_state.modules.values())[:7]:
        bank, position = site.adapter.shared, site.adapter.position
        b_RO, weight_OI = bank.b_RO_of(position), site.base.weight
        torch.manual_seed(3)
        x_TI = torch.randn(rows * length, site.in_features, device=weight_OI.device).to(weight_OI.dtype)
        with torch.no_grad():
            b_RO.mul_(64)
            some_CI = x_TI[checked_C].float()
            weights, index, clear = (t[position, None] for t in _route(bank, some_CI))
            first, slots = sum(bank.shape.slots[:position]), bank.shape.slots[position]
            owners = bank.owner_R[first : first + slots]
            hidden_CR = masked_hidden(
                some_CI, bank.a_RI_of(position).float(), owners, [slots], weights, index, bank.shape.num_experts
            )
            want = some_CI @ weight_OI.float().t() + hidden_CR @ b_RO.float()
            errors.append(relative_rmse(site(x_TI)[checked_C][clear[0]], want[clear[0]]))
            b_RO.div_(64)
        bank.forget()
    return worst(errors)


def _route(bank: Any, x_TI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weights and experts [S, T, K], and whether a token's choice is clear [S, T]: another order of summation may turn one whose
    last chosen score is within 1e-4 of the next, and one such token among a thousand is an error of three percent."""
    count = min(bank.k + 1, bank.shape.num_experts)
    weights = route_group(x_TI, bank.vectors_ZI, bank.absent_Z, bank.shape.num_experts, count)[0]
    clear = (weights[..., bank.k - 1] / weights[..., -1]).log() > 1e-4 if count > bank.k else weights[..., 0] >= 0
    return *route_group(x_TI, bank.vectors_ZI, bank.absent_Z, bank.shape.num_experts, bank.k), clear


def _arm(
    report: Any, model: Any, shape: str, what: str, batches: list[str], bases: dict[tuple[str, str], float], **more: Any
) -> None:
    for batch in batches:
        if report.late():
            return
        ids = tokens_of(model, *(int(n) for n in batch.split("x")))
        for mode in ("compiled graph", "graph", "calls") if model.device.type == "cuda" else ("calls",):
            try:
                found = _time(model, ids, mode)
            except Exception as problem:
                report.add(part="models", shape=shape, batch=batch, what=what, mode=mode, failed=str(problem)[:300])
                tidy(model.device)
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
                return time_steps(captured(work), ids.device, 200, 0.7, 5)
        return time_steps(captured(work) if mode == "graph" else work, ids.device, 200, 0.7, 5)

    return with_peak(clocked, ids.device)


def with_peak(clocked: Callable[[], Times], device: torch.device) -> dict[str, Any]:
    """The times, and MiB at the peak beyond what stood."""
    times, peak = peak_of(clocked, device)
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
                found = with_peak(lambda: time_steps(work, ids.device, 200, 0.7), ids.device)
                share = round(found["ms"] / bases[batch, "calls"], 3) if (batch, "calls") in bases else None
                report.add(part="models", shape=shape, batch=batch, what=what, mode="calls", **found, share=share)
            except Exception as problem:
                report.add(part="models", shape=shape, batch=batch, what=what, failed=str(problem)[:300])
                tidy(model.device)
        peer.unload()


def run_profile(report: Any) -> None:
    """Where the forward's time goes, base and routed: the heaviest kernels of a captured forward."""
    device = torch.device(report.options.device)
    for shape in report.options.shapes:
        model = without_mask(make_model(shape, report.options.layers, device))
        for experts in (0, *report.options.model_experts):
            if experts:
                attach(model, make_library(model, experts), k=2, implementation=report.options.implementation)
            for batch in report.options.batches:
                if report.late():
                    return
                call = captured(forward(model, tokens_of(model, *(int(n) for n in batch.split("x")))))
                with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
                    call()
                    torch.cuda.synchronize()
                report.add(part="profile", shape=shape, batch=batch, experts=experts, **heaviest_kernels(seen, 1, 12))
        detach(model)
        del model
        tidy(device)


def run_decode(report: Any) -> None:
    """One token a row after a prompt of 256: captured steps of the base and of routed models, same settings."""
    device = torch.device(report.options.device)
    for shape in report.options.shapes:
        if report.late():
            return
        model = make_model(shape, report.options.layers, device)
        bases: dict[tuple[str, str, int], tuple[float, float]] = {}  # milliseconds, error of the logits
        for experts in (0, *report.options.model_experts):
            if experts:
                try:
                    attach(model, make_library(model, experts), k=2, implementation=report.options.implementation)
                except Exception as problem:
                    failed = f"{type(problem).__name__}: {str(problem)[:300]}"
                    report.add(part="decode", shape=shape, experts=experts, failed=failed)
                    continue
            for cache in report.options.caches:
                for fuse in report.options.fuse:
                    for rows in report.options.rows:
                        if report.late():
                            return
                        _decode(report, model, shape, experts, cache, fuse, rows, bases)
            detach(model)
            tidy(device)
        del model
        tidy(device)


def _decode(
    report: Any, model: Any, shape: str, experts: int, cache: str, fuse: Any, rows: int,
    bases: dict[tuple[str, str, int], tuple[float, float]],
) -> None:  # fmt: skip
    where = {"part": "decode", "shape": shape, "experts": experts, "cache": cache, "fuse": fuse, "rows": rows}
    try:
        torch._dynamo.reset()
        held = StaticKV(model.config, capacity=512) if cache == "static" else ZipCache(model.config, capacity=512)
        decode = compile_decode(model, held, fuse=fuse)
        error = _decode_error(model, decode, tokens_of(model, rows, 256))
        of_base = bases.get((cache, fuse, rows), (0.0, GATE))[1]
        if cache == "static" and not error <= GATE + 2 * of_base:
            decode.close()
            report.add(**where, refused=f"logits are not a plain forward's: {error:.2e}")
            return
        token = torch.zeros(rows, dtype=torch.int64, device=model.device)
        found = time_steps(lambda: decode.step(token), token.device, DECODE_STEPS, 10.0, DECODE_STEPS).short()
        decode.close()
    except Exception as problem:
        report.add(**where, failed=f"{type(problem).__name__}: {str(problem)[:300]}")
        return
    if not experts:
        bases[cache, fuse, rows] = found["ms"], error
    share = round(found["ms"] / bases[cache, fuse, rows][0], 3) if (cache, fuse, rows) in bases else None
    report.add(**where, **found, share=share, logits_error=error)


def _decode_error(model: Any, decode: Any, ids: Tensor) -> float:
    """Relative RMSE of the fifth step's logits (captured by then) against one forward over the same tokens without a cache."""
    tokens = [decode.prefill(ids).argmax(-1)]
    for _ in range(5):
        logits = decode.step(tokens[-1])
        tokens.append(logits.argmax(-1))
    plain = forward(model, torch.cat([ids, torch.stack(tokens[:-1], 1)], 1))()
    return relative_rmse(logits, plain[:, -1])
