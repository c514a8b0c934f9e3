"""The split-KV kernels equal plain attention over dequantised keys and values, whatever lies in unused memory."""

from __future__ import annotations

import pytest
import torch
from quietgoose.kernels.cached_attention import SaliencyBuffers, Tail, cached_attention, merge
from quietgoose.kernels.quantize import UnsupportedShape, append_packed, dequantize, empty_arena
from quietgoose.kernels.testing import assert_close

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PENDING = 16
# the interpreter computes with the values that masks drop afterwards
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def poison(tensor: torch.Tensor) -> None:
    """Fill with what shows up in every result that touches it: NaN, or all bits set."""
    tensor.fill_(float("nan") if tensor.dtype.is_floating_point else 255)


def poison_unused(arena) -> None:
    for row, length in enumerate(arena.lengths().tolist()):
        for name, tensor in arena.tensors().items():
            if name in {"key_codes", "value_codes", "value_scale", "value_min"} and tensor.numel():
                poison(tensor[row, :, length:])
            elif name in {"key_scale", "key_min"} and tensor.numel():
                poison(tensor[row, :, int(arena.num_blocks[row]) :])
            elif name == "value_channel" and not length:
                poison(tensor[row])


class Problem:
    """Arenas filled by flushes of ragged rows, a tail with padding, and queries."""

    def __init__(
        self, *, rows=2, kv_heads=2, group=1, head_dim=64, flushes=(100,), ratio=0.6, query=1, tail=5, tail_room=7,
        bits=(4, 2), share=1, dtype=torch.float16, lengths=None, seed=0,
    ):  # fmt: skip
        g = torch.Generator().manual_seed(seed)
        self.dtype, self.share, self.scaling = dtype, share, head_dim**-0.5
        total = sum(flushes)
        capacity, blocks = total + 130, 2 * len(flushes) + total // 128 + 2
        self.arenas = tuple(empty_arena(b, rows, kv_heads, head_dim, capacity, blocks, dtype, "cpu") for b in bits)
        spread = torch.rand(1, kv_heads, 1, head_dim, generator=g) * 2 + 0.1
        for n in flushes:
            key = (torch.randn(rows, kv_heads, n, head_dim, generator=g) * spread + 1).to(dtype)
            value = (torch.randn(rows, kv_heads, n, head_dim, generator=g) * spread.flip(3)).to(dtype)
            used = torch.tensor([n] * rows if lengths is None else [min(n, length) for length in lengths])
            valid = torch.arange(n) >= (n - used)[:, None]
            noise = torch.rand(rows, kv_heads, n, generator=g).masked_fill(~valid[:, None], -1)
            rank = noise.argsort(-1, descending=True).argsort(-1)
            salient = (rank < torch.ceil(used * ratio)[:, None, None]) & valid[:, None]
            append_packed(*self.arenas, key, value, salient, valid, implementation="reference")
        for arena in self.arenas:
            poison_unused(arena)
        self.query = (torch.randn(rows * share, query, kv_heads * group, head_dim, generator=g) * 2).to(dtype)
        self.query = self.query.transpose(1, 2)
        width = tail + tail_room
        keys, values = (torch.randn(rows * share, kv_heads, width, head_dim, generator=g).to(dtype) for _ in range(2))
        valid = torch.ones(rows * share, width, dtype=torch.uint8)
        if tail > 2 and tail > query:
            valid[0, :2] = 0
        for x in (keys, values):
            poison(x[:, :, tail:])
            x.masked_fill_((valid == 0)[:, None, :, None], float("nan"))
        self.tail = Tail(keys, values, valid, torch.tensor([tail], dtype=torch.int32)) if tail else None
        self.buffers = None

    def with_buffers(self, accepted=0) -> Problem:
        rows, kv_heads, width = self.tail.key.shape[:3]
        self.buffers = SaliencyBuffers(
            total=torch.rand(rows, kv_heads, width),
            pending=torch.rand(rows, kv_heads, PENDING, width),
            accepted=torch.tensor([accepted], dtype=torch.int32),
        )
        return self

    def run(self, implementation, **options):
        """(out, lse, buffers after), on the CPU; the reference runs in fp64."""
        reference = implementation == "reference"
        device = "cpu" if reference else DEVICE
        move = lambda group: type(group)(  # noqa: E731
            **{k: v.to(device).clone() if isinstance(v, torch.Tensor) else v for k, v in vars(group).items()}
        )
        query = self.query.double() if reference else self.query.to(device)
        buffers = move(self.buffers) if self.buffers else None
        limits = options.pop("limits", None)
        out, lse = cached_attention(
            query, *map(move, self.arenas), move(self.tail) if self.tail else None, scaling=self.scaling,
            saliency=buffers, share=self.share, return_lse=True, implementation=implementation,
            limits=None if limits is None else tuple(x.to(device) for x in limits), **options,
        )  # fmt: skip
        return out.cpu(), lse.cpu(), buffers and SaliencyBuffers(**{k: v.cpu() for k, v in vars(buffers).items()})

    def check(self, **options) -> torch.Tensor:
        got, got_lse, got_sums = self.run("triton", **options)
        want, want_lse, want_sums = self.run("reference", **options)
        assert got.dtype == self.dtype
        assert got.shape == self.query.shape
        finite = torch.isfinite(want_lse)
        assert torch.equal(torch.isfinite(got_lse), finite)
        assert_close("out", got, want.float(), dtype=self.dtype)
        if finite.any():
            assert (got_lse - want_lse)[finite].abs().max() < (2e-2 if self.dtype == torch.bfloat16 else 5e-3)
        if want_sums:
            assert_close("total", got_sums.total, want_sums.total, dtype=torch.float32)
            pending = slice(0, self.query.shape[2])
            assert_close("pending", got_sums.pending[:, :, pending], want_sums.pending[:, :, pending], dtype=self.dtype)
            assert torch.equal(got_sums.accepted, want_sums.accepted)
        return got


