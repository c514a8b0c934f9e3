"""Which layers of a model suffer most when their keys and values are packed: those to leave at 16 bits.

    layers = quietgoose.sensitive_layers(model, input_ids, count=2, policy="quality")
    cache = quietgoose.ZipCache(model.config, {"preset": "quality", "sixteen_bit_layers": layers})

One layer is packed at a time, all others stay at 16 bits, and what the model predicts after the packed prompt is compared with
what it predicts with nothing packed. Layers 7 and 18 of SmolLM2-135M's thirty at 16 bits bring the retrieval that `quality` loses
from 2.6 points to 1.3 for 0.5 to 0.7 bits a number (docs/results.md). This names 18 and 23 on lookups and 8 and 18 on Wikipedia text:
take text of the kind the cache is for. It costs a forward pass a layer.
Source: ours; that a few layers carry most of the loss is KVTuner's observation (arXiv 2502.04420).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..base.errors import RecipeError
from .hf import ZipCache
from .policy import Policy, resolve_policy


def sensitive_layers(
    model: nn.Module,
    input_ids: Tensor,
    count: int,
    policy: Policy | str | Mapping[str, Any] | None = "quality",
    continuation: int = 64,
) -> tuple[int, ...]:
    """The `count` layers with the largest KL of `layer_sensitivity`, in ascending order, for `sixteen_bit_layers`.

    Raises RecipeError (CFG-050) for a count that is not between 1 and the number of layers that are packed.
    """
    most = len(_packed(model, resolve_policy(policy)))
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= most:
        raise RecipeError(f"sensitive_layers: count = {count!r}: 1 to {most}, the layers packed", code="CFG-050")
    loss = layer_sensitivity(model, input_ids, policy, continuation)
    return tuple(sorted(sorted(loss, key=loss.__getitem__)[-count:]))


@torch.no_grad()
def layer_sensitivity(
    model: nn.Module,
    input_ids: Tensor,
    policy: Policy | str | Mapping[str, Any] | None = "quality",
    continuation: int = 64,
) -> dict[int, float]:
    """Layer -> mean KL in nats a token from the 16-bit prediction, that layer's prompt alone packed.

    model         a causal LM of transformers as it will be used (dtype, device, attention implementation)
    input_ids     int64 [B, T] without padding: text of the kind the cache is for, some thousand tokens in all
    policy        what the layer is packed by; its own `sixteen_bit_layers` are measured too
    continuation  C: the last C tokens of a row are predicted, after the T - C before them

    Raises RecipeError (CFG-050) for another shape, or where no token is left for the prompt.
    """
    if input_ids.ndim != 2 or input_ids.shape[0] < 1:
        raise RecipeError(f"layer_sensitivity: input_ids of shape {tuple(input_ids.shape)}: [B, T]", code="CFG-050")
    if not 1 <= continuation < input_ids.shape[1]:
        raise RecipeError(
            f"layer_sensitivity: continuation = {continuation}: 1 to {input_ids.shape[1] - 1}, so that a prompt of "
            "at least one token is left",
            code="CFG-050",
        )
    settings = replace(resolve_policy(policy), sixteen_bit_layers=())
    packed = _packed(model, settings)

    def predictions(kept: list[int]) -> Iterator[Tensor]:
        return _predictions(model, input_ids, continuation, replace(settings, sixteen_bit_layers=tuple(kept)))

    wanted = list(predictions(packed))
    found: dict[int, float] = {}
    for layer in packed:
        others = [other for other in packed if other != layer]
        total = sum(_kl(p_BCV, q_BCV) for p_BCV, q_BCV in zip(wanted, predictions(others), strict=True))
        found[layer] = float(total) / (input_ids.shape[0] * continuation)
    return found


def _packed(model: nn.Module, policy: Policy) -> list[int]:
    return [layer.layer_index for layer in ZipCache(model.config, policy).zip_layers]


def _predictions(model: nn.Module, input_ids: Tensor, continuation: int, policy: Policy) -> Iterator[Tensor]:
    """Log-probabilities [B, c, V] of the next token, fp32, for one run of columns after another."""
    cache = ZipCache(model.config, policy)
    prompt = input_ids.shape[1] - continuation
    model(input_ids[:, :prompt], past_key_values=cache, use_cache=True, logits_to_keep=1)
    for ids_BC in input_ids[:, prompt:].split(policy.max_query, dim=1):
        logits_BCV = model(ids_BC, past_key_values=cache, use_cache=True).logits
        yield logits_BCV.float().log_softmax(-1)


def _kl(p_BCV: Tensor, q_BCV: Tensor) -> Tensor:
    """Sum over tokens of KL(p || q) in nats."""
    return nn.functional.kl_div(q_BCV, p_BCV, log_target=True, reduction="sum")
