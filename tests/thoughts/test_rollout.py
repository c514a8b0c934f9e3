"""What is sampled has the probability that is recorded, and depends on nothing but seed, anchor, sample and step."""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any

import pytest
import torch
from quietgoose.base.errors import QuietGooseError, RecipeError
from quietgoose.base.randomness import uniform
from quietgoose.thoughts import stats
from quietgoose.thoughts.anchors import choose_anchors, term_counts
from quietgoose.thoughts.gradient import Stream, thought_loss
from quietgoose.thoughts.policy import ModelPolicy, PolicyTensors
from quietgoose.thoughts.prefix import run_prefix
from quietgoose.thoughts.rollout import (
    KEPT_GRAPHS,
    KEPT_ROLLOUTS,
    WARM_STEPS,
    RolloutGraphs,
    _Stepper,
    draw,
    graph_key,
    random_tokens,
    rollout,
)
from quietgoose.thoughts.types import PAUSE, Prefix
from torch import nn
from torch.nn import functional

from .naive import VOCABULARY, TestRows, document_of, hidden_of, llama, packed, policy_of, qwen2
from .test_branch import CONFIG, ROWS, thoughts_of


def test_recorded_probability_is_that_of_the_model() -> None:
    """log pi_old under temperature and without banned tokens, against an ordinary forward."""
    config = dataclasses.replace(
        CONFIG, temperature=0.7, policy_temperature=0.7, banned=(0, 1, 2, 9), samples=3, tokens=4
    )
    policy = policy_of(qwen2(), config)
    thoughts = thoughts_of(policy, ROWS, config)
    thought, table = policy.parameters.tensors(), policy.model.get_input_embeddings()
    for row, slot in thoughts.anchors.valid_BA.nonzero().tolist():
        index = int(thoughts.anchors.index_BA[row, slot])
        start, _ = document_of(ROWS, row, index)
        for sample in range(config.samples):
            tokens = thoughts.tokens_BAST[row, slot, sample]
            text = torch.cat([table(ROWS.tokens_BT[row, start : index + 1]), thought.meta_2D[:1], table(tokens)])
            logits = policy.model.lm_head(hidden_of(policy.model, text)[-config.tokens - 1 : -1]) / 0.7
            logits[:, list(config.banned)] = -torch.inf
            want = functional.log_softmax(logits, -1)[range(config.tokens), tokens]
            torch.testing.assert_close(thoughts.logprob_BAST[row, slot, sample], want, rtol=1e-4, atol=1e-5)
            assert not set(tokens.tolist()) & set(config.banned)


def test_greedy_equals_a_plain_loop() -> None:
    policy = policy_of(llama(), CONFIG)
    with torch.no_grad():
        prefix = run_prefix(policy.model, ROWS)
    anchors = choose_anchors(CONFIG, ROWS, seed=0, step=0)
    thoughts = rollout(policy, policy.tensors(), prefix, ROWS, anchors, CONFIG, greedy=True)
    thought, table = policy.parameters.tensors(), policy.model.get_input_embeddings()
    for row, slot in anchors.valid_BA.nonzero().tolist():
        index = int(anchors.index_BA[row, slot])
        start, _ = document_of(ROWS, row, index)
        text = torch.cat([table(ROWS.tokens_BT[row, start : index + 1]), thought.meta_2D[:1]])
        for step in range(CONFIG.tokens):
            token = policy.model.lm_head(hidden_of(policy.model, text)[-1]).argmax()
            assert int(thoughts.tokens_BAST[row, slot, 0, step]) == int(token)
            text = torch.cat([text, table(token[None])])
    assert torch.equal(thoughts.tokens_BAST[:, :, 0], thoughts.tokens_BAST[:, :, 1])


def test_exact_rollout_has_ratio_one() -> None:
    policy = policy_of(llama(), CONFIG)
    counts = term_counts(CONFIG, ROWS, seed=0, step=0)
    loss = thought_loss(policy, ROWS, CONFIG, (1 / counts).float(), Stream(0, 0))
    found = stats.summarise(loss.stats)
    assert found["rollout_dlogp"] < 1e-5
    assert found["rollout_kl"] < 1e-9
    assert found["effective_sample_share"] > 1 - 1e-6
    assert found["ratio_capped_share"] == 0


