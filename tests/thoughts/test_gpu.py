"""On a GPU: what is captured is what runs uncaptured, and the loss is that of the CPU. `pytest -m gpu tests/thoughts`."""

from __future__ import annotations

import dataclasses
import gc
import warnings
from typing import Any

import pytest
import torch
from quietgoose.kernels.testing import assert_close
from quietgoose.routing.on_top import TopLora
from quietgoose.routing.sites import AdapterLayout, all_sites
from quietgoose.thoughts.anchors import choose_anchors, term_counts
from quietgoose.thoughts.captured_pass import PassGraphs
from quietgoose.thoughts.captured_prefix import PrefixGraphs
from quietgoose.thoughts.config import ThoughtConfig, preset
from quietgoose.thoughts.generation import ThoughtState, attach_thoughts
from quietgoose.thoughts.gradient import Stream, thought_loss
from quietgoose.thoughts.policy import ModelPolicy
from quietgoose.thoughts.prefix import run_prefix
from quietgoose.thoughts.rollout import RolloutGraphs, rollout

from .generation_tools import GREEDY, padded, prompts, thinking_model, thoughts
from .naive import TestRows, llama, packed, policy_of, qwen2
from .test_gradient import CONFIGS, gradients, weights_of

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


def test_inputs_on_the_cpu_move_to_the_model() -> None:
    """As transformers' own loop lets them be: a tokenizer's tensors, padded, by name or by place; greedy text is the same."""
    model = thinking_model(dtype=torch.float32).to("cuda")
    ids, mask = padded(prompts(), [0, 3])
    wanted = model.generate(ids.cuda(), attention_mask=mask.cuda(), thoughts=thoughts(), **GREEDY)
    by_name = model.generate(input_ids=ids, attention_mask=mask, thoughts=thoughts(), **GREEDY)
    by_place = model.generate(ids, attention_mask=mask, thoughts=True, **GREEDY)
    assert wanted.sequences.is_cuda
    assert by_name.sequences.is_cuda
    assert torch.equal(by_name.sequences, wanted.sequences)
    assert torch.equal(by_name.thoughts.tokens_BNST, wanted.thoughts.tokens_BNST)
    assert torch.equal(by_place, wanted.sequences)
    assert ids.device.type == "cpu"


def test_generating_from_what_a_tokenizer_returns() -> None:
    """Inputs are on the CPU, the model is not: plain `generate` takes them, and so does the thinking one."""
    config = preset("default", tokens=2, lookahead=1)
    policy = policy_on_gpu(config)
    attach_thoughts(policy.model, ThoughtState(policy.parameters, config))
    ids = torch.randint(3, 20, (2, 5), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])}
    options = {"max_new_tokens": 3, "do_sample": False, "thoughts": True}
    found = policy.model.generate(**inputs, **options)
    assert found.is_cuda
    assert torch.equal(found, policy.model.generate(**{n: x.cuda() for n, x in inputs.items()}, **options))
    assert torch.equal(found[:, :5].cpu(), ids)
    assert policy.model.generate(ids, **options).is_cuda, "the first argument too"


def test_a_lora_on_top_goes_where_the_model_goes() -> None:
    model, tokens = llama(head_dim=64), torch.arange(3, 11).view(1, 8)
    layout = AdapterLayout.uniform(all_sites(model), 2)
    top = TopLora(model, layout, 1.0)
    top.use(torch.randn(layout.numel, generator=torch.Generator().manual_seed(0)) * 0.1)
    with torch.no_grad():
        before = model(tokens).logits
        assert_close("logits", model.cuda()(tokens.cuda()).logits.cpu(), before, limit=1e-4)
        rounded = model.to(torch.bfloat16)(tokens.cuda()).logits
        assert_close("logits", rounded.float().cpu(), before, limit=5e-2)
        assert_close("logits", model.cpu().float()(tokens).logits, before, limit=5e-2)


# --------------------------------------------------------------------------------------------- the captured gradient pass

TEXTS = ([[6, 5], [9], []], [[13], [4, 4], [3]], [[13], [13], [13]], [[5, 7], [2, 8], [6]])
"""Rows of 13 positions: chunks of 5 anchors have two that fill the last one up."""
CAPTURED = {
    "default": ("default", {}), "all at once": ("default", {"chunk": None}), "paper": ("paper", {}), "rlp": ("rlp", {}),
    "distil": ("distil", {}), "entropy bonus": ("entropy bonus", {}), "recomputed": ("default", {"recompute": True}),
    "banned": ("bounded", {"recompute": True, "chunk": 7}),
}  # fmt: skip
WHERE = [
    *((name, llama, False) for name in CAPTURED),
    *((name, llama, True) for name in ("default", "recomputed", "rlp")),
    *((name, qwen2, False) for name in ("default", "banned")),
]
"""qwen2 has tied embeddings, biases and grouped queries."""


def captures() -> dict[str, Any]:
    graphs = RolloutGraphs()
    return {"graphs": graphs, "passes": PassGraphs(graphs.pool), "prefixes": PrefixGraphs()}


