"""The orchestration: arms, per-row states, ranks, and that teacher forcing agrees with real generation."""

from __future__ import annotations

import math
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch
from quietgoose.base.distributed import World
from quietgoose.base.errors import DataError, RecipeError
from quietgoose.evaluation import run
from quietgoose.evaluation.encoding import ItemRef, encode_task
from quietgoose.evaluation.generation import PromptRow, prompt_batches
from quietgoose.evaluation.run import PerRow, evaluate
from quietgoose.evaluation.tables import from_json, gap_closed, to_csv, to_json, to_markdown
from quietgoose.evaluation.tasks import make_task

from .conftest import KNOWN, UNKNOWN

TEXTS = make_task("texts", [{"prompt": p, "completion": c} for p, c in KNOWN + UNKNOWN], group="expert")
CHOICES = make_task(
    "choices",
    [{"prompt": p, "completion": c, "choices": [c, " falsch", " ganz falsch"], "answer": 0} for p, c in KNOWN],
    group="zero-shot",
)
NUMBERS = make_task("numbers", [{"prompt": "say red:", "completion": " 4"}, {"prompt": "5?", "completion": " 5"}])


@contextmanager
def noisy(model):
    """An arm: the output head disturbed; restored afterwards."""
    weight = model.get_output_embeddings().weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight.add_(0.4 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    yield model
    with torch.no_grad():
        weight.copy_(before)


def run_all(model, tokenizer, tasks=(TEXTS, CHOICES), arms=None, **settings):
    arms = arms or {"base": lambda: noisy(model), "taught": nullcontext}
    return evaluate(model, tokenizer, tasks, arms, device="cpu", bootstrap=200, **settings)


def test_teacher_forced_equals_generated(taught, tokenizer):
    forced = run_all(taught, tokenizer, generate="never", batch_tokens=200)
    real = run_all(taught, tokenizer, generate="always", batch_tokens=200)
    for arm in ("base", "taught"):
        ours, theirs = forced.scores[arm, "texts"].correct_N, real.scores[arm, "texts"].correct_N
        assert np.array_equal(ours, theirs)
    assert forced.scores["taught", "texts"].correct_N.tolist() == [1.0] * len(KNOWN) + [0.0] * len(UNKNOWN)
    assert 0 <= forced.scores["base", "texts"].correct_N.sum() < len(KNOWN)
    assert forced.cell("texts", "taught").metric == "exact match, teacher-forced"
    assert real.cell("texts", "taught").metric == "exact match, generated"


def test_generation_is_the_same_in_batches_and_alone(taught, tokenizer):
    together = run_all(taught, tokenizer, generate="always", batch_tokens=100000)
    alone = run_all(taught, tokenizer, generate="always", batch_tokens=1)
    for key, scores in together.scores.items():
        assert np.array_equal(scores.correct_N, alone.scores[key].correct_N)
        np.testing.assert_allclose(scores.nats_N, alone.scores[key].nats_N, rtol=1e-4, atol=1e-5)


def test_nats_equal_the_models_own_loss(taught, tokenizer):
    results = run_all(taught, tokenizer)
    nats, tokens = 0.0, 0
    for prompt, answer in KNOWN + UNKNOWN:
        start = tokenizer(prompt)["input_ids"]
        end = [*tokenizer(answer)["input_ids"], tokenizer.eos_token_id]
        labels = torch.tensor([[-100] * len(start) + end])
        with torch.no_grad():
            loss = taught(input_ids=torch.tensor([start + end]), labels=labels).loss.item()
        nats, tokens = nats + loss * len(end), tokens + len(end)
    assert math.isclose(results.cell("texts", "taught").nats.value, nats / tokens, rel_tol=1e-4)


def test_table_numbers(taught, tokenizer):
    results = run_all(taught, tokenizer)
    cell = results.cell("texts", "taught")
    assert cell.accuracy.value == len(KNOWN) / len(KNOWN + UNKNOWN)
    assert cell.accuracy.low < cell.accuracy.value < cell.accuracy.high
    base = results.cell("texts", "base")
    assert base.difference is None
    assert math.isclose(cell.difference.value, cell.accuracy.value - base.accuracy.value)
    assert results.mean("taught", "expert").accuracy == cell.accuracy
    choice = results.cell("choices", "taught")
    assert choice.accuracy.value == 1.0
    mean = results.mean("taught")
    assert math.isclose(mean.accuracy.value, (cell.accuracy.value + 1.0) / 2)
    assert math.isclose(results.difference("taught", "base").value, mean.difference.value)
    assert set(results.seconds) == {"base", "taught"}


def test_choices_are_ranked_per_token(random_model, tokenizer):
    """Without division by length the short choice would win."""
    results = run_all(random_model, tokenizer, [CHOICES], {"base": nullcontext}, generate="never")
    right = []
    for item in encode_task(CHOICES, tokenizer, range(len(CHOICES.items)), None):
        ranks = []
        for leaf in item.leaves:
            ids = torch.tensor([[*item.prompt, *leaf]])
            with torch.no_grad():
                logp = random_model(input_ids=ids).logits[0].log_softmax(-1)
            start = len(item.prompt) - 1
            ranks.append(sum(logp[start + i, token].item() for i, token in enumerate(leaf)) / len(leaf))
        right.append(float(np.argmax(ranks) == item.gold))
    assert results.scores["base", "choices"].correct_N.tolist() == right


def test_per_row_arms_get_the_items_of_their_rows(taught, tokenizer):
    """An oracle-like arm: rows of one task disturbed, those of the other not, in the same batches."""
    taken = []

    @contextmanager
    def enter(refs):
        taken.append([ref.task for ref in refs])
        row = torch.tensor([ref.task == "texts" for ref in refs])

        def disturb(module, arguments, output):
            return torch.where(row[:, None, None], torch.zeros_like(output), output)

        handle = taught.model.layers[0].mlp.register_forward_hook(disturb)
        yield
        handle.remove()

    arms = {"base": nullcontext, "mixed": lambda: nullcontext(PerRow(enter))}
    results = run_all(taught, tokenizer, arms=arms)
    assert any(set(tasks) == {"texts", "choices"} for tasks in taken)
    base, mixed = ([results.scores[arm, name].nats_N for name in ("texts", "choices")] for arm in arms)
    np.testing.assert_allclose(base[1], mixed[1], rtol=1e-5)
    assert not np.allclose(base[0], mixed[0], rtol=0.05)


def test_ranks_share_items_and_agree(taught, tokenizer, monkeypatch):
    """Two ranks, one after the other: each sees only its items; merged they equal one process."""
    parts = []
    monkeypatch.setattr(run, "gather", lambda value: parts.append(value) or [value])
    for rank in range(2):
        monkeypatch.setattr(run, "world", lambda rank=rank: World(rank, 2, rank))
        run_all(taught, tokenizer)
    monkeypatch.undo()
    monkeypatch.setattr(run, "gather", lambda value: parts)
    merged, _ = run._merge(*parts[0], {"texts": len(TEXTS.items), "choices": len(CHOICES.items)})
    monkeypatch.undo()
    whole = run_all(taught, tokenizer)
    assert parts[1][0]["taught", "texts"][0] == list(range(1, len(TEXTS.items), 2))
    for key, scores in whole.scores.items():
        assert np.array_equal(merged[key].correct_N, scores.correct_N)
        np.testing.assert_allclose(merged[key].nats_N, scores.nats_N, rtol=1e-4, atol=1e-5)


def test_numeric_targets_are_generated(taught, tokenizer):
    results = run_all(taught, tokenizer, [NUMBERS], {"base": nullcontext}, max_new_tokens=6)
    cell = results.cell("numbers", "base")
    assert (cell.metric, cell.items) == ("last number, generated", 2)
    forced = run_all(taught, tokenizer, [NUMBERS], {"base": nullcontext}, generate="never")
    assert forced.cell("numbers", "base").metric == "exact match, teacher-forced"
    with pytest.raises(DataError, match="lower max_new_tokens"):
        run_all(taught, tokenizer, [NUMBERS], {"base": nullcontext}, max_new_tokens=300)


def test_arms_on_some_tasks_only(taught, tokenizer):
    ticks = []
    results = run_all(
        taught,
        tokenizer,
        arm_tasks={"taught": ["texts"]},
        on_progress=lambda arm, done, total: ticks.append((arm, done, total)),
    )
    assert results.cell("choices", "taught") is None
    assert results.mean("taught") is None
    assert results.mean("taught", "expert") is not None
    assert [done for _, done, _ in ticks] == list(range(1, ticks[-1][2] + 1))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"baseline": "bse"}, "baseline 'bse' is not among base, taught. Did you mean 'base'"),
        ({"arm_tasks": {"taught": ["text"]}}, "task 'text' is not among"),
        ({"arm_tasks": {"teached": []}}, "arm 'teached'"),
        ({"tasks": (TEXTS, TEXTS)}, "two tasks are named 'texts'"),
    ],
)
def test_unknown_names_are_refused(taught, tokenizer, settings, words):
    with pytest.raises(RecipeError) as caught:
        run_all(taught, tokenizer, **settings)
    assert words in str(caught.value)


