"""Which tokens matter: attention that probe rows pay to each token, and the choice of the salient ones (README.md).

Callers: cache/. CUDA tensors of a supported shape go to the Triton kernels, everything else to the plain PyTorch twin.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import Implementation, UnsupportedShape, takes_triton
from ..quantize.layout import MODEL_DTYPES, TRITON_HEAD_DIMS
from . import reference
from .probes import SaliencyMode, choose_probes, num_probes, share

__all__ = [
    "SaliencyMode",
    "choose_probes",
    "num_probes",
    "probe_saliency",
    "select_salient",
    "share",
]


def probe_saliency(
    query: Tensor,
    key: Tensor,
    probes: Tensor,
    valid: Tensor,
    *,
    scaling: float,
    mode: SaliencyMode = SaliencyMode.EQ8,
    seed: int = 0,
    sequence_id: Tensor | None = None,
    lse: Tensor | None = None,
    first: Tensor | None = None,
    implementation: Implementation = "auto",
) -> Tensor:
    """Score of every token, fp32 [B, Hk, n], -inf where not valid (fp64 if the inputs are).

    query    [B, H, P, D], the rows at `probes` (whatever stands where a probe is -1)
    key      [B, Hk, n, D] after RoPE; H is a multiple of Hk
    probes   int64 [B, P], token index of each probe row, -1 = none; ascending order is fastest
    valid    bool [B, n]
    scaling  of the scores, 1/sqrt(D) as a rule
    lse      fp32 [B, H, P], natural log-sum-exp of the probe rows where it is known (with history: over all of it);
             None computes it over the keys given
    first    int64 [B], the first valid token of each row (0 where there is none) where it is known
    seed, sequence_id  for RANDOM only

    The softmax is exact and causal by token index over valid keys. No synchronisation; two launches.
    """
    _check(query, key, probes, valid)
    if mode in (SaliencyMode.RECENT, SaliencyMode.RANDOM):
        return reference.without_attention(valid, key.shape[1], mode, seed, sequence_id)
    if not takes_triton(implementation, key, _not_for_triton(query, key)):
        total = reference.probe_saliency(query, key, probes, valid, scaling=scaling, mode=mode, lse=lse)
        scores = reference.normalise(total, probes, valid, mode)
        return scores if key.dtype == torch.float64 else scores.float()
    from .triton_kernels import probe_saliency as with_triton

    return with_triton(query, key, probes, valid, scaling=scaling, mode=mode, lse=lse, first=first)


def select_salient(
    saliency: Tensor,
    valid: Tensor,
    ratio: float,
    *,
    forced: Tensor | None = None,
    implementation: Implementation = "auto",
) -> Tensor:
    """The top ceil(ratio * valid tokens) of each row and head, bool [B, Hk, n].

    saliency [B, Hk, n]; valid bool [B, n]; forced bool [B, n]: tokens taken first, lower positions
    before higher (padding never is).
    Ties go to the lower position, NaN counts as the lowest score. No synchronisation; one launch.
    """
    if not 0.0 <= ratio <= 1.0:
        raise ValueError(f"ratio = {ratio}: it must lie in 0 .. 1")
    if not takes_triton(implementation, saliency):
        return reference.select_salient(saliency, valid, ratio, forced)
    from .triton_select import select_salient as with_triton

    return with_triton(saliency, valid, ratio, forced)


def _not_for_triton(query: Tensor, key: Tensor) -> str | None:
    if key.shape[3] not in TRITON_HEAD_DIMS:
        return f"head_dim = {key.shape[3]}: the Triton kernels take {TRITON_HEAD_DIMS}"
    if key.dtype not in MODEL_DTYPES or query.dtype != key.dtype:
        return f"dtypes {query.dtype} and {key.dtype}: the Triton kernels take fp16, bf16 or fp32, the same for both"
    return None


def _check(query: Tensor, key: Tensor, probes: Tensor, valid: Tensor) -> None:
    batch, heads, num, width = query.shape
    kv_heads, n = key.shape[1], key.shape[2]
    if (key.shape[0], key.shape[3]) != (batch, width) or heads % kv_heads:
        raise UnsupportedShape(
            f"queries {tuple(query.shape)} and keys {tuple(key.shape)}: rows and head_dim must be equal, "
            "query heads a multiple of KV heads"
        )
    if tuple(probes.shape) != (batch, num) or tuple(valid.shape) != (batch, n):
        raise UnsupportedShape(
            f"probes {tuple(probes.shape)} and valid {tuple(valid.shape)}: needed are {(batch, num)} and {(batch, n)}"
        )
