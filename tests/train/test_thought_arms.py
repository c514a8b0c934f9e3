"""The table of thoughts: what an arm scores is what the model says, thought by thought; and the gain by entropy."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
from quietgoose.base.errors import DataError
from quietgoose.evaluation.encoding import encode_task
from quietgoose.evaluation.run import evaluate
from quietgoose.evaluation.scoring import LeafScores, collate, score_batch, tree_rows
from quietgoose.evaluation.tasks import Task, make_task
from quietgoose.routing.on_top import TopLora
from quietgoose.routing.sites import AdapterLayout, all_sites
from quietgoose.thoughts.config import preset
from quietgoose.thoughts.parameters import ThoughtParameters
from quietgoose.thoughts.policy import ModelPolicy
from quietgoose.thoughts.types import Thoughts
from quietgoose.train import thought_arms, thought_deciles
from quietgoose.train.data.build import build_step_data
from quietgoose.train.nano import build_nano
from quietgoose.train.recipe import DataSettings, NanoSettings, SourceSettings, ThoughtArmName, TrainSettings
from quietgoose.train.thought_arms import (
    TEMPERATURES,
    ThinkingModel,
    build_thought_arms,
    donor_rows,
    fit_temperature,
    score_tree,
)

SMALL = NanoSettings(layers=2, width=32, heads=2, kv_heads=1, mlp_width=48, context=128)
ROWS = [{"prompt": f"ab{n} ", "completion": " cd"[: 1 + n % 3], "target": "x"} for n in range(7)]
CHOICES = [{"prompt": f"q{n}", "completion": "no", "choices": ["no", "yes", "ok"], "answer": n % 3} for n in range(4)]


@pytest.fixture
def thinker() -> ThinkingModel:
    return make_thinker(initial_weight=0.6)


def make_thinker(**changes) -> ThinkingModel:
    model, tokenizer = build_nano(SMALL, 0)
    model.eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.mul_(3.0)
    config = preset("default", tokens=3, lookahead=1, samples=2, banned=(256, 257), **changes)
    rows_VD = model.get_input_embeddings().weight
    parameters = ThoughtParameters(rows_VD[40], rows_VD[41], config, 0).requires_grad_(False)
    layout = AdapterLayout.uniform(all_sites(model), 2)
    top = TopLora(model, layout, 1.0)
    top.use(torch.randn(layout.numel, generator=torch.Generator().manual_seed(1)) * 0.1)
    began = ThoughtParameters(rows_VD[50], rows_VD[51], config, 0).requires_grad_(False)
    return ThinkingModel(ModelPolicy(model, parameters), config, top, tokenizer, 0, 256, began)


def tasks() -> list[Task]:
    return [make_task("words", ROWS), make_task("ranked", CHOICES)]


def by_hand(thinker: ThinkingModel, prompt: list[int], target: int) -> tuple[float, bool]:
    """-log p(target | prompt) after a greedy thought, by plain forwards over the whole text each time."""
    model, tensors = thinker.policy.model, thinker.policy.tensors().thought
    table = model.get_input_embeddings().weight
    start, end = tensors.meta_2D
    embedded = [*table[prompt], start]
    base = model.base_model(inputs_embeds=table[prompt][None]).last_hidden_state[0, -1]
    for _ in range(thinker.config.tokens):
        logits = model(inputs_embeds=torch.stack(embedded)[None]).logits[0, -1]
        logits[list(thinker.config.banned)] = -torch.inf
        embedded.append(table[int(logits.argmax())])
    hidden = model.base_model(inputs_embeds=torch.stack([*embedded, end])[None]).last_hidden_state[0, -1]
    weight = thinker.config.initial_weight  # the head's last layer is zero
    logits = model.lm_head((1 - weight) * base + weight * hidden).float()
    return float(-logits.log_softmax(-1)[target]), int(logits.argmax()) == target


@torch.no_grad()
def test_a_thought_is_scored_as_plain_forwards_would(thinker) -> None:
    task = make_task("words", ROWS)
    items = encode_task(task, thinker.tokenizer, range(len(ROWS)), None)
    leaves = LeafScores.zeros(len(items), "cpu")
    score_tree(thinker, "thought", collate(tree_rows(items), 257, 256, "cpu"), leaves)
    for number, item in enumerate(items):
        wanted = [*item.leaves[0], 257]
        found = [by_hand(thinker, [*item.prompt, *wanted[:n]], token) for n, token in enumerate(wanted)]
        assert -float(leaves.sum_L[number]) == pytest.approx(sum(nll for nll, _ in found[:-1]), rel=1e-4)
        assert -float(leaves.end_L[number]) == pytest.approx(found[-1][0], rel=1e-4)
        assert int(leaves.missed_L[number]) == sum(not hit for _, hit in found)


@torch.no_grad()
def test_at_mixing_weight_0_every_thought_is_no_thought() -> None:
    thinker = make_thinker(initial_weight=0.0)
    items = [i for task in tasks() for i in encode_task(task, thinker.tokenizer, range(4), None)]
    batch = collate(tree_rows(items), 257, 256, "cpu")
    count = sum(len(item.leaves) for item in items)
    plain = LeafScores.zeros(count, "cpu")
    score_batch(thinker.policy.model, batch, plain)
    for arm in ("thought", "shuffled", "pause", "random"):
        leaves = LeafScores.zeros(count, "cpu")
        score_tree(thinker, arm, batch, leaves)
        torch.testing.assert_close(leaves.sum_L, plain.sum_L, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(leaves.end_L, plain.end_L, rtol=1e-5, atol=1e-5)
        assert torch.equal(leaves.missed_L, plain.missed_L)


def test_arms_without_thoughts_see_unrounded_logits_too(thinker) -> None:
    """In bf16, as the arms that think; the model's own logits are 10 times as far away."""
    model = thinker.policy.model.to(torch.bfloat16)
    items = encode_task(tasks()[0], thinker.tokenizer, range(7), None)
    batch = collate(tree_rows(items), 257, 256, "cpu")
    arms = build_thought_arms(["no_thought", "base", "temperature"], thinker, lambda: 2.0)
    hidden = torch.randn(5, 32).bfloat16()
    want = hidden.double() @ model.lm_head.weight.double().t()
    for name, factor in (("no_thought", 1.0), ("base", 1.0), ("temperature", 2.0)):
        with torch.no_grad(), arms[name]():
            assert float((model.lm_head(hidden) - want / factor).abs().max()) < 1e-4
            leaves = LeafScores.zeros(7, "cpu")
            score_batch(model, batch, leaves)
            assert bool((leaves.sum_L < 0).all())
    assert float((model.lm_head(hidden) - want).abs().max()) > 1e-3