def trained_policy(config: ThoughtConfig, make: Any, dtype: torch.dtype, frozen: bool) -> ModelPolicy:
    policy = policy_of(make(), config)
    policy.model.to(device="cuda", dtype=dtype).requires_grad_(not frozen)
    policy.parameters.cuda()
    return policy


def compare(policy: ModelPolicy, config: ThoughtConfig, options: dict, limit: float, kept: dict) -> None:
    """Four micro-batches: text, loss weights and trained numbers change between them; some need a mask, one does not."""
    for step, text in enumerate(TEXTS):
        cpu = packed(text, 13, seed=step)
        rows, weights = on_gpu(cpu), (weights_of(config, cpu) * (1 + step)).cuda()
        got = thought_loss(policy, rows, config, weights, Stream(3, step), **options, **kept)
        slopes = {name: slope.clone() for name, slope in gradients(policy, got.total).items()}
        plain = {name: value for name, value in options.items() if name != "recompute"}
        want = thought_loss(policy, rows, config, weights, Stream(3, step), **plain, thoughts=got.thoughts)
        wanted = gradients(policy, want.total)
        assert_close("sums", got.sums, want.sums, limit=limit)
        assert_close("stats", got.stats, want.stats, limit=max(limit, 1e-3))
        scale = max(float(g.norm()) for g in wanted.values())
        assert scale > 1e-3
        for key, slope in wanted.items():
            assert float((slopes[key] - slope).norm()) <= limit * max(float(slope.norm()), 1e-2 * scale), (step, key)
        with torch.no_grad():
            for parameter in [*policy.model.parameters(), *policy.parameters.parameters()]:
                parameter.mul_(0.95 if step % 2 else 1.05)


@pytest.mark.parametrize(("name", "make", "frozen"), WHERE)
def test_the_captured_gradient_is_the_uncaptured(name: str, make: Any, frozen: bool) -> None:
    config, kept = CONFIGS[CAPTURED[name][0]], captures()
    policy = trained_policy(config, lambda: make(head_dim=16), torch.float32, frozen)
    compare(policy, config, {"chunk": 5, **CAPTURED[name][1]}, 1e-4, kept)
    (made, _) = next(iter(kept["passes"]._passes._made.values()))
    assert made.replayed.graph is not None, "it was captured"
    assert not kept["passes"].refused
    assert not kept["prefixes"].refused


@pytest.mark.parametrize("recompute", [False, True])
def test_the_captured_gradient_of_a_bf16_model(recompute: bool) -> None:
    config = CONFIGS["default"]
    policy = trained_policy(config, lambda: llama(head_dim=64), torch.bfloat16, frozen=False)
    compare(policy, config, {"chunk": 5, "recompute": recompute}, 3e-2, captures())


def test_a_stage_of_the_curriculum_after_another() -> None:
    """Other sizes and coefficients are other graphs in one pool; the first come back as they were."""
    policy, kept = (
        trained_policy(CONFIGS["default"], lambda: llama(head_dim=16), torch.float32, frozen=False),
        captures(),
    )
    for name in ("default", "distil", "one token, one position", "default", "distil"):
        compare(policy, CONFIGS[name], {"chunk": 5}, 1e-4, kept)


def test_replays_take_no_more_memory() -> None:
    config, kept = CONFIGS["default"], captures()
    policy, reserved = trained_policy(config, lambda: llama(head_dim=16), torch.float32, frozen=False), []
    for step in range(5):
        cpu = packed(TEXTS[0], 13, seed=step)
        loss = thought_loss(
            policy, on_gpu(cpu), config, weights_of(config, cpu).cuda(), Stream(0, step), chunk=5, **kept
        )
        loss.total.backward()
        del loss
        gc.collect()
        torch.cuda.empty_cache()
        reserved.append(torch.cuda.memory_reserved())
    assert reserved[4] == reserved[2], reserved


def test_a_model_that_waits_says_so_once_and_goes_on() -> None:
    config = CONFIGS["default"]
    policy = trained_policy(config, lambda: llama(head_dim=16), torch.float32, frozen=True)
    policy.model.base_model.layers[0].mlp.register_forward_hook(
        lambda m, x, y: y * (1.0 if y.sum().item() < 1e9 else 0.0)
    )
    cpu = packed(TEXTS[0], 13)
    rows, weights, kept = on_gpu(cpu), weights_of(config, cpu).cuda(), captures()
    del kept["graphs"]  # a rollout that waits is an error (THT-005)
    with pytest.warns(UserWarning, match="QG-THT-007"):
        first = thought_loss(policy, rows, config, weights, Stream(0, 0), chunk=5, **kept)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = thought_loss(policy, rows, config, weights, Stream(0, 0), chunk=5, **kept)
    want = thought_loss(policy, rows, config, weights, Stream(0, 0), chunk=5)
    assert kept["passes"].refused
    assert kept["prefixes"].refused
    for loss in (first, second):
        assert_close("sums", loss.sums, want.sums, limit=1e-5)
