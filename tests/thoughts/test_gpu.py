"""On a GPU: the captured rollout is the uncaptured one, and the loss is that of the CPU. `pytest -m gpu tests/thoughts`."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from quietgoose.kernels.testing import assert_close
from quietgoose.thoughts.anchors import choose_anchors, term_counts
from quietgoose.thoughts.config import ThoughtConfig, preset
from quietgoose.thoughts.gradient import Stream, thought_loss
from quietgoose.thoughts.policy import ModelPolicy
from quietgoose.thoughts.prefix import run_prefix
from quietgoose.thoughts.rollout import RolloutGraphs, rollout

from .naive import TestRows, llama, packed, policy_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def policy_on_gpu(config: ThoughtConfig, dtype: torch.dtype = torch.bfloat16) -> ModelPolicy:
    policy = policy_of(llama(head_dim=64), config)
    policy.model.to(device="cuda", dtype=dtype).requires_grad_(False)
    policy.parameters.cuda()
    return policy


def on_gpu(rows: TestRows) -> TestRows:
    return TestRows(*(getattr(rows, f.name).cuda() for f in dataclasses.fields(rows)))


@pytest.mark.parametrize("kind", ["exact", "int8", "int4"])
def test_captured_rollout_equals_the_uncaptured(kind) -> None:
    config = preset("default", tokens=6, lookahead=2, samples=2, rollout_cache=kind, anchors="random", share=0.5)
    policy = policy_on_gpu(config)
    graphs = RolloutGraphs()
    for seed in range(3):
        rows = on_gpu(packed([[6, 5], [9], []], 12, seed=seed))
        with torch.no_grad():
            prefix = run_prefix(policy.model, rows)
        anchors = choose_anchors(config, rows, seed=0, step=seed)
        found = [
            rollout(
                policy, policy.tensors(), prefix, rows, anchors, config, torch.Generator().manual_seed(seed), graphs=g
            )
            for g in (None, graphs)
        ]
        valid = anchors.valid_BA
        assert torch.equal(found[0].tokens_BAST[valid], found[1].tokens_BAST[valid])
        assert_close("logprob", found[1].logprob_BAST[valid], found[0].logprob_BAST[valid], limit=1e-3)


def test_leaves_bind_in_a_captured_rollout() -> None:
    """New START and END embeddings reach a step that was captured with the old ones."""
    config = preset("default", tokens=6, lookahead=1, samples=2)
    policy, graphs = policy_on_gpu(config, torch.float32), RolloutGraphs()
    rows = on_gpu(packed([[6, 5], [9], []], 12))
    found = []
    for _ in range(2):
        with torch.no_grad():
            prefix = run_prefix(policy.model, rows)
        anchors = choose_anchors(config, rows, seed=0, step=0)
        for g in (graphs, None):
            generator = torch.Generator().manual_seed(0)
            found.append(rollout(policy, policy.tensors(), prefix, rows, anchors, config, generator, graphs=g))
        with torch.no_grad():
            policy.parameters.meta_2D.mul_(-3)
    valid = found[0].anchors.valid_BA
    assert_close("before", found[0].logprob_BAST[valid], found[1].logprob_BAST[valid], limit=1e-4)
    assert_close("after", found[2].logprob_BAST[valid], found[3].logprob_BAST[valid], limit=1e-4)
    assert not torch.equal(found[0].logprob_BAST[valid], found[2].logprob_BAST[valid])


@pytest.mark.parametrize("rows", [packed([[6, 5], [9], []], 12), packed([[12], [12]], 12)])
def test_loss_equals_the_cpu(rows) -> None:
    """Same seeds, same thoughts, same loss: fp32, attention kernels of the GPU against those of the CPU."""
    config = preset("default", tokens=3, lookahead=3, samples=2)
    weights = (1 / term_counts(config, rows, seed=0, step=0)).float()
    on_cpu = policy_of(llama(head_dim=64), config)
    on_cpu.model.requires_grad_(False)
    want = thought_loss(on_cpu, rows, config, weights, Stream(0, 0), chunk=4)
    want.total.backward()
    policy = policy_on_gpu(config, torch.float32)
    got = thought_loss(policy, on_gpu(rows), config, weights.cuda(), Stream(0, 0), chunk=4, graphs=RolloutGraphs())
    got.total.backward()
    valid = want.thoughts.anchors.valid_BA
    assert torch.equal(got.thoughts.tokens_BAST.cpu()[valid], want.thoughts.tokens_BAST[valid])
    assert_close("sums", got.sums[:2].cpu(), want.sums[:2], limit=1e-4)
    for (name, one), two in zip(policy.parameters.named_parameters(), on_cpu.parameters.parameters()):
        assert_close(name, one.grad.cpu(), two.grad, limit=1e-3)
