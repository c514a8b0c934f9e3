"""How much a compressed KV cache changes a model: KL on text, retrieval, drift; every method at its true bytes.

    python benchmarks/kv_quality.py --model MODEL --text TEXT --out results/kv_quality       # .json .md .svg
    python benchmarks/kv_quality.py --model MODEL --windows 8 --samples 8 --methods quality "KIVI-4" --stages text

MODEL is what a recipe's base.model may name: smollm2, a GGUF file, a folder, a hub id. Windows come half from TEXT (a file or
folder), half from the docstrings of Python's standard library; all docstrings without TEXT. Stages, in this order, each
over all methods in kv_quality_methods.py's order, until its share of `--budget-seconds` is spent:

    text        KL to the 16-bit cache, top-1 agreement, nats, attention error by layer (kv_quality_score.py)
    retrieval   codes and lines, question outside and inside the compressed prefix, short passkeys
    passkey     passkeys of 4k and 8k tokens, outside
    drift       KL along a greedy rollout of the 16-bit model, by position

float16 is the default on a GPU: in bf16 the 16-bit cache itself, read by another kernel, is 0.0007 nats away from itself,
a third of what 4-bit caches are. `zip lossless` shows this floor in every run.
After every method and stage the JSON is rewritten; a method that fails is recorded with its error and left out. Random
choices of a method (probes) are repeated with `seeds` seeds in the text stage. Not measured here: answer length, larger
models.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from kv_quality_methods import SIXTEEN, Method, chosen, seeded
from kv_quality_report import markdown, picture
from kv_quality_score import Reference, Scorer
from kv_tasks import Cell, TaskMaker, Windows, text_windows

SHARES = {"text": 0.45, "retrieval": 0.3, "passkey": 0.12, "drift": 0.13}  # of the budget
STAGES = tuple(SHARES)
SHORT_CELLS = ("codes 5", "codes 10", "codes 20", "lines 5", "lines 10", "lines 20", "passkey 1024")
LONG_CELLS = ("passkey 4096", "passkey 8000")
INSIDE = ("codes 5", "codes 10", "codes 20", "lines 10")
DRIFT_PROMPT = 64  # tokens


class Study:
    """Runs stages over methods and keeps the results on disk."""

    def __init__(self, scorer: Scorer, tokenizer: Any, methods: list[Method], given: argparse.Namespace) -> None:
        self.scorer, self.tokenizer, self.methods, self.given = scorer, tokenizer, methods, given
        self.started = time.monotonic()
        self.deadline = 0.0  # seconds after the start; what a stage leaves over goes to the next
        self.data: dict[str, Any] = {
            "meta": self._meta(),
            "methods": {m.name: {"family": m.family, "peer": m.peer, "settings": m.settings} for m in methods},
        }

    def run(self) -> dict[str, Any]:
        whole = sum(SHARES[stage] for stage in self.given.stages)
        for stage in self.given.stages:
            started = time.monotonic()
            self.deadline += SHARES[stage] / whole * self.given.budget_seconds
            getattr(self, f"_{stage}")()
            self.data["meta"].setdefault("stage_seconds", {})[stage] = round(time.monotonic() - started, 1)
            self.save()
        return self.data

    def _text(self) -> None:
        given = self.given
        windows = text_windows(self.tokenizer, given.text, given.windows, given.prefix, given.continuation)
        reference = self.scorer.reference(windows)
        for method in self._turns("text"):
            self._keep(method, "text", lambda m: self.scorer.windows(windows, m, reference), seeds=method.seeds)

    def _retrieval(self) -> None:
        self._cells(SHORT_CELLS, self.methods, self.given.samples)

    def _passkey(self) -> None:
        self._cells(LONG_CELLS, [m for m in self.methods if m.long], self.given.samples)

    def _cells(self, names: tuple[str, ...], methods: list[Method], samples: int) -> None:
        maker = TaskMaker(self.tokenizer)
        cells: list[tuple[str, Cell, bool]] = []
        for name in names:
            cell = maker.by_name(name, samples)
            cells += [
                (f"{name} {'in' if inside else 'out'}", cell, inside)
                for inside in (False, name in INSIDE)[: 1 + (name in INSIDE)]
            ]
        for method in self._turns(names[0], methods):
            for name, cell, inside in cells:
                self._keep(
                    method, name, lambda m, c=cell, i=inside: self.scorer.retrieval(c, m, inside=i), group="retrieval"
                )

    def _drift(self) -> None:
        given = self.given
        prompts = text_windows(self.tokenizer, given.text, given.rollouts, DRIFT_PROMPT, given.rollout).tokens[
            :, :DRIFT_PROMPT
        ]
        tokens = self.scorer.rollout(prompts, given.rollout)
        windows = Windows(tokens, ["rollout"] * len(tokens), DRIFT_PROMPT)
        reference: Reference = self.scorer.reference(windows)
        for method in self._turns("drift", [m for m in self.methods if m.long and m is not SIXTEEN]):
            self._keep(method, "drift", lambda m: self.scorer.windows(windows, m, reference))

    def _turns(self, stage: str, methods: list[Method] | None = None) -> Iterator[Method]:
        for method in methods or self.methods:
            spent = time.monotonic() - self.started
            if self.given.budget_seconds and spent > self.deadline:
                self._error(
                    method,
                    f"{stage}: not begun, {self.deadline:.0f} s of the budget's {self.given.budget_seconds:.0f} were spent",
                )
                continue
            yield method

    def _keep(self, method: Method, name: str, score: Any, *, group: str | None = None, seeds: int = 1) -> None:
        """Run and store one result for each seed; a failure is written down and the study goes on."""
        result = self.data["methods"][method.name]
        started = time.monotonic()
        found = []
        try:
            for seed in range(min(seeds, self.given.seeds)):
                found.append(score(seeded(method, seed)))
        except Exception as error:  # one method's failure must not cost the others: it is reported, never hidden
            self._error(method, f"{name}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
            if self.given.strict:
                raise
        if found:
            (result if group is None else result.setdefault(group, {}))[name] = found
        seconds = time.monotonic() - started
        result.setdefault("seconds", {})[name] = round(seconds, 2)
        shown = {
            key: sum(found[0][key]) / len(found[0][key])
            for key in ("kl", "top1", "exact", "digit")
            if found and key in found[0]
        }
        figures = ", ".join(f"{key} {value:.4f}" for key, value in shown.items())
        bits = f"{found[0]['bits']:.2f} bits, " if found else "failed, "
        print(f"{method.name:26s} {name:18s} {bits}{figures}  {seconds:.1f} s", flush=True)
        self.save()

    def _error(self, method: Method, text: str) -> None:
        self.data["methods"][method.name].setdefault("errors", []).append(text)

    def save(self) -> None:
        out = self.given.out
        out.parent.mkdir(parents=True, exist_ok=True)
        self.data["meta"]["seconds"] = round(time.monotonic() - self.started, 1)
        out.with_suffix(".json").write_text(json.dumps(rounded(self.data)) + "\n")

    def _meta(self) -> dict[str, Any]:
        given, device = self.given, self.scorer.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        cells = [f"{c} {where}" for c in (*SHORT_CELLS, *LONG_CELLS) for where in ("out", "in")]
        return {
            "model": given.model, "note": "", "device": name, "dtype": given.dtype, "torch": torch.__version__,
            "transformers": transformers.__version__, "windows": given.windows, "prefix": given.prefix,
            "continuation": given.continuation, "samples": given.samples, "rollout": given.rollout, "cells": cells,
        }  # fmt: skip


def in_dtype(model: Any, dtype: torch.dtype) -> Any:
    """The model with its weights in `dtype`; buffers (rotary frequencies) stay as they are, as when it is loaded so."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def rounded(value: Any) -> Any:
    """Floats to five digits: the JSON holds one number for each window and sample."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item) for item in value]
    return value if isinstance(value, (int, str, bool, type(None))) else str(value)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--text", type=Path, help="text file (.gz too) or folder")
    parser.add_argument("--out", type=Path, default=Path("results/kv_quality"), help="path without suffix")
    parser.add_argument("--windows", type=int, default=200)
    parser.add_argument("--prefix", type=int, default=2048, help="tokens")
    parser.add_argument("--continuation", type=int, default=64, help="tokens")
    parser.add_argument("--samples", type=int, default=200, help="of every retrieval cell")
    parser.add_argument("--rollouts", type=int, default=16)
    parser.add_argument("--rollout", type=int, default=1024, help="tokens")
    parser.add_argument("--batch", type=int, default=32, help="windows at a time")
    parser.add_argument("--seeds", type=int, default=3, help="at most, of methods with random choices")
    parser.add_argument("--budget-seconds", type=float, default=0, help="0: no limit; no method begins after it")
    parser.add_argument("--methods", nargs="+", help="parts of names; all by default")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--dtype",
        choices=("float16", "bfloat16", "float32"),
        default="float16" if torch.cuda.is_available() else "float32",
    )
    parser.add_argument("--strict", action="store_true", help="stop at the first failure")
    return parser.parse_args(argv)


def main() -> None:
    from quietgoose.train.base_models import load_base
    from quietgoose.train.recipe import BaseSettings

    given = arguments()
    base = load_base(BaseSettings(model=given.model, dtype="float32", attention="sdpa"), given.device)
    model = in_dtype(base.model, getattr(torch, given.dtype))
    study = Study(Scorer(model, given.batch, given.batch * 2200), base.tokenizer, chosen(given.methods), given)
    study.data["meta"]["note"] = "; ".join(base.notes) + ("." if base.notes else "")
    data = study.run()
    given.out.with_suffix(".md").write_text(markdown(data))
    given.out.with_suffix(".svg").write_text(picture(data))
    print(markdown(data))


if __name__ == "__main__":
    main()
