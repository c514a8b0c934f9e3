"""Few bits for thoughts: channels as real keys have them keep their numbers, and all bytes are counted."""

from __future__ import annotations

import pytest
import torch
from quietgoose.thoughts.storage import ThoughtStore

SHAPE = (2, 3, 4, 2, 5, 16)  # B, K, A, S, N, C


def channels(*leading: int, seed: int) -> torch.Tensor:
    """Channels far from zero and of very different spread."""
    drawn = torch.randn(*leading, SHAPE[-1], generator=torch.Generator().manual_seed(seed))
    spread = torch.logspace(-1, 1, SHAPE[-1])
    return 30 * torch.linspace(-1, 1, SHAPE[-1]) + spread * drawn


def stored(kind: str, text: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    store = ThoughtStore(kind, 1, SHAPE, torch.float32, torch.device("cpu"))  # type: ignore[arg-type]
    if text is not None:
        store.measure([text], [text])
    for slot in range(SHAPE[4]):
        step = x[..., slot : slot + 1, :]
        keys, values = store.append(0, torch.tensor([slot]), step, step)
    torch.testing.assert_close(keys, values)
    return keys


@pytest.mark.parametrize(("kind", "bound"), [("int4", 0.5), ("int8", 0.03)])
def test_every_channel_keeps_its_numbers(kind: str, bound: float) -> None:
    text, x = channels(1, SHAPE[1], 40, seed=0), channels(*SHAPE[:5], seed=1)
    spread = torch.logspace(-1, 1, SHAPE[-1])

    def worst(found: torch.Tensor) -> float:
        return float(((found - x) / spread).flatten(0, -2).square().mean(0).sqrt().max())

    assert worst(stored(kind, text, x)) < bound
    assert worst(stored(kind, None, x)) > 10 * bound  # one scale for all channels as they are


@pytest.mark.parametrize("length", [1, 40])
def test_a_channel_that_stands_still_in_the_text_may_move_in_a_thought(length: int) -> None:
    text, x = channels(1, SHAPE[1], length, seed=0), channels(*SHAPE[:5], seed=1)
    text[..., 3] = 7.0
    found = stored("int8", text, x)
    assert found.isfinite().all()
    moved = (found - x).abs().flatten(0, -2).amax(0)
    assert (moved < 0.2 * (x - x.mean((0, 1, 2, 3, 4))).abs().amax()).all()


def test_exact_is_exact_and_bytes_are_all_bytes() -> None:
    x = channels(*SHAPE[:5], seed=1)
    assert torch.equal(stored("exact", channels(1, SHAPE[1], 9, seed=0), x), x)
    numbers, tokens, frames = x.numel(), x.numel() // SHAPE[-1], 2 * SHAPE[1] * SHAPE[-1]
    for kind, codes in (("int8", numbers), ("int4", numbers // 2)):
        store = ThoughtStore(kind, 3, SHAPE, torch.bfloat16, torch.device("cpu"))  # type: ignore[arg-type]
        assert store.nbytes() == 3 * 2 * (codes + 2 * tokens + 4 * frames)
