"""The Triton kernels of thought attention compile for an H100 on a machine without a GPU: the interpreter accepts more
than the compiler does (a size of 1 becomes a constant, loop variables must keep their type)."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

PROGRAM = """
import torch
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from quietgoose.kernels.thought_attention import triton_backward, triton_kernels, triton_launch

ADDRESSES = {"p_anchor": "*i64", "p_start": "*i64", "p_length": "*i64"}
FLOATS = {"p_lse", "p_delta", "p_part_lse"}
SHARED_MEMORY = 227 * 1024


def compiled(kernel, kind, D, M, N, ones):
    t = triton_launch.tuning(kind, torch.bfloat16, D, True)
    constants = dict(G=3, S=2, M=M, N=N, D=D, WIDTH=triton_launch._width(D), UPCAST=False, ROWS=t.rows, KEYS=t.keys,
                     OWN_KEYS=t.own_keys, PREFIX=ones == (), ON_DEVICE=M == 1, CHUNK=256)
    signature, fixed, aligned = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        name = parameter.name
        if parameter.is_constexpr or name in ones:
            signature[name], fixed[name] = "constexpr", constants.get(name, 1)
        elif name.startswith("p_"):
            wide = name in FLOATS or (kind == "prefix_gradient" and name in ("p_dk", "p_dv"))
            signature[name] = ADDRESSES.get(name, "*fp32" if wide else "*bf16")
            aligned[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if name.startswith("scale") else "i32"
    source = ASTSource(kernel, signature, fixed, aligned)
    options = {"num_warps": t.warps, "num_stages": t.stages}
    made = compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert made.metadata.shared <= SHARED_MEMORY, (kind, D, made.metadata.shared)


KERNELS = {
    "forward": triton_kernels.attend_kernel, "query_gradient": triton_backward.query_gradient_kernel,
    "own_gradient": triton_backward.own_gradient_kernel, "prefix_gradient": triton_backward.prefix_gradient_kernel,
}
for kind, kernel in KERNELS.items():
    for D, M, N, ones in ((64, 5, 5, ()), (128, 5, 5, ()), (64, 1, 4, ()), (64, 2, 2, ("H", "K", "A", "L", "length"))):
        compiled(kernel, kind, D, M, N, ones)
print("compiled")
"""


@pytest.mark.slow
def test_kernels_compile_for_an_h100() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=170)
    assert "compiled" in done.stdout, done.stderr[-3000:]
