"""The dashboard's numbers equal plain means over everything that is scored."""

from __future__ import annotations

import pytest
import torch
from quietgoose.thoughts import objective, stats
from quietgoose.thoughts.anchors import term_counts
from quietgoose.thoughts.config import preset
from quietgoose.thoughts.gradient import Stream, thought_loss
from quietgoose.thoughts.prefix import run_prefix
from quietgoose.thoughts.scoring import score_thoughts

from .naive import llama, packed, policy_of
from .test_branch import ROWS


def test_means_over_what_is_scored() -> None:
    config = preset("default", tokens=3, lookahead=3, samples=3, rollout_cache="int8")
    policy = policy_of(llama(), config)
    weights = (1 / term_counts(config, ROWS, seed=0, step=0)).float()
    loss = thought_loss(policy, ROWS, config, weights, Stream(0, 0), chunk=4, measure_gap=True)
    found = stats.summarise(loss.stats)
    with torch.no_grad():
        prefix = run_prefix(policy.model, ROWS)
    scores = score_thoughts(policy, policy.tensors(), prefix, ROWS, loss.thoughts, config)
    valid = scores.valid_BAJ.any(-1)
    reward = scores.reward_BAS[valid]
    weight = scores.weight_BASJ[scores.valid_BAJ.unsqueeze(2).expand_as(scores.weight_BASJ)]
    advantage = objective.advantages(scores.reward_BAS, config.advantage)[valid]
    want = {
        "anchors": valid.sum(),
        "mixing_weight": weight.mean(),
        "mixing_weight_std": weight.std(correction=0),
        "reward": reward.mean(),
        "reward_std": reward.std(correction=0),
        "reward_spread": reward.std(-1, correction=0).square().mean().sqrt(),
        "reward_zero_share": (reward == 0).float().mean(),
        "advantage_size": advantage.abs().mean(),
    }
    for name, value in want.items():
        assert found[name] == pytest.approx(float(value), rel=1e-4, abs=1e-6), name
    assert 0 < found["thought_entropy"] < torch.tensor(23.0).log()
    assert found["own_minus_shuffled"] == pytest.approx(found["own_gain"] - found["shuffled_gain"])


def test_policy_sums_by_hand() -> None:
    new, old = torch.tensor([[[[-1.0, -2.0], [-3.0, -0.5]]]]), torch.tensor([[[[-1.5, -2.0], [-2.0, -0.5]]]])
    sums = stats.policy_sums(new, old, torch.ones_like(new), torch.tensor([[True]]), cap=1.2)
    found = stats.summarise(stats.collect(sums, torch.device("cpu")))
    ratio = (new - old).exp()
    assert found["rollout_dlogp"] == pytest.approx(1.5 / 4)
    assert found["ratio_mean"] == pytest.approx(float(ratio.mean()))
    assert found["ratio_capped_share"] == 0.25
    assert found["effective_sample_share"] == pytest.approx(float(ratio.sum() ** 2 / (4 * ratio.square().sum())))
    assert found["rollout_kl"] == pytest.approx(float((ratio - 1 - (new - old)).mean()))
    hidden = stats.policy_sums(new, old, torch.ones_like(new), torch.tensor([[False]]), cap=1.2)
    assert stats.summarise(stats.collect(hidden, torch.device("cpu"))) == {"anchors": 0.0}


@pytest.mark.parametrize("cache", ["exact", "int4"])
def test_unmatched_temperatures_show_what_was_sampled(cache) -> None:
    """The preset paper samples at 1 and takes log pi at 3: entropy and KL are those of the thoughts that were drawn."""
    sizes = {"tokens": 3, "lookahead": 1, "samples": 2, "rollout_cache": cache}
    found = []
    for config in (preset("paper", **sizes), preset("default", initial_weight=0.0, **sizes)):
        policy = policy_of(llama(), config)
        found.append(stats.summarise(thought_loss(policy, ROWS, config, torch.ones(4), Stream(0, 0), chunk=4).stats))
    paper, matched = found
    names = {
        "thought_entropy",
        "thought_logprob",
        "rollout_kl",
        "rollout_dlogp",
        "ratio_mean",
        "effective_sample_share",
    }
    for name in names:  # the same thoughts of the same model
        assert paper[name] == pytest.approx(matched[name], rel=1e-4, abs=1e-9), name
    assert paper["rollout_kl"] < 1e-9 if cache == "exact" else paper["rollout_kl"] > 1e-6


def test_sums_add_over_micro_batches() -> None:
    config = preset("default", tokens=2, lookahead=2, samples=2)
    policy = policy_of(llama(), config)
    parts = [packed([[6, 5]], 12, seed=1), packed([[9]], 12, seed=2)]
    one = [thought_loss(policy, p, config, torch.ones(4), Stream(0, 0, torch.tensor([i]))) for i, p in enumerate(parts)]
    both = packed([[6, 5]], 12, seed=1)
    rows = type(both)(*(torch.cat([getattr(p, n) for p in parts]) for n in both.__dataclass_fields__))
    whole = thought_loss(policy, rows, config, torch.ones(4), Stream(0, 0, torch.tensor([0, 1])))
    torch.testing.assert_close(one[0].stats + one[1].stats, whole.stats, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(one[0].sums + one[1].sums, whole.sums, rtol=1e-4, atol=1e-4)


def test_an_unknown_sum_is_a_mistake() -> None:
    with pytest.raises(KeyError):
        stats.collect({"rewards": torch.zeros(())}, torch.device("cpu"))