@pytest.mark.parametrize(
    "shape",
    [
        {"head_dim": 64, "group": 3, "flushes": (129,), "dtype": torch.bfloat16},
        {"head_dim": 128, "group": 4, "flushes": (100,), "kv_heads": 1},
        {"head_dim": 64, "group": 1, "flushes": (1,), "rows": 1},
        {"head_dim": 128, "group": 8, "flushes": (63, 30), "rows": 1},
        {"head_dim": 64, "group": 3, "flushes": (63, 1, 129), "query": 5, "rows": 1},
        {"head_dim": 128, "group": 8, "flushes": (60,), "query": 16, "tail": 20, "rows": 1, "kv_heads": 1},
        {"head_dim": 64, "group": 3, "flushes": (70,), "share": 3, "query": 2},
        {"head_dim": 64, "group": 3, "flushes": (70,), "share": 3, "tail": 0},
        {"head_dim": 64, "flushes": (20,), "tail": 70, "tail_room": 0, "rows": 1},
    ],
    ids=lambda shape: "-".join(f"{k}={v}" for k, v in shape.items()),
)
def test_kernel_equals_reference(shape) -> None:
    Problem(**shape).check()


@pytest.mark.parametrize("ratio", [0.0, 0.4, 0.8, 1.0])
def test_either_arena_may_be_empty(ratio) -> None:
    Problem(head_dim=64, group=3, flushes=(100, 20), ratio=ratio, rows=1, tail=1).check()


@pytest.mark.parametrize("bits", [(4, 4), (2, 2), (16, 16), (16, 4), (4, 16)])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_pairs_of_bits(bits, head_dim) -> None:
    dtype = torch.bfloat16 if head_dim == 64 else torch.float16
    Problem(bits=bits, head_dim=head_dim, flushes=(100, 29), rows=1, kv_heads=1, group=3, dtype=dtype).check()


def test_rows_of_different_lengths_and_a_row_of_padding() -> None:
    problem = Problem(head_dim=64, group=4, flushes=(100, 128), lengths=(0, 37, 101), rows=3, kv_heads=1, tail=0)
    out = problem.check()
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    lse = problem.run("triton")[1]
    assert torch.equal(lse[0], torch.full_like(lse[0], -torch.inf))


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    together = Problem(flushes=(100,), lengths=(100, 13), rows=2, tail=0)
    lone = Problem(flushes=(100,), lengths=(100, 13), rows=2, tail=0)
    for arena in lone.arenas:
        for name in ("value_scale", "value_min", "key_scale", "key_min", "value_channel"):
            poison(getattr(arena, name)[1])
    assert torch.equal(together.run("triton")[0][0], lone.run("triton")[0][0])


def test_limits() -> None:
    problem = Problem(head_dim=64, group=3, flushes=(90, 60), query=4, rows=2, kv_heads=1)
    g = torch.Generator().manual_seed(1)
    limits = tuple(torch.randint(0, 91, (2, 1, 4), generator=g).int() for _ in range(2))
    limits[0][0, :, 1], limits[1][0, :, 1] = 0, 0  # this query sees the tail only
    problem.check(limits=limits)
    shared = Problem(head_dim=64, group=2, flushes=(90,), share=3, query=2, rows=1, kv_heads=1, tail=0)
    shared.check(limits=tuple(torch.tensor([[[3, 40]]]).int() for _ in range(2)))
    shared.check(limits=tuple(torch.randint(0, 60, (3, 1, 2), generator=g).int() for _ in range(2)))


def test_limits_of_zero_without_tail_give_zeros() -> None:
    problem = Problem(flushes=(50,), tail=0, rows=1, kv_heads=1)
    out = problem.check(limits=(torch.zeros(1, 1, 1).int(), torch.zeros(1, 1, 1).int()))
    assert torch.equal(out, torch.zeros_like(out))


def test_query_scales_far_from_one() -> None:
    for factor in (2.0**-14, 2.0**9):
        problem = Problem(flushes=(100,), rows=1, tail=0)
        problem.query, problem.scaling = problem.query * factor, problem.scaling / factor
        problem.check()
    zero = Problem(flushes=(100,), rows=1, tail=0)
    zero.query = zero.query * 0
    zero.check()


