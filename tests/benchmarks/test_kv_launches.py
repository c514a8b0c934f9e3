"""A prefill with a ZipCache launches few things a layer and never waits for the device, whatever the prompt looks like."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

pytest.importorskip("triton")

from kv_launches import Launches, launches, stubbed
from quietgoose.cache import LayerState, Policy

OURS = ("triton: _probe_lse", "triton: _column_sums", "triton: _place", "triton: _pack")


def split(found: Counter[str]) -> tuple[int, int, int]:
    """(torch operations, Triton kernels, reads on the host)."""
    kernels = sum(n for name, n in found.items() if name.startswith("triton"))
    reads = sum(n for name, n in found.items() if name.startswith("read"))
    return sum(found.values()) - kernels - reads, kernels, reads


@pytest.mark.parametrize("padded", [False, True])
def test_a_layer_adds_few_launches_to_a_dynamic_cache(padded: bool) -> None:
    base, _ = launches("dynamic", 2, 40, padded)
    kept, once = launches("kept:paper", 2, 40, padded)
    new, _ = launches("new:paper", 2, 40, padded)
    assert {name: n for name, n in kept.items() if n and name.startswith("triton")} == dict.fromkeys(OURS, 1)
    # of a kept cache: probe rows are gathered, block tables emptied; 66 before they were counted
    assert split(kept)[0] <= split(base)[0] + 2
    assert split(new)[0] <= split(base)[0] + 10
    assert split(kept)[2] == split(new)[2] == 0
    assert split(once)[0] < 140, "what a forward does once"


POLICIES = {
    "paper": Policy(salient_ratio=0.6, flush_every=32),
    "sinks": Policy(salient_ratio=0.6, flush_every=32, sink_tokens=3, recent_tokens=10),
    "all": Policy(salient_ratio=1.0, flush_every=32, sink_tokens=3),
    "random": Policy(salient_ratio=0.5, saliency="random"),  # pyright: ignore[reportArgumentType]
}


@pytest.mark.parametrize("policy", list(POLICIES))
def test_prompts_chunks_and_flushes_never_read_the_device(policy: str) -> None:
    counter, dtype = Launches(), torch.bfloat16
    valid = torch.ones(2, 60, dtype=torch.bool)
    valid[1, :23] = False
    query, key = torch.randn(2, 4, 60, 64).to(dtype), torch.randn(2, 2, 60, 64).to(dtype)
    with stubbed(lambda name: None):
        state = LayerState(POLICIES[policy], batch=2, kv_heads=2, head_dim=64, dtype=dtype, device="cpu")
        with counter:
            for mask in (valid, None):
                state.prefill(query, key, key, mask, scaling=0.125)
                state.append(key[:, :, :9], key[:, :, :9])
            state.flush()
    assert split(counter.found)[2] == 0, counter.found
