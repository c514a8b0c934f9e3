"""What `cached_attention` reads besides the packed arenas: the 16-bit tail, and the buffers of its saliency sums.

Both are plain groups of tensors that the kernels update in place; shapes use B rows, Hk KV heads, W tail slots.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

MAX_QUERY = 16  # rows of SaliencyBuffers.pending and the longest query of the kernel


@dataclass(frozen=True)
class Tail:
    """Tokens still at 16 bits, in position order: sinks first, then the most recent ones with the queries' own."""

    key: Tensor  # model dtype [B, Hk, W, D]
    value: Tensor  # model dtype [B, Hk, W, D]
    valid: Tensor  # uint8 [B, W]; 0 is padding
    length: Tensor  # int32 [1], slots in use, the same for all rows; on the device


@dataclass(frozen=True)
class SaliencyBuffers:
    """Attention received by each tail slot; contributions of the last call wait until its tokens are accepted.

    A call first does total += sum of pending[:, :, :accepted], then overwrites pending and sets accepted to its own
    query length. Rejecting tokens is lowering `accepted` before the next call.
    """

    total: Tensor  # fp32 [B, Hk, W]  sum over accepted queries of the attention summed over the group's heads
    pending: Tensor  # fp32 [B, Hk, MAX_QUERY, W]  contribution of each query of the last call
    accepted: Tensor  # int32 [1]  how many queries of the last call count
