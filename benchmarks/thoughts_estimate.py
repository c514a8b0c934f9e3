"""What a training step of thoughts would hold on a GPU, cell by cell, told without one: the step is traced with tensors that have
shapes and no numbers (train/thought_memory.py). Called by thoughts_memory.py --estimate, whose cells and arms these are."""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from measure import gib, say, write
from quietgoose.train.recipe import DataSettings, Recipe, ThoughtSettings
from quietgoose.train.thought_memory import thought_bytes
from quietgoose.train.thought_settings import thought_plan
from random_models import smollm2
from thoughts_authors_loop import small_model
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

KINDS = {"captured": "exact", "int8": "int8", "int4": "int4", "recomputed": "exact"}
"""Arms that are estimated, and how they keep thoughts: all of them captured."""


def shapes_of(options: argparse.Namespace) -> Any:
    """The model of the benchmark on the meta device, in the bf16 of a GPU."""
    with torch.device("meta"):
        if options.tiny:
            model: Any = LlamaForCausalLM(small_model().config)
        elif options.model:
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(options.model))
        else:
            model = LlamaForCausalLM(smollm2())
    return model.to(torch.bfloat16).eval()


def recipe_of(options: argparse.Namespace, cell: tuple[int, int, int], arm: str, rows: int, branch: int) -> Recipe:
    """The `thoughts` stage that takes the benchmark's step; `branch` positions in one chunk, 0: all."""
    length, tokens, samples = cell
    kind: Any = KINDS[arm]
    settings = ThoughtSettings(
        tokens=tokens, samples=samples, lookahead=options.ahead, rollout_cache=kind, capture="auto",
        trainable="full" if options.train == "full" else "embeddings",
    )  # fmt: skip
    settings.train.activation_checkpointing = arm == "recomputed"
    if branch:
        settings.chunk = max(1, branch // (rows * samples * thought_plan(settings).stages[0].branch_length))
    return Recipe(data=DataSettings(sequence_length=length), thoughts=settings)


def estimated(options: argparse.Namespace, model: Any, cell: Any, arm: str, rows: int, branch: int) -> dict[str, Any]:
    """`peak_bytes` beyond weights as the benchmark measures them: with what captured steps keep, and with gradients."""
    recipe = recipe_of(options, cell, arm, rows, branch)
    began = time.perf_counter()
    found = thought_bytes(recipe, model, thought_plan(recipe.thoughts), rows, experts=0)
    trained = sum(p.numel() * p.element_size() for p in model.parameters()) if options.train == "full" else 0
    return {
        "peak_bytes": found.whole + trained, "graph_bytes": found.pool, "thought_kv_bytes": found.stored,
        "gradient_bytes": trained, "trace_seconds": round(time.perf_counter() - began, 1),
    }  # fmt: skip


def estimate_all(options: argparse.Namespace, cells: list[str], report: dict[str, Any]) -> None:
    """Every cell, arm, number of rows and size of a chunk; the report is written after each."""
    arms = [arm for arm in options.arms if arm in KINDS]
    if not arms:
        raise SystemExit(f"--estimate traces the arms {', '.join(KINDS)}; --arms has {', '.join(options.arms)}")
    model = shapes_of(options)
    for text in cells:
        cell = tuple(int(x) for x in text.split(":"))
        for rows in options.rows:
            for branch in options.estimate:
                for arm in arms:
                    found = estimated(options, model, cell, arm, rows, branch)
                    where = {"cell": text, "arm": arm, "rows": rows, "branch_tokens": branch}
                    report["results"].append({**where, **found})
                    write(report, options.out)
                    say(f"{text} {arm} x{rows}, chunks of {branch or 'all'}: {gib(found['peak_bytes'])} GiB")


def estimate_table(report: dict[str, Any]) -> str:
    """A line a cell and number of rows, a column a chunk and arm: estimated GiB beyond weights."""
    found = report["results"]
    columns = list(dict.fromkeys((r["branch_tokens"], r["arm"]) for r in found))
    heads = [f"{arm}, {f'chunks of {branch:,}' if branch else 'all at once'}" for branch, arm in columns]
    lines = ["Estimated, GiB beyond weights\n", "|" + "|".join(["L:T:S", "rows", *heads]) + "|"]
    lines.append("|" + "-|" * (len(heads) + 2))
    for cell, rows in dict.fromkeys((r["cell"], r["rows"]) for r in found):
        here = {
            (r["branch_tokens"], r["arm"]): r["peak_bytes"] for r in found if (r["cell"], r["rows"]) == (cell, rows)
        }
        lines.append("|" + "|".join([cell, str(rows), *(f"{here[c] / 2**30:.1f}" for c in columns)]) + "|")
    return "\n".join(lines)
