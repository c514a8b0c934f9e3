"""What waits for the device, found before it is captured in a CUDA graph, which can hold no wait."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


@contextmanager
def refusing_waits(refusal: Callable[[], Exception]) -> Iterator[None]:
    """`refusal`'s error for whatever inside waits for the device (PyTorch's debug mode of synchronisations says so)."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    except RuntimeError as error:
        if "synchronizing CUDA operation" not in str(error):
            raise
        raise refusal() from error
    finally:
        torch.cuda.set_sync_debug_mode(before)
