"""Thoughts the plain way: one branch at a time through an ordinary forward, full logits, autograd over everything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from quietgoose.thoughts.config import ThoughtConfig
from quietgoose.thoughts.parameters import ThoughtParameters, ThoughtTensors
from quietgoose.thoughts.policy import ModelPolicy
from quietgoose.thoughts.types import PAUSE, Thoughts
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

VOCABULARY = 23
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**(SHAPE | changes))).eval()


def qwen2(seed: int = 0, **changes: Any) -> Qwen2ForCausalLM:
    """GQA with three queries a head, and biases on q, k, v that are not zero."""
    torch.manual_seed(seed)
    shape = SHAPE | {"num_attention_heads": 6, "tie_word_embeddings": True} | changes
    model = Qwen2ForCausalLM(Qwen2Config(**shape)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.3)
    return model


@dataclass(frozen=True)
class TestRows:
    """thoughts/types.py `Rows`."""

    __test__ = False
    tokens_BT: Tensor
    labels_BT: Tensor
    position_BT: Tensor
    segment_BT: Tensor

    def with_tokens(self, tokens_BT: Tensor) -> TestRows:
        """The same documents with other tokens; labels follow where there are labels."""
        labels = torch.where(self.labels_BT == -100, -100, tokens_BT.roll(-1, 1))
        return TestRows(tokens_BT, labels, self.position_BT, self.segment_BT)


def packed(lengths: list[list[int]], width: int, seed: int = 0, unlabelled: int = 0) -> TestRows:
    """Rows of documents of these lengths, padded at the end; the first `unlabelled` tokens of each have no label."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), width)
    tokens, labels = torch.zeros(shape, dtype=torch.long), torch.full(shape, -100)
    position, segment = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.int32)
    for row, documents in enumerate(lengths):
        start = 0
        for number, length in enumerate(documents, 1):
            part = slice(start, start + length)
            text = torch.randint(3, VOCABULARY, (length,), generator=generator)
            tokens[row, part], segment[row, part], position[row, part] = text, number, torch.arange(length)
            labels[row, start + unlabelled : start + length - 1] = text[unlabelled + 1 :]
            start += length
        position[row, start:] = torch.arange(width - start)
    return TestRows(tokens, labels, position, segment)


def policy_of(model: nn.Module, config: ThoughtConfig, seed: int = 1, wide: bool = False) -> ModelPolicy:
    """Thoughts on `model`; the head's last layer is not zero, so that w depends on its input. wide: everything fp64."""
    parameters = ThoughtParameters.from_token(model, 5, config, seed)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(seed)
        for parameter in [parameters.meta_2D, *[p for n, p in parameters.named_parameters() if n == "head_4"]]:
            parameter += torch.randn(parameter.shape, generator=generator) * 0.3
    if wide:
        model.double()
        parameters.double()
    return ModelPolicy(model, parameters)


def hidden_of(model: Any, embeds_TD: Tensor) -> Tensor:
    """Last hidden states [T, D] of one sequence, positions 0, 1, ..."""
    positions = torch.arange(embeds_TD.shape[0])[None]
    return model.base_model(inputs_embeds=embeds_TD[None], position_ids=positions, use_cache=False).last_hidden_state[0]


def document_of(rows: TestRows, row: int, index: int) -> tuple[int, int]:
    """(start, stop) of the document of a position."""
    same = (rows.segment_BT[row] == rows.segment_BT[row, index]).nonzero().flatten()
    return int(same[0]), int(same[-1]) + 1


def naive_branch(
    model: Any, thought: ThoughtTensors, rows: TestRows, row: int, index: int, tokens: list[int], lookahead: int
) -> tuple[Tensor, Tensor]:
    """(hidden of the ordinary document [n, D], hidden of the branch [T + 2 + J - 1 or less, D])."""
    table = model.get_input_embeddings()
    start, stop = document_of(rows, row, index)
    text = rows.tokens_BT[row, start : index + 1]
    true = rows.tokens_BT[row, index + 1 : min(index + lookahead, stop)]
    start_1D, end_1D = thought.meta_2D[:1], thought.meta_2D[1:]
    inner = torch.cat([start_1D if t == PAUSE else table(torch.tensor([t])) for t in tokens])
    branch = torch.cat([table(text), start_1D, inner, end_1D, table(true)])
    return hidden_of(model, table(rows.tokens_BT[row, start:stop])), hidden_of(model, branch)[len(text) :]


