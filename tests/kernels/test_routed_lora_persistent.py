"""Base product and expand in one persistent Gluon kernel (`persistent`): compiled for a Hopper GPU, and run where there is one.

Gluon has no interpreter. Without a Hopper GPU the formulation runs as `split`, which test_routed_lora_split.py compares with fp64.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache

import pytest
import torch

pytest.importorskip("triton")

from quietgoose.kernels.routed_lora import formulation, group_shape, persistent, tiles
from quietgoose.kernels.routed_lora.launch import Sites
from quietgoose.kernels.testing import assert_close
from torch import Tensor

from .routed_lora_problems import CASES, DEVICE, GPU, OTHERS, problem
from .test_routed_lora_split import call, linears, wanted

HOPPER = GPU and torch.cuda.get_device_capability()[0] == 9
MOST_SHARED = 227 * 1024  # bytes a program can have on an H100
TILE = tiles.PERSISTENT_LINEAR[0][2]

on_hopper = pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")


# what the launcher makes of a call, compiled for a GPU that need not be there
PROGRAM = """
import json
import torch
from quietgoose.kernels.routed_lora import group_shape, persistent
from quietgoose.kernels.routed_lora.gluon_linear import persistent_linear
from quietgoose.kernels.routed_lora.launch import Sites
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
made = []


def record(kernel, grid):
    def go(*given, num_warps, **constants):
        signature, names = {}, kernel.arg_names
        for name, value in zip(names, given):
            if isinstance(value, TensorDescriptor):
                signature[name] = f"tensordesc<{NAMES[value.base.dtype]}{value.block_shape},{value.layout!r}>"
            else:
                signature[name] = "*" + NAMES[value.dtype] if isinstance(value, torch.Tensor) else "i32"
        constants["num_warps"] = num_warps
        signature |= dict.fromkeys(constants, "constexpr")
        fixed = {(names.index(name),): value for name, value in constants.items()}
        source = GluonASTSource(kernel, signature, constexprs=fixed, attrs={})
        done = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps})
        made.append([grid[0], done.metadata.shared, done.asm["ptx"]])
    return go


GluonJITFunction.__getitem__ = record
for kind, biased in ((torch.bfloat16, False), (torch.float16, True)):
    x, w, b = (torch.zeros(*shape, dtype=kind) for shape in ((300, 72), (4104, 72), (24, 4104)))
    shape = group_shape([[8, 16]])
    persistent._multiprocessors = lambda device, count=(132, 40)[biased]: count
    persistent.linear_persistent(x, x.new_zeros(300, 24), Sites([w], [w[:, 0].contiguous()] if biased else [], [b]), shape)
print(json.dumps(made))
"""


@cache
def compiled() -> list[tuple[int, int, str]]:
    """(programs, bytes of shared memory, PTX) of a launch in bf16 and of one in fp16 with a bias."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(("number", "name"), [(0, "bf16"), (1, "f16")])
def test_it_compiles_for_hopper(number: int, name: str) -> None:
    """Warpgroup products as wide as a tile, both operands in shared memory: W's as it lies, B's transposed; copies are the hardware's,
    and one buffer more would not fit."""
    programs, shared, ptx = compiled()[number]
    assert programs == (3 * 17, 40)[number]
    products = [line for line in ptx.splitlines() if "wgmma.mma_async" in line]
    assert len(products) == 2 * TILE.depth // 16
    assert all(f"m64n{TILE.columns}k16.f32.{name}.{name}" in line for line in products)
    of_b = TILE.columns // 64  # its rows are cut into 128 bytes
    assert ptx.count("cp.async.bulk.tensor") == 4 + of_b  # x, W, hm, y
    assert shared <= MOST_SHARED < shared + 2 * TILE.depth * (TILE.rows + TILE.columns)


