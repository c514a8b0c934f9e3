"""Query-aware rounding of keys: codes chosen so that the errors of a key's channels cancel in its products with queries.

Rounding to nearest makes e_j = k'_j - k_j as small as it can be, channel by channel. Attention sees q . e, whose mean
square over the queries is e^T H e with H = mean of q q^T. So channels are rounded one after the other, and what the
rounding of one has done to e^T H e is taken out of those still to come:

    for j in order:   u_j = round((w_j - z_j) / s_j), clipped     e = w_j - (z_j + s_j u_j)     w_i -= e R_ji / R_jj

with R the upper Cholesky factor of H^-1 (channels in that order): optimal brain quantisation as GPTQ (Frantar et al.,
2022, Algorithm 1) applies it to weights, with queries in the place of calibration inputs. Ours: its use on keys, H from
the chunk's own queries, the order by H_jj (range of channel j)^2, largest first. Layout, parameters and bytes are those of
rounding to nearest; only codes differ, and |e_j| may exceed s_j / 2.

Called by cache/state.py for prompts and chunks; a window of generated tokens is rounded to nearest, since its queries are
gone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

DAMPING = 0.03  # of the mean diagonal of H, added to its diagonal
POSITIONS = 1024  # queries of a head that H is computed from, at most


@dataclass(frozen=True)
class KeyRounding:
    """order_BKD int32: channels in the order of rounding. step_BKDD fp32: row j is R_ji / R_jj by channel i, 0 for the
    channel order[j] itself and those before it."""

    order_BKD: Tensor
    step_BKDD: Tensor

    def of_row(self, row: int) -> KeyRounding:
        """One row's, without the axis B."""
        return KeyRounding(self.order_BKD[row], self.step_BKDD[row])


def key_rounding(
    query: Tensor, query_valid: Tensor, key: Tensor, key_valid: Tensor, *, damping: float = DAMPING
) -> KeyRounding:
    """The order and the factor of every row and KV head, from queries [B, H, n, D] and keys [B, Hk, m, D], valid bool
    [B, n] and [B, m].

    Valid positions count alike (of more than POSITIONS, every second, third, ... is taken); the G = H / Hk query heads of
    a KV head are taken together; fp32. A row without a valid query gets steps of 0, that is rounding to nearest. No host
    synchronisation.
    """
    kv_heads, width = key.shape[1], key.shape[3]
    thin = slice(None, None, -(-query.shape[2] // POSITIONS))
    seen = torch.where(query_valid[:, None, thin, None], query[:, :, thin].float(), 0.0)
    q_BKXD = seen.unflatten(1, (kv_heads, -1)).flatten(2, 3)
    h_BKDD = q_BKXD.mT @ q_BKXD
    mean = h_BKDD.diagonal(dim1=-2, dim2=-1).mean(-1)
    empty = mean == 0
    h_BKDD = h_BKDD / torch.where(empty, 1.0, mean)[..., None, None]
    identity = torch.eye(width, device=key.device)
    h_BKDD = h_BKDD + torch.where(empty, 1.0, damping)[..., None, None] * identity
    stored_B1m1 = key_valid[:, None, :, None]
    high = torch.where(stored_B1m1, key, -torch.inf).amax(2).float()
    low = torch.where(stored_B1m1, key, torch.inf).amin(2).float()
    span_BKD = torch.where(high >= low, high - low, 0.0)
    weight_BKD = h_BKDD.diagonal(dim1=-2, dim2=-1) * span_BKD.square()
    order_BKD = weight_BKD.argsort(dim=-1, descending=True, stable=True)
    ordered = _permuted(h_BKDD, order_BKD)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky_ex(ordered).L)
    factor = torch.linalg.cholesky_ex(inverse, upper=True).L
    step = (factor / factor.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)).triu(1)
    # columns back to the channels' own places
    step_BKDD = torch.zeros_like(step).scatter_(-1, order_BKD.unsqueeze(-2).expand_as(step), step)
    return KeyRounding(order_BKD.to(torch.int32), step_BKDD.nan_to_num(0.0))


def round_with_queries(key: Tensor, minimum: Tensor, scale: Tensor, bits: int, rounding: KeyRounding) -> Tensor:
    """uint8 codes of one row's blocks [Hk, blocks, T, D] fp32, minimum and scale alike: the kernel's specification."""
    w = key.clone()
    codes = torch.zeros_like(w)
    for j in range(key.shape[-1]):
        channel = rounding.order_BKD[:, None, None, j, None].long().expand(*w.shape[:-1], 1)
        z, s, x = (t.gather(-1, channel) for t in (minimum, scale, w))
        u = ((x - z) / s + 0.5).clamp(0.0, 2**bits - 1).nan_to_num(0.0).floor()
        codes.scatter_(-1, channel, u)
        w = w - (x - (z + s * u)) * rounding.step_BKDD[:, j][:, None, None]
    return codes.to(torch.uint8)


def _permuted(matrix: Tensor, order: Tensor) -> Tensor:
    rows = matrix.gather(-2, order.unsqueeze(-1).expand_as(matrix))
    return rows.gather(-1, order.unsqueeze(-2).expand_as(matrix))