def naive_mix(thought: ThoughtTensors, base: Tensor, talk: Tensor) -> Tensor:
    """h = (1 - w) h_base + w h_thought, written out."""
    if thought.kind == "thought":
        return talk
    w1, b1, w2, b2, w3 = thought.head
    raw = functional.relu(functional.relu(torch.cat([base, talk], -1) @ w1.T + b1) @ w2.T + b2) @ w3.T
    w0 = torch.tensor(thought.initial_weight, dtype=base.dtype)
    w = torch.sigmoid(torch.log(w0 / (1 - w0)) + raw) if thought.kind == "bounded" else w0 + raw
    return (1 - w) * base + w * talk


def naive_loss(
    policy: ModelPolicy, rows: TestRows, config: ThoughtConfig, weights_M: Tensor, thoughts: Thoughts
) -> tuple[Tensor, Tensor]:
    """(total with its graph, sums [4]) of the terms, given the thoughts that were sampled."""
    model, thought = policy.model, policy.parameters.tensors()
    sums = [torch.zeros((), dtype=thought.meta_2D.dtype) for _ in range(4)]
    keep = [token for token in range(VOCABULARY) if token not in config.banned]
    log = lambda h: functional.log_softmax(model.lm_head(h), -1)  # noqa: E731
    for row in range(rows.tokens_BT.shape[0]):
        for index in range(rows.tokens_BT.shape[1]):
            if rows.labels_BT[row, index] != -100:
                start, stop = document_of(rows, row, index)
                text = hidden_of(model, model.get_input_embeddings()(rows.tokens_BT[row, start:stop]))
                sums[0] = sums[0] - log(text[index - start])[rows.labels_BT[row, index]]
    anchors = thoughts.anchors
    for row, slot in anchors.valid_BA.nonzero().tolist():
        index = int(anchors.index_BA[row, slot])
        start, stop = document_of(rows, row, index)
        rewards, logprobs = [], []
        for sample in range(config.samples):
            tokens = thoughts.tokens_BAST[row, slot, sample].tolist()
            base, branch = naive_branch(model, thought, rows, row, index, tokens, config.lookahead)
            reward = torch.zeros_like(sums[0])
            for j in range(config.lookahead):
                if index + j >= stop or rows.labels_BT[row, index + j] == -100:
                    continue
                label, h0 = rows.labels_BT[row, index + j], base[index + j - start]
                mixed = log(naive_mix(thought, h0, branch[config.tokens + 1 + j]))
                sums[1] = sums[1] - mixed[label]
                reward = reward + (mixed[label] - log(h0)[label]).detach()
                if config.distil_weight:
                    teacher = mixed.detach()
                    sums[3] = sums[3] + (teacher.exp() * (teacher - log(h0))).sum()
            rewards.append(reward)
            if PAUSE not in tokens:
                logits = model.lm_head(branch[: config.tokens]) / config.policy_temperature
                logits = logits.index_fill(-1, torch.tensor(config.banned, dtype=torch.long), -torch.inf)
                logprobs.append(functional.log_softmax(logits, -1)[range(config.tokens), tokens])
                if config.has_policy:
                    entropy = torch.distributions.Categorical(logits=logits[:, keep]).entropy().sum()
                    sums[2] = sums[2] - config.entropy_bonus / config.beta * entropy
        if config.has_policy:
            sums[2] = sums[2] + _naive_policy(
                config, torch.stack(rewards), torch.stack(logprobs), thoughts.logprob_BAST[row, slot]
            )
    stacked = torch.stack(sums)
    return (weights_M * stacked).sum(), stacked.detach()


def _naive_policy(config: ThoughtConfig, reward_S: Tensor, logprob_ST: Tensor, old_ST: Tensor) -> Tensor:
    advantage_S = reward_S - reward_S.mean()
    if config.advantage == "one_sided":
        advantage_S = advantage_S.clamp_min(0)
    if config.advantage == "leave_one_out" and config.samples > 1:
        others = (reward_S.sum() - reward_S) / (config.samples - 1)
        advantage_S = reward_S - others
    ratio_ST = (logprob_ST - old_ST).exp()
    if config.clip is not None:
        bounded_ST = ratio_ST.clamp(1 - config.clip, 1 + config.clip)
        return -torch.minimum(ratio_ST * advantage_S[:, None], bounded_ST * advantage_S[:, None]).sum()
    weight_ST = ratio_ST.detach().clamp_max(config.ratio_cap) if config.ratio_cap is not None else 1.0
    return -(weight_ST * advantage_S[:, None] * logprob_ST).sum()
