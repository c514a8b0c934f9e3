"""One compiled kernel for every prompt: none is compiled in the middle of decoding because a length is unusual.

Triton compiles anew for an integer that is 1, for one that 16 divides, for one beyond 32 bits, and for an address that 16
does not divide. The keys under which it looks for a compiled kernel are taken from its own binder while caches of many
lengths are filled and decode; launches do nothing, so no GPU is needed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache

import pytest

pytest.importorskip("triton")

PROGRAM = """
import json
import sys
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature
import quietgoose.kernels.cached_attention as attention
import quietgoose.kernels.quantize as quantize
import quietgoose.kernels.saliency as saliency
from quietgoose.cache.decode_triton import write_last
from quietgoose.cache.policy import resolve_policy
from quietgoose.cache.state import LayerState
from quietgoose.kernels.cached_attention import launch

backend, binders, keys = make_backend(GPUTarget("cuda", 90, 32)), {}, {}


def look_up(kernel, grid):
    def go(*given, **named):
        if kernel not in binders:
            binders[kernel] = create_function_from_signature(kernel.signature, kernel.params, backend)
        bound, special, options = binders[kernel](*given, **named)
        named = dict(zip(bound, special))
        keys.setdefault(kernel.__name__, {}).setdefault(str((special, options)), {k: str(v) for k, v in named.items()})
    return go


JITFunction.__getitem__ = look_up
for room in (attention, quantize, saliency):
    room.takes_triton = lambda implementation, tensor, problem=None: implementation != "reference" and not problem
launch._multiprocessors = lambda device: 132

HEADS, KV_HEADS, WIDTH = 4, 2, 64


def new(rows, n, heads=KV_HEADS):
    return torch.zeros(rows, n, heads, WIDTH, dtype=torch.bfloat16).transpose(1, 2)  # as a model makes them


def decode(state, tokens, queries=1):
    for _ in range(tokens):
        state.prepare(queries)
        key, value = new(state.batch, queries), new(state.batch, queries)
        state.write(key, value)
        if queries == 1:
            write_last(key, value, state.tail.key, state.tail.value, state.tail.length)
        state.attend(new(state.batch, queries, HEADS), scaling=0.1)
        state.advance(queries)


def live(n, preset, rows, capacity, padded, chunks):
    policy = resolve_policy(preset)
    state = LayerState(policy, batch=rows, kv_heads=KV_HEADS, head_dim=WIDTH, dtype=torch.bfloat16, device="cpu",
                       capacity=capacity, expected=n)
    for size in chunks(n):
        valid = torch.ones(rows, size, dtype=torch.bool) if padded else None
        state.prefill(new(rows, size, HEADS), new(rows, size), new(rows, size), valid, scaling=0.1)
    decode(state, 9)
    for _ in range(4):  # flushes, of which some let the arenas grow
        decode(state, policy.flush_every // 16, 16)
    decode(state, 2)


given = json.loads(sys.argv[1])
for n in given["lengths"]:
    live(n, given["preset"], given["rows"], n + 2000 if given["static"] else None, given["padded"],
         (lambda n: [n // 2, n - n // 2]) if given["chunked"] else (lambda n: [n]))
print(json.dumps({name: list(found.values()) for name, found in keys.items()}))
"""
LENGTHS = [17, 18, 31, 32, 33, 64, 100, 127, 128, 129, 135, 160, 255, 256, 257, 500, 512, 513, 1000, 1016, 1017, 1024, 1025,
           1100, 1537, 2048, 2050, 3001, 4096, 4097, 6007]  # fmt: skip


@cache
def keys_of(**given) -> dict[str, list[dict[str, str]]]:
    """For each kernel the different keys, each as {parameter: (type, what is assumed of it)}."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    settings = {"preset": "paper", "rows": 1, "static": False, "padded": False, "chunked": False, "lengths": LENGTHS}
    command = [sys.executable, "-c", PROGRAM, json.dumps(settings | given)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def differing(keys: list[dict[str, str]]) -> dict[str, set[str]]:
    return {name: found for name in keys[0] if len(found := {key[name] for key in keys}) > 1}


KERNELS = {"_place", "_peaks", "_pack", "_probe_lse", "_column_sums", "attend_kernel", "reduce_kernel", "_write_last"}
# queries of 16 tokens differ from those of one by design: in these
BY_QUERIES = {"attend_kernel", "reduce_kernel"}


@pytest.mark.parametrize(
    "given", [{}, {"rows": 3, "padded": True, "static": True}, {"preset": "default", "chunked": True}]
)
def test_a_prompt_of_any_length_finds_its_kernels_compiled(given: dict) -> None:
    found = keys_of(**given)
    assert set(found) == KERNELS
    for name in KERNELS - BY_QUERIES:
        assert len(found[name]) == 1, (name, differing(found[name]))
    assert len(found["attend_kernel"]) <= 2, differing(found["attend_kernel"])
    assert len(found["reduce_kernel"]) <= 2, differing(found["reduce_kernel"])


def test_addresses_and_strides_of_wide_loads_are_known_to_be_multiples_of_16() -> None:
    """What would be lost with them: loads of 16 bytes."""
    found = keys_of()
    wide = {
        "_pack": ["p_key", "p_value", "p_high_key", "p_low_value", "k_row", "k_head", "k_token", "v_row", "v_head", "v_token"],
        "_peaks": ["p_value", "v_row", "v_head", "v_token"],
        "_probe_lse": ["p_query", "p_key", "q_row", "q_head", "q_probe", "k_row", "k_head", "k_token"],
        "_column_sums": ["p_query", "p_key", "p_out", "q_row", "q_head", "q_probe", "k_row", "k_head", "k_token"],
        "attend_kernel": ["p_query", "p_hi_key", "p_lo_value", "p_hi_scale", "p_tail_key", "stride_qh"],
    }  # fmt: skip
    for kernel, names in wide.items():
        for name in names:
            assert {key[name].split(", ")[-1] for key in found[kernel]} == {"'D')"}, (kernel, name, found[kernel])
