"""The part `tune_many` of benchmarks/routed_lora.py: the tables of kernels/routed_lora/tiles.py that `grouped` reads, with as many
experts as --experts says at most.

One table after the other on a whole layer, each beside the fastest contents of those before. Nothing is timed before it is
right and gives the same bits again and again (routed_lora_tune.py). Parts of the same run that follow use what was fastest.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from measure import say, tidy
from quietgoose.kernels.routed_lora import tiles
from routed_lora_peers import Layer, error_of
from routed_lora_tune import EVERY, _content, _limit, _tables, _timed, time_formulations
from torch import Tensor

BY_SIZE = ("choose_products", "grouped_shrink", "grouped_expand")
TUNED_MANY = ("choose_products", "product_bytes", "pair_rows", *BY_SIZE[1:], "grouped_beside", "formulations")


def run_tune_many(report: Any) -> None:
    """Prints the tables that were tuned as they then are."""
    options, device = report.options, torch.device(report.options.device)
    experts, found = max(options.experts), {name: [] for name in BY_SIZE}
    for shape in options.shapes:
        for tokens in (tokens for tokens in options.tune_tokens if tokens > 1):
            if report.late():
                break
            layer = Layer(shape, experts, tokens, 1, device, torch.bfloat16)
            best = _tune_layer(report, layer, shape, tokens)
            for name, content in best.items():
                found[name].append((_limit(tokens), 2048 if shape == "smollm2" else EVERY, content))
            del layer
            tidy(device)
    for name, entries in found.items():
        table = getattr(tiles, name.upper())
        table[:] = [*sorted(entries, key=lambda entry: entry[:2]), *table]
    for name in (name for name in options.tune_many if name != "formulations"):
        print(name.upper(), "=", getattr(tiles, name.upper()), flush=True)


def _tune_layer(report: Any, layer: Layer, shape: str, tokens: int) -> dict[str, Any]:
    """Of each table by size the fastest content. The other tables say themselves for which sizes they are: they keep theirs."""
    kept = {name: list(getattr(tiles, name.upper())) for name in BY_SIZE}
    several, check, found = tokens // layer.experts, error_of(layer), {}
    for name in report.options.tune_many:
        if name == "formulations":
            time_formulations(report, layer, shape=shape, tokens=tokens)
            continue
        table = getattr(tiles, name.upper())
        best = _fastest(report, layer, name, _choices(name, tokens), check, shape=shape, tokens=tokens)
        if best is None:
            continue
        if name == "pair_rows":
            fewer = [entry for entry in table if entry[0] < several]
            best = [*fewer, (several, best[0][1]), *(entry for entry in table if entry[0] > several)]
        elif name in BY_SIZE:
            found[name] = best[0][2]
        table[:] = best
        say(name, "now", table)
    for name, content in kept.items():
        getattr(tiles, name.upper())[:] = content
    return found


def _choices(name: str, tokens: int) -> list[Any]:
    few = tokens <= 8192
    if name == "pair_rows":
        return tiles.PAIR_ROWS_CHOICES[:3] if few else tiles.PAIR_ROWS_CHOICES[2:]
    if name == "product_bytes":
        return [] if few else tiles.PRODUCT_BYTES_CHOICES
    if name == "grouped_beside":
        return [[0], [8192]] if few else []
    return _tables(name)


def _fastest(
    report: Any, layer: Layer, name: str, choices: list[Any], check: Callable[[list[Tensor]], float], **where: Any
) -> list[Any] | None:
    times: list[tuple[float, list[Any]]] = []
    for content in choices:
        if report.late():
            break
        cell = {
            "part": "tune_many", "experts": layer.experts, **where, "what": name,
            "choice": str(content[0][-1] if isinstance(content[0], tuple) else content),
        }  # fmt: skip
        with _content(name, content):
            try:
                ms, error = _timed(layer, "grouped", check)
            except Exception as problem:
                report.add(**cell, failed=f"{type(problem).__name__}: {str(problem)[:160]}")
                continue
        if ms is None:
            report.add(**cell, refused=error)
            continue
        times.append((ms, content))
        report.add(**cell, ms=round(ms, 4), error=error)
    return min(times, key=lambda one: one[0])[1] if times else None
