"""The `thoughts` job with captured steps learns what it learns without: over experts and routed experts with a LoRA on top, over a
model that trains whole; on the CPU everything but the graphs, on a GPU (mark gpu) the graphs as well."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from quietgoose.train.jobs.thoughts import ThoughtJob

from ..thoughts.test_captured_pass import watch
from .test_thought_memory import batch_of, job_of, recipe_of, take

SHAPE = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "attn_implementation": "sdpa",
}  # fmt: skip
CASES: dict[str, tuple[dict[str, Any], int]] = {
    "base": ({}, 0),
    "routed": ({"over": "routed"}, 3),
    "routed, layers run again": ({"over": "routed", "recompute": True, "chunk": 0}, 3),
    "expert": ({"over": "expert:expert1"}, 3),
    "rlp": ({"preset": "rlp", "over": "routed", "head": "thought"}, 3),
    "full": ({"trainable": "full"}, 0),
    "embeddings": ({"trainable": "embeddings"}, 0),
    "curriculum": ({"preset": "curriculum", "curriculum_sizes": [[3, 2], [2, 2]]}, 0),
    "no thoughts": ({"control": "no_thoughts"}, 0),
}
DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
    ),
]


def learned(thoughts: dict[str, Any], experts: int, capture: str, device: str) -> tuple[ThoughtJob, list[float]]:
    """Six steps of plain descent, two micro-batches each; every number that came of them."""
    recipe = recipe_of(24, **{"chunk": 5, **thoughts, "capture": capture})
    recipe.thoughts.train.steps = 6
    job, numbers = job_of(recipe, SHAPE, torch.float32, device, experts), []
    trained = [p for p in job.parameters() if p.requires_grad]
    for step in range(6):
        job.begin_step(step, torch.full((4,), 1e-2, device=device))
        for micro in range(2):
            torch.manual_seed(2 * step + micro)
            loss = job(batch_of(2, 24, SHAPE["vocab_size"], device))
            loss.total.backward()
            numbers += [loss.total.item(), *loss.sum_E.tolist()]
        with torch.no_grad():
            for parameter in trained:
                if parameter.grad is not None:
                    numbers.append(float(parameter.grad.norm()))
                    parameter -= 0.05 * parameter.grad / (parameter.grad.norm() + 1e-6)
                    parameter.grad = None
    return job, numbers


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CASES)
def test_captured_steps_learn_the_same(name: str, device: str) -> None:
    thoughts, experts = CASES[name]
    plain, want = learned(thoughts, experts, "never", device)
    job, got = learned(thoughts, experts, "auto", device)
    assert (plain.passes, plain.prefixes) == (None, None)
    assert job.passes is not None
    assert not job.passes.refused
    assert bool(job.passes._passes._made) == job.thinks, "passes ran over copies"
    assert max(abs(x) for x in want) > 1e-2
    assert got == pytest.approx(want, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("name", ["routed", "routed, layers run again", "expert", "full"])
def test_nothing_that_is_captured_asks_for_numbers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    thoughts, experts = CASES[name]
    recipe = recipe_of(24, **{"chunk": 5, **thoughts, "capture": "auto"})
    job, ran = job_of(recipe, SHAPE, torch.float32, "cpu", experts), watch(monkeypatch)
    take(job, batch_of(2, 24, SHAPE["vocab_size"], "cpu"), 1)
    assert set(ran) == {"_once", "_forward", "_backward"}