@torch.no_grad()
def test_shuffled_gives_no_item_a_thought_of_its_own(thinker, monkeypatch) -> None:
    """Answer tokens have those of another prompt's answer, END another END; a prompt alone in its batch is given a donor's."""
    taken: list[tuple] = []

    def think(thinker, arm, tensors, prefix, rows, anchors, config):
        index_BA = anchors.index_BA
        marks = torch.arange(index_BA.shape[0])[:, None] * 1000 + index_BA
        tokens = marks[..., None, None].expand(*marks.shape, 1, config.tokens)
        return Thoughts(tokens, torch.zeros(tokens.shape), anchors)

    def first_token(thinker, tensors, prefix, rows, thoughts):
        taken.append((rows, thoughts))
        return torch.ones(thoughts.anchors.index_BA.shape), torch.ones_like(thoughts.anchors.valid_BA)

    monkeypatch.setattr(thought_arms, "think", think)
    monkeypatch.setattr(thought_arms, "first_token", first_token)
    with_donors = replace(thinker, donors=donor_rows(tasks(), thinker.tokenizer))
    items = [i for task in tasks() for i in encode_task(task, thinker.tokenizer, range(4), None)]
    for some in (items, items[:1], items[-1:], items[3:5]):
        rows = tree_rows(some, max_row=6)  # choices of one prompt in several rows
        leaves = LeafScores.zeros(sum(len(item.leaves) for item in some), "cpu")
        score_tree(with_donors, "shuffled", collate(rows, 257, 256, "cpu"), leaves)
        assert -leaves.sum_L.sum() == sum(len(leaf) for item in some for leaf in item.leaves), (
            "each token is scored once"
        )
        assert bool((leaves.end_L == -1).all()), "and each end, the donor's nowhere"
        batch, thoughts = taken.pop()
        valid = thoughts.anchors.valid_BA
        first = [int(p) for p in torch.where(valid, thoughts.anchors.index_BA, 9999).amin(1)]
        last = [int(p) for p in torch.where(valid, thoughts.anchors.index_BA, -1).amax(1)]
        prompts = [tuple(batch.tokens_BT[row, : first[row] + 1].tolist()) for row in range(len(first))]
        for row, slot in valid.nonzero().tolist():
            here, mark = int(thoughts.anchors.index_BA[row, slot]), int(thoughts.tokens_BAST[row, slot, 0, 0])
            other, place = divmod(mark, 1000)
            assert prompts[other] != prompts[row]
            assert (place == last[other]) == (here == last[row]), "END has read a whole answer"
            if here < last[row] and here - first[row] < last[other] - first[other]:
                assert place - first[other] == here - first[row]
    with pytest.raises(DataError, match="two different prompts"):
        score_tree(thinker, "shuffled", collate(tree_rows(items[:1]), 257, 256, "cpu"), leaves)


