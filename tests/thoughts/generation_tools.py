"""A small model that thinks, prompts, and the slow way: one row, no cache, plain calls of the model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import transformers
from quietgoose.cache.policy import Policy
from quietgoose.thoughts.config import ThoughtConfig
from quietgoose.thoughts.generation import ThoughtGeneration, ThoughtState, attach_thoughts
from quietgoose.thoughts.parameters import ThoughtParameters
from torch import Tensor

VOCABULARY, T = 61, 3
SHAPE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "vocab_size": VOCABULARY, "max_position_embeddings": 256, "initializer_range": 0.3,
    "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
GREEDY = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "max_new_tokens": 6}
LOSSLESS = Policy(salient_ratio=0.6, high_bits=16, low_bits=16, flush_every=12, recent_tokens=3, sink_tokens=2)


def thinking_model(name: str = "Llama", dtype: torch.dtype = torch.float64, **changes):
    """A random model with random START, END and head, fp64 so that only real differences show."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SHAPE)
    model = (
        getattr(transformers, f"{name}ForCausalLM" if name != "GPT2" else "GPT2LMHeadModel")(config).eval().to(dtype)
    )
    wanted = ThoughtConfig(**({"tokens": T} | changes))
    parameters = ThoughtParameters(torch.randn(32), torch.randn(32), wanted, 0)
    with torch.no_grad():
        for tensor in parameters.parameters():
            tensor += 0.1 * torch.randn_like(tensor)
    return attach_thoughts(model, ThoughtState(parameters, wanted))


def prompts(rows: int = 2, length: int = 5, seed: int = 0) -> Tensor:
    return torch.randint(2, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def padded(ids: Tensor, padding: list[int]) -> tuple[Tensor, Tensor]:
    """Rows moved to the right, with that much padding in front of each."""
    width = ids.shape[1] + max(padding)
    out, mask = torch.zeros(len(padding), width, dtype=torch.int64), torch.zeros(len(padding), width, dtype=torch.int64)
    for row, count in enumerate(padding):
        keep = width - count
        out[row, count:], mask[row, count:] = ids[row, :1].expand(keep), 1
        out[row, width - ids.shape[1] :] = ids[row]
    return out, mask


def thoughts(**settings) -> ThoughtGeneration:
    return ThoughtGeneration(return_thoughts=True, **settings)


class Forwards:
    """Counts the forwards of a model's body."""

    def __init__(self, model) -> None:
        self.count = 0
        self.handle = model.base_model.register_forward_pre_hook(self._one)

    def _one(self, *_) -> None:
        self.count += 1

    def __enter__(self) -> Forwards:
        return self

    def __exit__(self, *_) -> None:
        self.handle.remove()


# the slow way: one row, no cache, plain calls of the model ------------------------------------------------------


@torch.no_grad()
def slow_step(model, ids: Tensor, tokens: int = T) -> tuple[Tensor, list[int], float]:
    """(mixed logits [V], greedy thought, mixing weight) after ids [1, L]."""
    state = model.thought_state
    start, end = state.parameters.meta_2D.to(model.dtype)

    def hidden(x: Tensor) -> Tensor:
        return model(inputs_embeds=x, use_cache=False, output_hidden_states=True).hidden_states[-1][0, -1]

    x = model.get_input_embeddings()(ids)
    base, thought = hidden(x), []
    x = torch.cat([x, start[None, None]], dim=1)
    for _ in range(tokens):
        token = int(model.lm_head(hidden(x)).argmax())
        thought.append(token)
        x = torch.cat([x, model.get_input_embeddings()(torch.tensor([[token]]))], dim=1)
    talk = hidden(torch.cat([x, end[None, None]], dim=1))
    w1, b1, w2, b2, w3 = (p.to(model.dtype) for p in list(state.parameters.parameters())[1:])
    weight = state.config.initial_weight + w3 @ torch.relu(w2 @ torch.relu(w1 @ torch.cat([base, talk]) + b1) + b2)
    return model.lm_head((1 - weight) * base + weight * talk), thought, float(weight)


def slow_text(model, ids: Tensor, new: int, tokens: int = T) -> tuple[list[int], list[list[int]], list[float]]:
    """(new tokens, their thoughts, their weights) of one row, greedily."""
    made, thoughts, weights = [], [], []
    for _ in range(new):
        logits, thought, weight = slow_step(model, ids, tokens)
        made.append(int(logits.argmax()))
        thoughts.append(thought)
        weights.append(weight)
        ids = torch.cat([ids, torch.tensor([[made[-1]]])], dim=1)
    return made, thoughts, weights


@dataclass
class Rows:
    tokens_BT: Tensor
    labels_BT: Tensor
    position_BT: Tensor
    segment_BT: Tensor


def as_rows(tokens: Tensor) -> Rows:
    labels = torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], -100)], dim=1)
    return Rows(tokens, labels, torch.arange(tokens.shape[1]).expand_as(tokens), torch.ones_like(tokens))
