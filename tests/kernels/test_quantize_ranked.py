"""Choosing, placing, packing and noting in one go writes what the plain steps write one after the other, byte for byte."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from quietgoose.kernels.quantize import BitTables, UnsupportedShape, append_packed, append_ranked, empty_arena
from quietgoose.kernels.quantize.bits import unpack_bits
from quietgoose.kernels.saliency import select_salient
from quietgoose.kernels.testing import assert_same
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RATIO = 0.6


class Side:
    """Arenas and tables; what is not in use holds NaN and ones."""

    def __init__(self, batch: int, heads: int, width: int, bits: tuple[int, int], columns: int, dtype: torch.dtype):
        blocks = columns // 128 + 6
        self.arenas = [empty_arena(b, batch, heads, width, columns, blocks, dtype, DEVICE) for b in bits]
        for arena in self.arenas:
            for name, tensor in arena.tensors().items():
                if name not in ("block_start", "num_blocks"):
                    tensor.fill_(float("nan") if tensor.is_floating_point() else 255)
        size = columns // 8 + 1
        self.salient = torch.full((batch, heads, size), 255, dtype=torch.uint8, device=DEVICE)
        self.valid = torch.full((batch, size), 255, dtype=torch.uint8, device=DEVICE)
        self.column = 0

    def append(self, key: Tensor, value: Tensor, stored: Tensor, valid: Tensor, how: str, **choice) -> None:
        tables = BitTables(self.salient, self.valid, self.column)
        append_ranked(*self.arenas, tables, key, value, stored, valid, implementation=how, **choice)
        self.column += key.shape[2]

    def tensors(self) -> dict[str, Tensor]:
        found = {f"{a.bits}.{i}.{name}": t for i, a in enumerate(self.arenas) for name, t in a.tensors().items()}
        return found | {"salient": self.salient, "valid": self.valid}


def draw(batch: int, heads: int, n: int, width: int, dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    """Padding, sinks (valid but not stored), ties and NaN among the scores."""
    g = torch.Generator().manual_seed(seed)
    key, value = (torch.randn(batch, heads, n, width, generator=g) * torch.logspace(-1, 1, width) for _ in range(2))
    value[..., 1] = 0.0
    valid = torch.ones(batch, n, dtype=torch.bool)
    if batch > 1:
        valid[-1, : n // 3] = False
        valid[-1, n // 2] = False
    stored = valid & (valid.cumsum(1) > 2) if n > 20 else valid
    scores = torch.randn(batch, heads, n, generator=g)
    scores[..., ::5] = (scores[..., ::5] * 2).round()
    scores[0, 0, n // 2 :: 11] = float("nan")
    hide = ~valid[:, None, :, None]
    key, value = (x.masked_fill(hide, float("nan")).to(dtype) for x in (key, value))
    found = {"key": key, "value": value, "stored": stored, "valid": valid, "scores": scores}
    return {name: x.to(DEVICE) for name, x in found.items()}


def compare(got: Side, want: Side) -> None:
    for name, tensor in got.tensors().items():
        assert_same(name, tensor.nan_to_num(-3.0), want.tensors()[name].nan_to_num(-3.0))


# rows, KV heads, tokens of each call, head_dim, bits: columns begin at and within bytes, one call has one token
CASES = [
    (2, 2, (129, 8, 1, 20), 64, (4, 2), torch.bfloat16),
    (1, 2, (13, 100), 128, (4, 2), torch.float16),
    (3, 1, (1, 63, 40), 32, (4, 4), torch.float32),
    (2, 2, (33, 31), 32, (16, 2), torch.bfloat16),
    (1, 2, (65, 3), 64, (16, 16), torch.float16),
    (2, 1, (5, 1300), 32, (4, 2), torch.float32),
    (1, 1, (4100, 9), 16, (4, 2), torch.bfloat16),
]


@pytest.mark.parametrize(("batch", "heads", "sizes", "width", "bits", "dtype"), CASES)
def test_one_call_writes_what_the_plain_steps_write(batch, heads, sizes, width, bits, dtype) -> None:
    got, want, plain = (Side(batch, heads, width, bits, sum(sizes), dtype) for _ in range(3))
    for seed, n in enumerate(sizes):
        given = draw(batch, heads, n, width, dtype, seed)
        got.append(**given, how="triton", ratio=RATIO)
        want.append(**given, how="reference", ratio=RATIO)
        salient = select_salient(given["scores"], given["stored"], RATIO, implementation="reference")
        rest = [given[name] for name in ("key", "value")]
        append_packed(*plain.arenas, *rest, salient, given["stored"], implementation="reference")
        start = got.column - n
        assert_same("bits", unpack_bits(got.salient, got.column)[..., start:], salient)
        assert_same("bits", unpack_bits(got.valid, got.column)[..., start:], given["valid"])
    compare(got, want)
    for ours, theirs in zip(got.arenas, plain.arenas):
        for name, tensor in ours.tensors().items():
            assert_same(name, tensor.nan_to_num(-3.0), theirs.tensors()[name].nan_to_num(-3.0))


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_without_scores_all_or_none_are_salient(ratio: float) -> None:
    got, want = (Side(3, 2, 64, (4, 2), 60, torch.float32) for _ in range(2))
    for seed, n in enumerate((21, 30)):
        given = draw(3, 2, n, 64, torch.float32, seed)
        given.pop("scores")
        given["stored"][1] = given["valid"][1] = seed > 0  # a row that begins later
        for side, how in ((got, "triton"), (want, "reference")):
            side.append(**given, how=how, ratio=ratio)
    compare(got, want)
    assert int(got.arenas[ratio == 1.0].lengths().sum()) == 0


def test_a_given_choice_and_a_part_of_wider_tensors() -> None:
    """Columns of longer tensors are read in place: scores, validity, keys and values as a prefill with recents has them."""
    got, want = (Side(2, 2, 64, (4, 2), 90, torch.bfloat16) for _ in range(2))
    given = draw(2, 2, 50, 64, torch.bfloat16, 0)
    part = {name: x[:, :, :40] if x.dim() > 2 else x[:, :40] for name, x in given.items()}
    got.append(**part, how="triton", ratio=RATIO)
    want.append(**{name: x.contiguous() for name, x in part.items()}, how="reference", ratio=RATIO)
    salient = select_salient(given["scores"], given["stored"], 0.3)
    given |= {"salient": salient, "key": given["key"].transpose(1, 2).contiguous().transpose(1, 2)}
    given.pop("scores")
    for side, how in ((got, "triton"), (want, "reference")):
        side.append(**given, how=how, ratio=RATIO)
    compare(got, want)


def test_scores_of_one_for_all_heads() -> None:
    """An expanded tensor: RECENT scores are the same in every head."""
    got, want = (Side(2, 3, 32, (4, 2), 50, torch.float32) for _ in range(2))
    given = draw(2, 3, 50, 32, torch.float32, 1)
    given["scores"] = given["scores"][:, :1].expand(-1, 3, -1)
    for side, how in ((got, "triton"), (want, "reference")):
        side.append(**given, how=how, ratio=RATIO)
    compare(got, want)


def test_the_number_of_launches_does_not_depend_on_rows_and_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    from quietgoose.kernels.quantize import triton_kernels, triton_place

    launched: list[str] = []

    class Counted:
        def __init__(self, kernel, name):
            self.kernel, self.name = kernel, name

        def __getitem__(self, grid):
            launched.append(self.name)
            return self.kernel[grid]

    for module, name in ((triton_place, "_place"), (triton_place, "_peaks"), (triton_kernels, "_pack")):
        monkeypatch.setattr(module, name, Counted(getattr(module, name), name))
    for batch, heads, n in ((1, 1, 20), (3, 2, 20), (1, 1, 1025)):
        launched.clear()
        side = Side(batch, heads, 16, (4, 2), n, torch.float32)
        side.append(**draw(batch, heads, n, 16, torch.float32, 0), how="triton", ratio=RATIO)
        assert launched == (["_place", "_pack"] if n == 20 else ["_place", "_peaks", "_pack"])


def test_what_does_not_fit_together_is_refused() -> None:
    side = Side(2, 2, 32, (4, 2), 30, torch.float32)
    given = draw(2, 2, 30, 32, torch.float32, 0)
    with pytest.raises(UnsupportedShape, match="needed are"):
        side.append(**(given | {"scores": given["scores"][..., :20]}), how="reference", ratio=RATIO)
    with pytest.raises(UnsupportedShape, match="stored"):
        side.append(**(given | {"stored": given["stored"][:, :20]}), how="reference", ratio=RATIO)
    given.pop("scores")
    with pytest.raises(UnsupportedShape, match="without scores"):
        side.append(**given, how="reference", ratio=RATIO)