@pytest.mark.parametrize(("kind", "limit"), [("int8", 1e-3), ("int4", 0.2)])
@pytest.mark.parametrize("make", [llama, qwen2])
def test_quantised_rollout_stays_near_and_is_measured(kind, limit, make) -> None:
    """KL(rollout || train) per token; ratios are no longer 1, and the dashboard sees it."""
    config = dataclasses.replace(CONFIG, rollout_cache=kind, tokens=6)
    policy = policy_of(make(), config)
    counts = term_counts(config, ROWS, seed=0, step=0)
    found = stats.summarise(thought_loss(policy, ROWS, config, (1 / counts).float(), Stream(0, 0)).stats)
    assert 1e-9 < found["rollout_kl"] < limit
    assert found["rollout_dlogp"] > 1e-5


def test_layout_changes_nothing_that_is_drawn() -> None:
    """Rows in another order, alone, sampled in chunks, with other anchors beside: the same thoughts."""
    policy = policy_of(llama(), CONFIG)
    ids = torch.tensor([11, 4, 7])
    tensors = policy.tensors()

    def sample(rows: TestRows, row_ids: torch.Tensor, **options):
        changes = {k: options.pop(k) for k in ("anchors", "every") if k in options}
        config = dataclasses.replace(CONFIG, **changes)
        with torch.no_grad():
            prefix = run_prefix(policy.model, rows)
        anchors = choose_anchors(config, rows, seed=0, step=0, row_ids=row_ids)
        thoughts = rollout(policy, tensors, prefix, rows, anchors, config, torch.Generator().manual_seed(3), **options)
        return {
            (int(row_ids[b]), int(anchors.index_BA[b, a])): (
                thoughts.tokens_BAST[b, a].tolist(), thoughts.logprob_BAST[b, a],
            )
            for b, a in anchors.valid_BA.nonzero().tolist()
        }  # fmt: skip

    def rows_at(order: list[int]) -> TestRows:
        return TestRows(*(getattr(ROWS, f.name)[order] for f in dataclasses.fields(ROWS)))

    whole = sample(ROWS, ids)
    others = [
        sample(rows_at([1, 0, 2]), ids[[1, 0, 2]]), sample(rows_at([1]), ids[[1]]), sample(ROWS, ids, at_once=1),
        sample(ROWS, ids, at_once=5), sample(ROWS, ids, anchors="every_n", every=3),
        sample(ROWS, ids, graphs=RolloutGraphs()),
    ]  # fmt: skip
    for found in others:
        assert found
        for key, (tokens, logprob) in found.items():
            assert tokens == whole[key][0]
            torch.testing.assert_close(logprob, whole[key][1], rtol=1e-5, atol=1e-5)
    other = sample(ROWS, ids + 1)  # other rows of the data think other thoughts
    assert [tokens for tokens, _ in other.values()] != [tokens for tokens, _ in whole.values()]


def test_steps_and_samples_draw_apart() -> None:
    policy = policy_of(llama(), CONFIG)
    first, second = thoughts_of(policy, ROWS, seed=0), thoughts_of(policy, ROWS, seed=1)
    assert not torch.equal(first.tokens_BAST, second.tokens_BAST)
    assert torch.equal(first.tokens_BAST, thoughts_of(policy, ROWS, seed=0).tokens_BAST)
    assert not torch.equal(first.tokens_BAST[:, :, 0], first.tokens_BAST[:, :, 1])


def test_every_draw_is_its_own() -> None:
    """Under a flat distribution a token is the uniform number itself: no two of row, anchor, sample, step share one."""
    config = dataclasses.replace(CONFIG, samples=8, tokens=8)
    model = llama()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    rows = packed([[12]] * 8, 12)
    tokens = thoughts_of(policy_of(model, config), rows, config).tokens_BAST.double()
    for axis in range(4):
        one, two = (tokens.narrow(axis, start, tokens.shape[axis] - 1).flatten() for start in (0, 1))
        assert abs(float(torch.corrcoef(torch.stack([one, two]))[0, 1])) < 5 / one.numel() ** 0.5, axis