def test_calls_that_descriptors_cannot_name_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def sites(width: int = 64, outs: int = 24, slots: int = 16) -> Sites:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.bfloat16)

        return Sites([zeros(outs, width)], [], [zeros(slots, outs)])

    x = torch.zeros(4, 64, dtype=torch.bfloat16)
    assert not persistent.takes(x, sites())  # no GPU
    monkeypatch.setattr(persistent, "_takes", lambda _: True)
    assert persistent.takes(x, sites())
    assert persistent.takes(torch.zeros(4, 72, dtype=torch.bfloat16)[:, :64], sites())
    assert not persistent.takes(x.half(), sites())  # numbers of another type
    assert not persistent.takes(x.short(), sites())
    biased = sites()._replace(biases=[torch.zeros(48, dtype=torch.bfloat16)[::2]])
    assert not persistent.takes(x, biased)
    assert persistent.takes(x, biased._replace(biases=[biased.biases[0].contiguous()]))
    for refused in (
        x.float(),
        torch.zeros(4, 65, dtype=torch.bfloat16)[:, :64],
        torch.zeros(64, 4, dtype=torch.bfloat16).t(),
    ):
        assert not persistent.takes(refused, sites())
    assert not persistent.takes(x, sites(outs=20))
    assert not persistent.takes(x, sites(slots=12))
    assert not persistent.takes(torch.zeros(4, 60, dtype=torch.bfloat16), sites(width=60))


def test_a_triton_that_cannot_compile_it_is_told_once_and_the_call_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    OTHERS["another Triton"] = (20, 64, (24,), [[8, 8]], 1)
    p = problem("another Triton", torch.float16)
    asked: list[int] = []

    def missing(*_: object) -> list[Tensor]:
        asked.append(1)
        raise AttributeError("module 'gluon.language' has no attribute 'warp_specialize'")

    monkeypatch.setattr(persistent, "_takes", lambda _: True)
    monkeypatch.setattr(persistent, "_failed", [])
    monkeypatch.setattr(persistent, "linear_persistent", missing)
    want = linears(p, "split")
    for _ in range(2):
        assert torch.equal(linears(p, "persistent")[0], want[0])
    assert len(asked) == 1
    assert [record.message.count("warp_specialize") for record in caplog.records] == [1]


def test_wide_models_take_it_beyond_a_thousand_tokens() -> None:
    assert formulation(4096, 256, 4096) == "persistent"
    assert formulation(4096, 256, 14336) == "persistent"
    assert formulation(1024, 256, 4096) == "split"
    assert formulation(4096, 256, 576) == "fused"
    assert formulation(4096, 256, 4096, wide=True) == "stock"


ODD = {  # tokens, input width, output widths, ranks of every expert at every site, k
    "one token, eight outputs": (1, 64, (8,), [[8, 8]], 2),
    "nothing is a multiple of a tile": (130, 200, (264, 72), [[8, 16, 16], [24, 0, 16]], 2),
    "more tiles than multiprocessors": (4097, 72, (1288,), [[16] * 16], 2),
    "slots of several steps": (300, 1000, (520, 256, 256), [[16] * 9, [8] * 9, [64, *[1] * 8]], 1),
    "fewer slots than a step": (257, 4096, (512,), [[8]], 1),
}


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("case", ODD)
def test_odd_sizes_equal_fp64(case: str, biased: bool, dtype: torch.dtype) -> None:
    """Again and again the same bits."""
    assert case not in CASES
    OTHERS[case] = ODD[case]
    p = problem(case, dtype)
    biases = p.biases if biased else []
    assert persistent.takes(p.x, Sites(p.weights, biases, p.b))
    want = [y + biases[site].double() if biased else y for site, y in enumerate(wanted(p))]
    first = linears(p, "persistent", biases)
    for y, twin in zip(first, want):
        assert y.is_contiguous()
        assert_close(case, y, twin, dtype=dtype)
    for _ in range(5):
        assert all(torch.equal(y, same) for y, same in zip(linears(p, "persistent", biases), first))


