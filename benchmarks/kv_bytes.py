"""True compression of every preset by count of bytes: one layer, bf16, random data, right after a prompt and later.

    python benchmarks/kv_bytes.py [--tokens 4096] [--later 64]

Everything counts: codes, parameters, block tables, bitmap, 16-bit tail, saliency. No GPU is needed.
"""

from __future__ import annotations

import argparse

import torch
from quietgoose.cache import PRESETS, LayerState, Policy

SHAPES = {"LLaMA3-8B (8 KV heads, 128 wide)": (32, 8, 128), "SmolLM2 (3 KV heads, 64 wide)": (9, 3, 64)}


@torch.no_grad()
def ratios(policy: Policy, heads: int, kv_heads: int, width: int, tokens: int, later: int) -> tuple[float, float]:
    """16-bit bytes over the bytes in use: after the prompt, and `later` decoded tokens after it."""
    state = LayerState(
        policy, batch=1, kv_heads=kv_heads, head_dim=width, dtype=torch.bfloat16, device=torch.device("cpu")
    )
    query = torch.randn(1, heads, tokens, width).bfloat16()
    key, value = (torch.randn(1, kv_heads, tokens + later, width).bfloat16() for _ in range(2))
    state.prefill(query, key[:, :, :tokens], value[:, :, :tokens], None, scaling=width**-0.5)
    first = 4 * tokens * kv_heads * width / state.nbytes().total
    for t in range(tokens, tokens + later):
        state.append(key[:, :, t : t + 1], value[:, :, t : t + 1])
    return first, 4 * (tokens + later) * kv_heads * width / state.nbytes().total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--later", type=int, default=64)
    given = parser.parse_args()
    torch.manual_seed(0)
    for shape, sizes in SHAPES.items():
        for name, policy in PRESETS.items():
            first, after = ratios(policy, *sizes, given.tokens, given.later)
            print(f"{shape:34s} {name:9s} {first:.2f}x after the prompt, {after:.2f}x after {given.later} more")


if __name__ == "__main__":
    main()