def test_uniform_numbers_are_uniform_and_uncorrelated() -> None:
    key, sample, step = torch.arange(4096)[:, None, None], torch.arange(4)[:, None], torch.arange(8)
    u = uniform(123456789012345, key, sample, step).double()
    assert float(u.min()) >= 0
    assert float(u.max()) < 1
    flat = u.flatten()
    counts = torch.histc(flat, 64, 0, 1)
    expected = flat.numel() / 64
    assert float(((counts - expected) ** 2 / expected).sum()) < 63 + 5 * (2 * 63) ** 0.5
    for axis in range(3):
        left, right = u.narrow(axis, 0, u.shape[axis] - 1).flatten(), u.narrow(axis, 1, u.shape[axis] - 1).flatten()
        assert abs(float(torch.corrcoef(torch.stack([left, right]))[0, 1])) < 5 / left.numel() ** 0.5


def test_draws_follow_the_distribution() -> None:
    torch.manual_seed(0)
    head = nn.Linear(4, 7, bias=False)
    hidden = torch.randn(1, 4).expand(40_000, 4) * 2
    u = uniform(5, torch.arange(40_000))
    banned = torch.tensor([2])
    tokens, logprob = draw(head, hidden, u, 1.5, banned, greedy=False)
    logits = head(hidden[:1]).detach()[0] / 1.5
    logits[2] = -torch.inf
    p = logits.softmax(-1)
    share = torch.bincount(tokens, minlength=7) / 40_000
    assert float((share - p).abs().max()) < 5 * 0.5 / 40_000**0.5
    assert share[2] == 0
    torch.testing.assert_close(logprob, p.log()[tokens])


@pytest.mark.parametrize("u", [0.0, 1 - 2.0**-23])
def test_the_rims_of_the_interval_never_give_a_banned_token(u) -> None:
    head = nn.Linear(3, 5, bias=False)
    hidden = torch.randn(64, 3) * 30
    for banned in ([0], [4], [0, 1, 4]):
        tokens, logprob = draw(head, hidden, torch.full((64,), u), 1.0, torch.tensor(banned), greedy=False)
        assert not set(tokens.tolist()) & set(banned)
        assert bool(torch.isfinite(logprob).all())


def test_one_token_thoughts_and_a_row_of_padding() -> None:
    config = dataclasses.replace(CONFIG, tokens=1)
    policy = policy_of(llama(), config)
    rows = packed([[], [2]], 5)
    thoughts = thoughts_of(policy, rows, config)
    assert thoughts.tokens_BAST.shape == (2, 5, 2, 1)
    assert bool(torch.isfinite(thoughts.logprob_BAST).all())
    assert thoughts.anchors.valid_BA.sum() == 1


def test_control_pause_needs_no_sampling() -> None:
    config = dataclasses.replace(CONFIG, control="pause")
    thoughts = thoughts_of(policy_of(llama(), config), ROWS, config)
    assert bool((thoughts.tokens_BAST == PAUSE).all())


def test_control_random_thoughts_ignores_the_model() -> None:
    config = dataclasses.replace(CONFIG, control="random_thoughts", banned=(0, 5), tokens=40)
    one, two = (thoughts_of(policy_of(llama(seed), config), ROWS, config) for seed in (0, 1))
    assert torch.equal(one.tokens_BAST, two.tokens_BAST)
    found = one.tokens_BAST.unique().tolist()
    assert found == [t for t in range(VOCABULARY) if t not in (0, 5)]
    torch.testing.assert_close(one.logprob_BAST[0, 0, 0, 0].exp(), torch.tensor(1 / (VOCABULARY - 2)))


@pytest.mark.parametrize("banned", [(), (0,), (22,), (3, 4, 9), tuple(range(1, 22))])
def test_random_tokens_are_those_that_are_left_evenly(banned) -> None:
    config = dataclasses.replace(CONFIG, banned=tuple(reversed(banned)))
    kept = [token for token in range(VOCABULARY) if token not in banned]
    u = ((torch.arange(8 * len(kept)) + 0.5) / (8 * len(kept))).view(4, -1)
    tokens, logprob = random_tokens(nn.Linear(2, VOCABULARY), config, u)
    assert torch.bincount(tokens.flatten(), minlength=VOCABULARY)[kept].tolist() == [8] * len(kept)
    assert tokens.shape == logprob.shape == u.shape
    torch.testing.assert_close(logprob.exp(), torch.full_like(u, 1 / len(kept)))


@pytest.mark.parametrize("control", ["none", "random_thoughts"])
@pytest.mark.parametrize("banned", [tuple(range(VOCABULARY)), (0, VOCABULARY), (-100,)])
def test_banned_tokens_that_cannot_be_are_refused(control, banned) -> None:
    config = dataclasses.replace(CONFIG, banned=banned, control=control)
    with pytest.raises(RecipeError, match=r"CFG-100.*thoughts\.banned"):
        thoughts_of(policy_of(llama(), config), ROWS, config)