@pytest.mark.gpu
@on_hopper
def test_the_columns_of_a_wider_tensor_are_read_as_what_they_are() -> None:
    """The same hm with x as it is and in the columns of a wider tensor: the same bits, again and again."""
    OTHERS["columns"] = (4097, 72, (1288, 264), [[16] * 16] * 2, 2)
    p = problem("columns", torch.bfloat16)
    shape, sites = group_shape(p.ranks), Sites(p.weights, [], p.b)
    h = torch.randn(len(p.x), sum(shape.slots), device=DEVICE, dtype=torch.bfloat16)
    wide = torch.full((len(p.x), 96), float("nan"), device=DEVICE, dtype=torch.bfloat16)
    wide[:, 8:-16] = p.x
    first = persistent.linear_persistent(p.x, h, sites, shape)
    for y, w, b, part in zip(first, p.weights, p.b, h.split(list(shape.slots), 1)):
        assert_close("columns", y, p.x.double() @ w.double().t() + part.double() @ b.double(), dtype=torch.bfloat16)
    for x in (p.x, wide[:, 8:-16]) * 5:
        assert all(torch.equal(y, same) for y, same in zip(persistent.linear_persistent(x, h, sites, shape), first))


@pytest.mark.gpu
@on_hopper
def test_other_tiles_give_the_same_numbers() -> None:
    OTHERS["tiles"] = (700, 520, (776,), [[16] * 5], 2)
    p = problem("tiles", torch.bfloat16)
    shape = group_shape(p.ranks)
    h = torch.randn(len(p.x), sum(shape.slots), device=DEVICE, dtype=torch.bfloat16)
    want = p.x.double() @ p.weights[0].double().t() + h.double() @ p.b[0].double()
    for tile in (TILE, TILE._replace(stages=2), TILE._replace(columns=128, stages=4), TILE._replace(rows=64, warps=4)):
        (y,) = persistent.linear_persistent(p.x, h, Sites(p.weights, [], p.b), shape, tile)
        assert_close(str(tile), y, want, dtype=torch.bfloat16)


@pytest.mark.gpu
@on_hopper
def test_a_token_that_is_not_finite_spoils_itself_alone() -> None:
    OTHERS["spoilt"] = ODD["nothing is a multiple of a tile"]
    p = problem("spoilt", torch.bfloat16)
    assert persistent.takes(p.x, Sites(p.weights, [], p.b))
    want, spoilt = linears(p, "persistent"), p.x.clone()
    spoilt[7, 3], spoilt[129, 199] = float("nan"), float("inf")
    others = torch.ones(len(p.x), dtype=torch.bool, device=DEVICE)
    others[[7, 129]] = False
    for y, usual in zip(linears(p._replace(x=spoilt), "persistent"), want):
        assert not y[~others].isfinite().any()
        assert torch.equal(y[others], usual[others])


@pytest.mark.gpu
@on_hopper
def test_it_does_not_wait_for_the_device() -> None:
    OTHERS["no waits"] = (300, 64, (264, 72), [[8, 8]] * 2, 1)
    p = problem("no waits", torch.bfloat16)
    work = call(p, "persistent", [])
    work()
    torch.cuda.set_sync_debug_mode("error")
    try:
        work()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@on_hopper
def test_outputs_beyond_two_to_the_31() -> None:
    OTHERS["long"] = (140_000, 64, (16_384,), [[8, 8]], 1)
    p = problem("long", torch.bfloat16)
    rows = torch.tensor([0, 131_071, 131_072, 139_999], device=DEVICE)
    (y,), (want,) = linears(p, "persistent"), wanted(p, rows)
    assert y.numel() > 2**31
    assert_close("last rows", y[rows], want, dtype=torch.bfloat16)


@pytest.mark.gpu
@on_hopper
def test_what_it_cannot_take_runs_as_split() -> None:
    OTHERS["narrow ranks"] = (40, 64, (24,), [[3, 2]], 1)
    p = problem("narrow ranks", torch.bfloat16)
    assert not persistent.takes(p.x, Sites(p.weights, [], p.b))
    assert torch.equal(call(p, "persistent", [])()[0], call(p, "split", [])()[0])