def test_all_arms_of_a_table_and_the_model_as_it_was(thinker) -> None:
    names = list(get_args(ThoughtArmName))
    implementation = thinker.policy.model.config._attn_implementation
    with torch.no_grad():
        arms = build_thought_arms(names, thinker, lambda: 0.5)
        results = evaluate(
            thinker.policy.model, thinker.tokenizer, tasks(), arms, device="cpu", generate="never", bootstrap=20,
            baseline="no_thought", batch_tokens=64,
        )  # fmt: skip
    nats = {arm: results.mean(arm).nats.value for arm in names}
    assert len(set(nats.values())) == len(names), "every arm does something else"
    for task in ("words", "ranked"):
        assert results.cell(task, "temperature").accuracy.value == results.cell(task, "no_thought").accuracy.value
    assert type(thinker.policy.model.config._attn_implementation) is type(implementation)
    again = build_thought_arms(["random"], thinker, lambda: 1.0)
    with torch.no_grad():
        repeated = evaluate(
            thinker.policy.model, thinker.tokenizer, tasks(), again, device="cpu", generate="never", bootstrap=20,
            baseline="random", batch_tokens=64,
        )  # fmt: skip
    assert repeated.mean("random").nats.value == nats["random"], "random thoughts are drawn from the seed"


def test_the_temperature_is_the_one_under_which_the_answers_are_likeliest(thinker) -> None:
    class Scaled(torch.nn.Module):
        def __init__(self, head: torch.nn.Linear, factor: float) -> None:
            super().__init__()
            self.head, self.factor = head, factor

        def forward(self, x):
            return self.head(x) * self.factor

    held_out = tasks()
    found = fit_temperature(thinker, held_out, 64, "cpu")
    assert found in TEMPERATURES
    model = thinker.policy.model
    model.set_output_embeddings(Scaled(model.get_output_embeddings(), 2.0))
    assert fit_temperature(thinker, held_out, 64, "cpu") == pytest.approx(min(2 * found, TEMPERATURES[-1]))


def test_gains_by_entropy_cover_every_label_once_and_sum_up(thinker, tmp_path) -> None:
    settings = DataSettings(sequence_length=40, loss_on="all", cache=str(tmp_path))
    source = SourceSettings(path="steps:permutations-direct,k=3", split="test", limit=40)
    train = TrainSettings(steps=1, rows_per_expert=6, micro_rows=2)
    data = build_step_data({"text": source}, thinker.tokenizer, settings, train, 0)
    gains = thought_deciles.token_gains(thinker, data, "cpu")
    labels = sum(int((micro.labels_BT != -100).sum()) for micro in data.step(0).micro)
    assert len(gains.base_N) == labels
    groups = thought_deciles.deciles(gains, 50, 0)
    assert sum(group.tokens for group in groups) == labels
    assert all(a.high <= b.low + 1e-6 for a, b in itertools.pairwise(groups))
    total = sum(group.gain.value * group.tokens for group in groups) / labels
    means = thought_deciles.totals(gains, 50, 0)
    assert total == pytest.approx(means["gain"], abs=1e-9)
    assert np.isclose(total, (gains.base_N - gains.mixed_N).mean())
    text = thought_deciles.to_markdown(groups, means)
    assert text.count("\n| ") == 1 + len(groups)
    assert thinker.top is not None
    thinker.top.use(None)
    without = thought_deciles.token_gains(thinker, data, "cpu")
    np.testing.assert_allclose(gains.before_N, without.base_N, rtol=1e-5)
    assert means["cost"][0] == pytest.approx((gains.base_N - without.base_N).mean(), abs=1e-6)
    assert means["cost"][1] <= means["cost"][0] <= means["cost"][2]
    assert abs(means["cost"][0]) > 1e-3
    assert f"the stage costs {means['cost'][0]:+.3f}" in text
    assert "Before the stage" not in thought_deciles.to_markdown(
        groups, thought_deciles.totals(gains, 50, 0, before=False)
    )


def test_at_mixing_weight_0_nothing_is_gained(tmp_path) -> None:
    thinker = make_thinker(initial_weight=0.0)
    settings = DataSettings(sequence_length=40, loss_on="completion", cache=str(tmp_path))
    source = SourceSettings(path="steps:permutations-half,k=3", split="validation", limit=20)
    data = build_step_data({"text": source}, thinker.tokenizer, settings, TrainSettings(steps=1, rows_per_expert=4), 0)
    gains = thought_deciles.token_gains(replace(thinker, branch_tokens=9), data, "cpu")
    np.testing.assert_allclose(gains.base_N, gains.mixed_N, rtol=1e-5, atol=1e-6)
