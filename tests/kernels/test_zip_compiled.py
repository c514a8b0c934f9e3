"""The quantize and saliency kernels compile for an H100 on a machine without one, fit its shared memory, and keep every
fp32 operation by itself: codes are equal bit for bit only while no product and sum are fused."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

PROGRAM = """
import json
import torch
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from quietgoose.kernels.quantize import BitTables, KeyRounding, append_packed, append_ranked, empty_arena
from quietgoose.kernels.saliency import choose_probes, probe_saliency, select_salient

NAMES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32",
         torch.int64: "*i64", torch.uint8: "*u8"}
made = {}


def record(kernel, grid):
    def go(*given, num_warps=4, num_stages=3, **constants):
        signature, fixed, aligned, key = {}, dict(constants), {}, [kernel.__name__, str(constants)]
        for i, parameter in enumerate(kernel.params):
            name = parameter.name
            value = given[i] if i < len(given) else constants[name]
            if name in constants or (type(value) is int and value == 1 and not parameter.do_not_specialize):
                signature[name], fixed[name] = "constexpr", value
                continue
            pointer = isinstance(value, torch.Tensor)
            signature[name] = NAMES[value.dtype] if pointer else "fp32" if isinstance(value, float) else "i32"
            if pointer or (type(value) is int and value % 16 == 0 and not parameter.do_not_specialize):
                aligned[(i,)] = [["tt.divisibility", 16]]
            key.append(signature[name])
        if str(key) not in made:
            options = {"num_warps": num_warps, "num_stages": num_stages}
            done = compile(ASTSource(kernel, signature, fixed, aligned), target=GPUTarget("cuda", 90, 32), options=options)
            ptx = done.asm["ptx"]
            made[str(key)] = dict(name=kernel.__name__, rounded=constants.get("ROUNDED", False), shared=done.metadata.shared,
                                  fused=ptx.count("fma.r"), divides="div.rn.f32" in ptx, roots="sqrt.rn.f32" in ptx)
    return go


JITFunction.__getitem__ = record


def append(n, width, bits, dtype=torch.bfloat16, rounded=False, batch=2, **choice):
    key = torch.zeros(batch, 2, n, width, dtype=dtype)
    arenas = [empty_arena(b, batch, 2, width, n, n // 128 + 2, dtype, "cpu") for b in bits]
    valid = torch.ones(batch, n, dtype=torch.bool)
    tables = BitTables(torch.zeros(batch, 2, n, dtype=torch.uint8), torch.zeros(batch, n, dtype=torch.uint8), 3)
    rounding = None
    if rounded:
        rounding = KeyRounding(torch.zeros(batch, 2, width, dtype=torch.int32), torch.zeros(batch, 2, width, width))
    append_ranked(*arenas, tables, key, key, valid, valid, rounding=rounding, implementation="triton", **choice)


def score(n, width, dtype, group):
    valid = torch.ones(2, n, dtype=torch.bool)
    probes = choose_probes(valid)
    key = torch.zeros(2, 2, n, width, dtype=dtype)
    query = torch.zeros(2, 2 * group, probes.shape[1], width, dtype=dtype)
    probe_saliency(query, key, probes, valid, scaling=0.1, implementation="triton")


CASES
print(json.dumps(list(made.values())))
"""

FEW_CASES = """
append(512, 128, (4, 2), ratio=0.6, scores=torch.zeros(2, 2, 512))
score(512, 128, torch.bfloat16, 4)
"""
MORE_CASES = """
append(4096, 64, (4, 2), ratio=0.6, scores=torch.zeros(2, 2, 4096))
append(100, 64, (16, 2), torch.float16, ratio=0.6, salient=torch.zeros(2, 2, 100, dtype=torch.bool))
append(1, 64, (4, 2), batch=1, ratio=0.6, scores=torch.zeros(1, 2, 1))
append(512, 128, (4, 4), rounded=True, ratio=1.0)
append(33000, 64, (16, 16), torch.float16, ratio=1.0)
append(20, 32, (4, 2), torch.float32, ratio=0.6, scores=torch.zeros(2, 2, 20))
score(4096, 64, torch.float16, 1)
score(100, 256, torch.float32, 3)
select_salient(torch.zeros(2, 2, 9000), torch.ones(2, 9000, dtype=torch.bool), 0.5, implementation="triton")
"""
SHARED_MEMORY = 227 * 1024


def compiled(cases: str) -> list[dict]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", PROGRAM.replace("CASES", cases)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def check(found: list[dict], names: set[str]) -> None:
    assert {kernel["name"] for kernel in found} == names
    assert all(kernel["shared"] <= SHARED_MEMORY for kernel in found), found
    for kernel in found:
        if kernel["name"] in ("_place", "_peaks", "_pack", "_select") and not kernel["rounded"]:
            assert kernel["fused"] == 0, kernel


def test_the_kernels_of_a_prefill_compile_for_an_h100() -> None:
    found = compiled(FEW_CASES)
    check(found, {"_place", "_pack", "_probe_lse", "_column_sums"})
    packing = [kernel for kernel in found if kernel["name"] == "_pack"]
    assert packing
    assert all(kernel["divides"] and kernel["roots"] for kernel in packing)


@pytest.mark.slow
def test_other_shapes_compile_for_an_h100() -> None:
    check(compiled(MORE_CASES), {"_place", "_peaks", "_pack", "_probe_lse", "_column_sums", "_select"})
