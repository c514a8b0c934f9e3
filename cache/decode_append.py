"""Writing one new token's key and value into static storage: one launch for both, slot read on the device."""

from __future__ import annotations

from torch import Tensor


def write_last(key: Tensor, value: Tensor, key_store: Tensor, value_store: Tensor, lengths: Tensor) -> None:
    """Put key and value [B,Hk,1,D] into slot `lengths - 1` of the stores [B,Hk,C,D] (any strides, D contiguous).

    lengths int32 [B] or [1] (one for all rows) already counts the new token; a slot outside the store is not written.
    """
    if key.is_cuda:
        from .decode_triton import write_last as launch

        launch(key, value, key_store, value_store, lengths)
        return
    slot = (lengths.long() - 1).expand(key.shape[0])[:, None, None, None].expand_as(key)
    key_store.scatter_(2, slot, key)
    value_store.scatter_(2, slot, value)
