"""The Triton kernels of thought attention equal the reference: interpreter on a CPU, compiled on a GPU."""

from __future__ import annotations

from functools import partial

import pytest
import torch

pytest.importorskip("triton")

from quietgoose.kernels.testing import assert_close, assert_same
from quietgoose.kernels.thought_attention import UnsupportedShape, fast, thought_attention, triton_launch
from torch.utils.checkpoint import checkpoint

from .thought_problems import SHAPES, Problem

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
each_shape = pytest.mark.parametrize("shape", list(SHAPES.values()), ids=list(SHAPES))
gpu = [pytest.mark.gpu, pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")]
# the interpreter computes with the values that masks drop afterwards
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
in_triton = partial(fast.thought_attention, own_in_triton=True)

# sizes that fill tiles of the compiled kernels and leave them ragged
LARGE = {
    "every position": {"B": 2, "K": 3, "G": 3, "S": 2, "M": 8, "L": 129, "D": 64, "anchors": [[*range(129)]] * 2},
    "sparse": {"B": 2, "K": 2, "G": 4, "A": 37, "S": 4, "M": 19, "L": 700, "D": 128},
    "packed": {
        "B": 1, "K": 3, "G": 3, "S": 3, "M": 13, "L": 500, "D": 64, "documents": (0, 100, 163, 420),
        "anchors": [[*range(3, 500, 7), -1, -1]],
    },
    "rollout": {"B": 2, "K": 3, "G": 3, "A": 300, "S": 4, "M": 1, "N": 15, "L": 300, "D": 64, "used": 9},
    "one branch": {"B": 3, "K": 1, "G": 8, "A": 1, "S": 1, "M": 1, "N": 9, "L": 1000, "D": 128, "used": 4},
}  # fmt: skip


@each_shape
def test_triton_equals_the_reference(shape) -> None:
    Problem(**shape).check(implementation="triton", device=DEVICE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", ["every position", "rollout", "packed documents", "padding anchors", "head dim 64"])
def test_triton_in_half_precision(name, dtype) -> None:
    Problem(**SHAPES[name]).cast(dtype).check(implementation="triton", device=DEVICE)


@pytest.mark.parametrize("name", list(SHAPES))
def test_merge_and_own_part_in_triton_over_the_stock_prefix(name) -> None:
    Problem(**SHAPES[name]).check(in_triton, device=DEVICE)


@pytest.mark.parametrize("first", [0, 6])
def test_merge_in_triton_over_the_causal_kernel(first: int) -> None:
    anchors = [[first, -1, *range(first + 2, first + 9)], list(range(first, first + 9))]
    problem = Problem(B=2, K=2, G=3, S=2, M=3, L=first + 11, anchors=anchors)
    if DEVICE == "cuda":
        problem.cast(torch.bfloat16)
    problem.check(in_triton, device=DEVICE, consecutive_from=first)


def test_the_same_inputs_give_the_same_bits() -> None:
    problem = Problem(**SHAPES["packed documents"])
    first, second = (problem.run(implementation="triton", device=DEVICE) for _ in range(2))
    for name, x in first.items():
        assert_same(name, second[name], x)


@pytest.mark.parametrize("implementation", ["triton", "stock"])
def test_activation_checkpointing_gives_the_same_bits(implementation: str) -> None:
    problem = Problem(**SHAPES["packed documents"])
    want = problem.run(implementation=implementation, device=DEVICE)
    again = partial(checkpoint, thought_attention, use_reentrant=False, implementation=implementation)
    for name, x in problem.run(again, device=DEVICE).items():
        assert_same(name, x, want[name])


def test_shares_of_the_prefix_gradient_do_not_change_it(monkeypatch) -> None:
    problem = Problem(B=1, K=1, G=3, A=30, S=2, M=3, L=30)
    many = problem.run(implementation="triton", device=DEVICE)
    monkeypatch.setattr(triton_launch, "MAX_SHARES", 1)
    one = problem.run(implementation="triton", device=DEVICE)
    for name in ("dprefix_k", "dprefix_v"):
        assert_close(name, many[name], one[name], limit=1e-6)


def test_head_dims_and_dtypes_beyond_the_limits_are_refused() -> None:
    with pytest.raises(UnsupportedShape, match="fp16, bf16 and fp32"):
        Problem(A=1).cast(torch.float64).run(implementation="triton", device=DEVICE)
    with pytest.raises(UnsupportedShape, match="head_dim = 512"):
        Problem(A=1, D=512).run(implementation="triton", device=DEVICE)


class TestOnGpu:
    pytestmark = gpu

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
    @pytest.mark.parametrize("name", list(LARGE))
    def test_compiled_kernels_on_ragged_tiles(self, name, dtype) -> None:
        Problem(**LARGE[name]).cast(dtype).check(implementation="triton", device="cuda")

    @pytest.mark.parametrize("own_in_triton", [True, False], ids=["triton", "torch"])
    @pytest.mark.parametrize("kernel", ["flash", "cudnn", "efficient"])
    def test_stock_kernels_where_every_position_is_an_anchor(self, kernel, own_in_triton) -> None:
        call = partial(fast.thought_attention, prefix_kernel=kernel, own_in_triton=own_in_triton)
        Problem(**LARGE["every position"]).cast(torch.bfloat16).check(call, device="cuda", consecutive_from=0)

    @pytest.mark.parametrize(("first", "A", "L"), [(0, 100, 129), (70, 59, 129), (128, 1, 129), (64, 3, 200)])
    def test_flash_is_aligned_at_the_last_anchor(self, first, A, L) -> None:
        anchors = [list(range(first, first + A))] * 2
        problem = Problem(B=2, K=2, G=3, S=2, M=5, L=L, D=64, anchors=anchors).cast(torch.bfloat16)
        problem.check(implementation="stock", device="cuda", consecutive_from=first)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
    @pytest.mark.parametrize("name", ["sparse", "packed", "rollout"])
    def test_the_stock_staircase(self, name, dtype) -> None:
        Problem(**LARGE[name]).cast(dtype).check(implementation="stock", device="cuda")

    @pytest.mark.parametrize("implementation", ["triton", "stock"])
    def test_neither_pass_waits_for_the_device(self, implementation) -> None:
        problem = Problem(**LARGE["packed"]).cast(torch.bfloat16)
        inputs = [x.cuda().requires_grad_() for x in problem.tensors]
        tail, grad = (problem.anchor.cuda(), problem.start.cuda()), problem.grad.cuda()
        for mode in ("default", "error"):  # once to compile, once watched
            torch.cuda.set_sync_debug_mode(mode)
            try:
                out = thought_attention(*inputs, *tail, implementation=implementation)
                torch.autograd.grad(out, inputs, grad)
            finally:
                torch.cuda.set_sync_debug_mode("default")

    @pytest.mark.parametrize("implementation", ["triton", "stock"])
    @torch.no_grad()
    def test_a_captured_rollout_step_follows_the_length(self, implementation) -> None:
        problem = Problem(**LARGE["rollout"]).cast(torch.bfloat16)
        inputs = [x.cuda().contiguous() for x in problem.tensors]
        tail, length = (problem.anchor.cuda(), problem.start.cuda()), torch.tensor([3], device="cuda")
        call = partial(thought_attention, *inputs, *tail, length, implementation=implementation)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = call()
        for filled in (1, 9, 4):
            length.fill_(filled)
            graph.replay()
            assert_same(f"{filled} filled", out, call())
            cut = [x if i < 3 else x[..., :filled, :].contiguous() for i, x in enumerate(inputs)]
            want = thought_attention(*cut, *tail, implementation="reference")
            assert_close(f"{filled} filled", out, want, dtype=torch.bfloat16)

    @pytest.mark.parametrize(("implementation", "first"), [("triton", None), ("stock", 0), ("stock", None)])
    def test_memory_does_not_hold_scores_of_the_prefix(self, implementation, first) -> None:
        problem = Problem(B=1, K=1, G=3, S=4, M=10, L=1024, D=64, anchors=[[*range(1024)]]).cast(torch.bfloat16)
        inputs = [x.cuda().requires_grad_() for x in problem.tensors]
        tail, grad = (problem.anchor.cuda(), problem.start.cuda()), problem.grad.cuda()
        peaks = []
        for length in (256, 1024):
            anchors = [x[:, :length] for x in tail]
            cut = [x[:, :, :length] for x in inputs]
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            out = thought_attention(*cut, *anchors, consecutive_from=first, implementation=implementation)
            torch.autograd.grad(out, cut, grad[:, :, :length])
            del out
            peaks.append(torch.cuda.max_memory_allocated() - before)
        # four times the branches and the keys: four times the memory, not sixteen times
        assert peaks[1] < 6 * peaks[0], peaks