def test_tables_round_trip(taught, tokenizer):
    arms = {"base": lambda: noisy(taught), "oracle": nullcontext, "half": lambda: noisy(taught)}
    results = run_all(taught, tokenizer, arms=arms)
    value = to_json(results, {"model": "tiny|llama"})
    again = from_json(value)
    assert again.cell("texts", "oracle").accuracy.value == round(results.cell("texts", "oracle").accuracy.value, 6)
    assert to_json(again, {"model": "tiny|llama"}) == value
    assert gap_closed(results, "half") == 0.0
    assert gap_closed(results, "oracle") == 1.0
    text = to_markdown(results, facts={"model": "tiny"})
    assert "| oracle | 81.2 [" in text
    assert "gap closed" in text
    assert "- model: tiny" in text
    assert len(to_csv(results).splitlines()) == 1 + 2 * 3


def test_prompt_batches_hold_every_row_once_within_budget():
    rows = [PromptRow(ItemRef("t", n), (5,) * (n % 41 + 1), 64 if n % 3 else n % 20 + 1) for n in range(300)]
    batches = prompt_batches(rows, 256)
    assert sorted(row.ref.index for batch in batches for row in batch) == list(range(300))
    for batch in batches:
        tokens = len(batch) * (max(len(row.prompt) for row in batch) + max(row.limit for row in batch))
        assert tokens <= 4 * 256
        assert max(row.limit for row in batch) <= 2 * min(row.limit for row in batch)
    assert len(prompt_batches(rows, 10**9)) == 7  # budgets up to 1, 2, 4, 8, 16, 32 and 64 tokens
