"""What must hold on this device before kv_cache.py times anything: the captured step computes what the model computes.

A small model of the same family; one fixed token sequence is fed to every side, so a near tie cannot derail the rest.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from measure import say
from random_models import build, tiny
from torch import Tensor

PROMPT, STEPS, ROWS = 150, 40, 3
FLUSH = 16
EXACT = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # relative RMSE of logits, median over steps
PACKED = {torch.float32: 1e-3, torch.bfloat16: 6e-2}  # bf16 rounding may move a token between 4 and 2 bits


def relative(found: Tensor, expected: Tensor) -> float:
    found, expected = found.double(), expected.double()
    return float((found - expected).norm() / expected.norm())


def eager_logits(model: Any, cache: Any, ids: Tensor, mask: Tensor, fed: Tensor) -> list[Tensor]:
    """Logits after the prompt and after each fed token, by the model's own forward."""
    out = model(
        ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp_min(0),
        past_key_values=cache,
        logits_to_keep=1,
    )
    found = [out.logits[:, -1].clone()]
    for token in fed.unbind(1):
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        place = mask.sum(1, keepdim=True) - 1
        out = model(token[:, None], attention_mask=mask, position_ids=place, past_key_values=cache)
        found.append(out.logits[:, -1].clone())
    return found


def captured_logits(model: Any, cache: Any, ids: Tensor, mask: Tensor, fed: Tensor, **settings: Any) -> list[Tensor]:
    """The same from the captured step."""
    from quietgoose.cache.decode import compile_decode

    decode = compile_decode(model, cache, **settings)
    try:
        found = [decode.prefill(ids, mask).clone()]
        return found + [decode.step(token).clone() for token in fed.unbind(1)]
    finally:
        decode.close()


def gate(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """{"green": bool, check: median relative error or the error's text}; every check always runs."""
    from quietgoose.cache.decode_static import StaticKV
    from quietgoose.cache.hf import ZipCache
    from quietgoose.cache.policy import Policy
    from transformers import DynamicCache

    model = build(tiny(), device, dtype)
    model.set_attn_implementation("sdpa")
    ids = torch.randint(3, 500, (ROWS, PROMPT), device=device)
    fed = torch.randint(3, 500, (ROWS, STEPS), device=device)
    mask = torch.ones_like(ids)
    mask[1, :37] = 0
    lossless = Policy(high_bits=16, low_bits=16, flush_every=FLUSH)
    packed = Policy(salient_ratio=0.6, flush_every=FLUSH)
    capacity = PROMPT + STEPS + 8
    exact = eager_logits(model, DynamicCache(config=model.config), ids, mask, fed)
    fuse = ["none", "layer"] if device.type == "cuda" else ["none"]
    checks: dict[str, tuple[Callable[[], tuple[list[Tensor], list[Tensor]]], float]] = {}
    for how in fuse:
        checks[f"static {how}"] = (
            lambda how=how: (
                captured_logits(model, StaticKV(model.config, capacity=capacity), ids, mask, fed, fuse=how), exact
            ), EXACT[dtype],
        )  # fmt: skip
        checks[f"zip lossless {how}"] = (
            lambda how=how: (
                captured_logits(model, ZipCache(model.config, lossless, capacity), ids, mask, fed, fuse=how), exact
            ), EXACT[dtype],
        )  # fmt: skip
        checks[f"zip packed {how}"] = (
            lambda how=how: (
                captured_logits(model, ZipCache(model.config, packed, capacity), ids, mask, fed, fuse=how),
                eager_logits(model, ZipCache(model.config, packed, capacity), ids, mask, fed),
            ), PACKED[dtype],
        )  # fmt: skip
    found: dict[str, Any] = {"green": True}
    for name, (check, limit) in checks.items():
        try:
            errors = [relative(a, b) for a, b in zip(*check(), strict=True)]
            found[name] = statistics.median(errors)
            good = found[name] <= limit and all(error == error for error in errors)
        except Exception as error:  # a gate reports every failure, then refuses
            found[name], good = f"{type(error).__name__}: {error}"[:400], False
        found["green"] &= good
        say(f"gate {name}:", found[name], "" if good else f"RED (limit {limit})")
    return found