def test_bf16_rollout_records_fp32() -> None:
    model = llama().to(torch.bfloat16)
    policy = policy_of(model, CONFIG)
    thoughts = thoughts_of(policy, ROWS)
    assert thoughts.logprob_BAST.dtype == torch.float32
    counts = term_counts(CONFIG, ROWS, seed=0, step=0)
    loss = thought_loss(policy, ROWS, CONFIG, (1 / counts).float(), Stream(0, 0))
    assert loss.sums.dtype == loss.total.dtype == torch.float32
    found = stats.summarise(loss.stats)
    assert found["reward_zero_share"] < 0.05  # bf16 rewards would be exactly 0 for a third of the tokens and more


# captured steps: what can be seen without a GPU ------------------------------------------------------------------------


class _Graph:
    def replay(self) -> None:
        raise AssertionError("a graph that reads memory of others was replayed")


def stepper_of(policy: ModelPolicy, tensors: PolicyTensors) -> tuple[_Stepper, Prefix]:
    with torch.no_grad():
        prefix = run_prefix(policy.model, ROWS)
    anchors = choose_anchors(CONFIG, ROWS, seed=0, step=0)
    stepper = _Stepper(policy, prefix, anchors, CONFIG, greedy=False, capture=True)
    stepper.load(tensors, prefix, torch.zeros(1, dtype=torch.int64))
    return stepper, prefix


def test_parameters_that_moved_are_captured_again() -> None:
    policy = policy_of(llama(), CONFIG)
    tensors = policy.tensors()
    stepper, prefix = stepper_of(policy, tensors)
    graph: Any = _Graph()
    stepper.graph, seed = graph, torch.zeros(1, dtype=torch.int64)
    with torch.no_grad():
        next(policy.model.parameters()).add_(1.0)  # an optimizer step
    stepper.load(tensors, prefix, seed)
    assert stepper.graph is graph
    weight = policy.model.base_model.layers[1].mlp.up_proj.weight
    weight.data = weight.data.clone()  # an offload and its return
    stepper.load(tensors, prefix, seed)
    assert stepper.graph is None
    assert stepper.warm == 0


def test_a_captured_step_belongs_to_its_parameters() -> None:
    """Another model's parameters of the same sizes: a new stepper, and nobody writes into the old model."""
    policies = [policy_of(llama(seed), CONFIG) for seed in (0, 1)]
    anchors = choose_anchors(CONFIG, ROWS, seed=0, step=0)
    with torch.no_grad():
        keys = [
            graph_key(p.tensors(), run_prefix(p.model, ROWS), anchors, CONFIG, False) for p in (*policies, policies[0])
        ]
    assert keys[0] == keys[2]
    assert keys[0] != keys[1]


def test_what_cannot_be_captured_is_named() -> None:
    policy = policy_of(llama(), dataclasses.replace(CONFIG, tokens=WARM_STEPS + 1))
    stepper, _ = stepper_of(policy, policy.tensors())
    with torch.no_grad(), pytest.raises(QuietGooseError, match=r"THT-005.*graphs=None"):
        stepper.run(choose_anchors(CONFIG, ROWS, seed=0, step=0), ROWS)


def test_graphs_make_room_before_they_take_it() -> None:
    graphs, alive, peaks = RolloutGraphs(), weakref.WeakSet(), []

    class Fake:
        def __init__(self) -> None:
            alive.add(self)
            peaks.append(len(alive))

    make: Any = Fake
    for key in "abcab":
        graphs.get(key, make)
    assert max(peaks) == KEPT_GRAPHS
    assert len(peaks) == 5
    kept = graphs.get("b", make)
    assert graphs.get("b", make) is kept


def test_a_shape_that_is_not_used_any_more_is_dropped() -> None:
    graphs, alive = RolloutGraphs(), weakref.WeakSet()

    class Fake:
        def __init__(self) -> None:
            alive.add(self)

    make: Any = Fake
    graphs.get("a stage of the curriculum", make)
    for _ in range(KEPT_ROLLOUTS):
        graphs.get("the next", make)
    assert len(alive) == 2
    graphs.get("the next", make)
    assert len(alive) == 1
