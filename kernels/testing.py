"""How tests compare a kernel with its plain PyTorch twin: one measure, one tolerance table, named tensors.

The measure is the relative RMSE, sqrt(mean((got - want)^2)) / sqrt(mean(want^2)): it does not blow up where single
entries of `want` are near zero and it does not hide a wrong tile. The table is never loosened for one test; changing it
is a decision with a written reason. Used by tests/kernels and tests/cache; needs nothing but torch.

    assert_close("out", got, want, dtype=torch.bfloat16)
    assert_same("codes", got, want)             # integer codes: bit for bit
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

# relative RMSE allowed, by the dtype of the inputs and by direction
TOLERANCES: dict[tuple[torch.dtype, str], float] = {
    (torch.float64, "forward"): 1e-12,
    (torch.float64, "gradient"): 1e-10,
    (torch.float32, "forward"): 1e-5,
    (torch.float32, "gradient"): 1e-4,
    (torch.float16, "forward"): 2e-3,
    (torch.float16, "gradient"): 1e-2,
    (torch.bfloat16, "forward"): 5e-3,
    (torch.bfloat16, "gradient"): 1e-2,
}


def tolerance(dtype: torch.dtype, direction: Literal["forward", "gradient"] = "forward") -> float:
    """The table's entry for inputs of this dtype."""
    return TOLERANCES[dtype, direction]


def relative_rmse(got: Tensor, want: Tensor) -> float:
    """Relative RMSE in fp64; entries that are the same infinity on both sides count as equal.

    0 for two empty or two all-zero tensors; NaN wherever one side is NaN or an infinity stands alone.
    """
    if got.shape != want.shape:
        raise AssertionError(f"shapes differ: got {tuple(got.shape)}, want {tuple(want.shape)}")
    if got.numel() == 0:
        return 0.0
    g, w = got.detach().to("cpu", torch.float64), want.detach().to("cpu", torch.float64)
    same_infinity = torch.isinf(w) & (g == w)
    g, w = g.masked_fill(same_infinity, 0.0), w.masked_fill(same_infinity, 0.0)
    error, size = (g - w).square().mean().sqrt().item(), w.square().mean().sqrt().item()
    if error == 0.0:
        return 0.0
    return error / size if size > 0 else float("inf")


def assert_close(
    name: str,
    got: Tensor,
    want: Tensor,
    *,
    dtype: torch.dtype | None = None,
    direction: Literal["forward", "gradient"] = "forward",
    limit: float | None = None,
) -> None:
    """`got` equals `want` within the table's entry for `dtype` (default: got's dtype), and no NaN stands in it.

    `limit` replaces the table where the bound is part of the mathematics (an error of half a step, for example).
    """
    if torch.isnan(got).any():
        where = torch.nonzero(torch.isnan(got))
        raise AssertionError(f"{name}: {len(where)} NaN in {tuple(got.shape)}, first at {where[0].tolist()}")
    allowed = tolerance(dtype or got.dtype, direction) if limit is None else limit
    error = relative_rmse(got, want)
    if not error <= allowed:  # a NaN error fails too
        g, w = got.detach().to("cpu", torch.float64), want.detach().to("cpu", torch.float64)
        difference = torch.where(g == w, 0.0, (g - w).abs())
        at = int(torch.nan_to_num(difference, nan=float("inf")).argmax())
        place = [int(i) for i in torch.unravel_index(torch.tensor(at), got.shape)]
        raise AssertionError(
            f"{name}: relative RMSE {error:.3e} is above {allowed:.1e}; largest difference "
            f"{difference.flatten()[at].item():.3e} at {place} of {tuple(got.shape)}"
        )


def assert_same(name: str, got: Tensor, want: Tensor) -> None:
    """Equal entry for entry (codes, masks, block tables)."""
    if got.shape != want.shape or got.dtype != want.dtype:
        raise AssertionError(f"{name}: got {got.dtype} {tuple(got.shape)}, want {want.dtype} {tuple(want.shape)}")
    differs = got.cpu() != want.cpu()
    if bool(differs.any()):
        where = torch.nonzero(differs)
        first = tuple(where[0].tolist())
        raise AssertionError(
            f"{name}: {len(where)} of {got.numel()} entries differ, first at {list(first)}: "
            f"got {got.cpu()[first].item()}, want {want.cpu()[first].item()}"
        )