@pytest.mark.parametrize(("query", "accepted", "share"), [(1, 1, 1), (5, 3, 1), (2, 0, 2)])
def test_saliency_equals_reference(query, accepted, share) -> None:
    shape = {"head_dim": 64, "group": 3, "kv_heads": 1, "flushes": (40,), "tail": 11, "query": query, "share": share}
    Problem(**shape).with_buffers(accepted).check()


def test_saliency_of_queries_more_than_one_row_tile() -> None:
    Problem(group=8, kv_heads=1, rows=1, flushes=(20,), tail=18, query=9).with_buffers(2).check()


def test_saliency_equals_brute_force_with_a_crop() -> None:
    problem = Problem(head_dim=64, group=2, kv_heads=1, rows=1, flushes=(30,), tail=9, query=3).with_buffers()
    problem.buffers.total.zero_()
    sums = problem.run("triton")[2]
    keys = [dequantize(arena, dtype=torch.float64)[0][:, :, : int(arena.lengths())] for arena in problem.arenas]
    tail_key = torch.where(problem.tail.valid.bool()[:, None, :, None], problem.tail.key, 0).double()[:, :, :9]
    scores = problem.scaling * problem.query.double() @ torch.cat([*keys, tail_key], 2).transpose(2, 3)
    hidden = torch.ones(3, 9).triu(7).bool() | (problem.tail.valid[0, :9] == 0)
    scores[..., -9:] = scores[..., -9:].masked_fill(hidden, -torch.inf)
    want = scores.softmax(-1)[..., -9:].sum(1)
    assert_close("pending", sums.pending[:, 0, :3, :9], want.float(), dtype=torch.float16)
    assert torch.equal(sums.total, problem.buffers.total)
    assert sums.accepted.item() == 3
    # the third token is rejected: the next call counts two of the three
    problem.buffers = SaliencyBuffers(sums.total, sums.pending, torch.tensor([2], dtype=torch.int32))
    problem.tail = Tail(problem.tail.key, problem.tail.value, problem.tail.valid, torch.tensor([8], dtype=torch.int32))
    problem.query = problem.query[:, :, :1].clone()
    total = problem.run("triton")[2].total
    assert_close("total", total[:, :, :9], want[:, None, :2].sum(2).float(), dtype=torch.float16)


def test_padding_query_adds_no_saliency() -> None:
    problem = Problem(flushes=(30,), rows=2, kv_heads=1, tail=6, query=2).with_buffers()
    problem.tail.valid[1, 4] = 0
    for implementation in ("reference", "triton"):
        out, _, sums = problem.run(implementation)
        assert torch.isfinite(out).all()
        assert sums.pending[1, 0, 0].abs().max() == 0
        assert sums.pending[0, 0, 0].abs().max() > 0


def test_merge_of_parts_equals_the_whole() -> None:
    problem = Problem(flushes=(60,), rows=2, kv_heads=1, group=2, dtype=torch.float32)
    whole, lse, _ = problem.run("reference")
    full, tail = (60, 60), problem.tail
    arenas_only = cached_attention(
        problem.query.double(), *problem.arenas, None, scaling=problem.scaling, return_lse=True
    )
    nothing = tuple(torch.zeros(2, 1, 1).int() for _ in full)
    tail_only = cached_attention(
        problem.query.double(), *problem.arenas, tail, scaling=problem.scaling, limits=nothing, return_lse=True
    )
    out, merged = merge(*arenas_only, *tail_only)
    assert_close("out", out, whole, dtype=torch.float32)
    assert_close("lse", merged, lse, dtype=torch.float32)
    empty = (torch.zeros_like(whole), torch.full_like(lse, -torch.inf))
    assert torch.equal(merge(*empty, *empty)[0], empty[0])
    assert_close("out", merge(whole, lse, *empty)[0], whole, dtype=torch.float64)


def test_what_the_kernel_does_not_take_goes_to_the_reference_or_is_refused() -> None:
    problem = Problem(flushes=(20,), rows=1, dtype=torch.float32)
    with pytest.raises(UnsupportedShape, match="fp16 and bf16"):
        problem.run("triton")
    long = Problem(flushes=(20,), rows=1, query=17, tail=20)
    with pytest.raises(UnsupportedShape, match="1 to 16"):
        long.run("triton")
    arguments = {"scaling": 1.0, "implementation": "auto"}
    out = cached_attention(long.query.to(DEVICE).float().cpu(), *long.arenas, long.tail, **arguments)
    assert torch.isfinite(out).all()
    with pytest.raises(UnsupportedShape, match="share"):
        cached_attention(long.query, *long.arenas, None, share=2, **arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("query", [1, 5, 16])
def test_long_rows_on_a_gpu(dtype, head_dim, query) -> None:
    if DEVICE == "cpu":
        pytest.skip("needs a CUDA device")
    shape = {"kv_heads": 3, "group": 3, "flushes": (4097, 128, 128), "tail": 130, "lengths": (4097, 700)}
    Problem(head_dim=head_dim, dtype=dtype, query=query, **shape).with_buffers(1).check()
