"""A layer's state as named tensors and a JSON-able description, and back: bit for bit.

Unused capacity is not written, only its size. What a fork shares with its parent is written with it, once per shared row, and stays
shared after restoring (the parent is not needed). Caller: cache/state.py; cache/hf.py writes safetensors files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..base.errors import ArtifactError
from . import arenas
from .arenas import Room
from .history import Segment
from .policy import Policy
from .store import Flush, PackedStore

if TYPE_CHECKING:
    from .state import LayerState

FORMAT = 2


def tensors(state: LayerState) -> dict[str, Tensor]:
    """Every tensor of the part in use, contiguous, by name."""
    found = {"sequence_id": state.sequence_id}
    for i, part in enumerate(state.history.parts):
        found |= {f"store{i}.{name}": tensor for name, tensor in part.store.saved().items()}
    window = state.window
    for name, tensor in window.tensors().items():
        used = tensor[..., : window.used] if name not in _SLOT_AXIS_2 else tensor[:, :, : window.used]
        found[name] = (tensor if name in _WHOLE else used).contiguous()
    return {name: tensor.clone() for name, tensor in found.items()}


_SLOT_AXIS_2 = ("tail.key", "tail.value")  # [B, Hk, W, D]; the others end with W
_WHOLE = ("tail.length", "saliency.accepted")


def meta(state: LayerState) -> dict[str, Any]:
    """What the tensors do not say."""
    window = state.window
    return {
        "format": FORMAT,
        "policy": state.whole_policy.to_dict(),
        "layer_index": state.layer_index,
        "batch": state.batch,
        "kv_heads": state.shape.kv_heads,
        "head_dim": state.shape.head_dim,
        "dtype": str(state.dtype).removeprefix("torch."),
        "capacity": state.capacity,
        "window": {"used": window.used, "decode_from": window.decode_from, "evident": window.evident},
        "stores": [
            {
                "share": part.share,
                "batch": part.store.batch,
                "columns": part.store.columns,
                # capacities: kernels cut their work by them, and sums in another order differ in the last bit
                "room": [[a.capacity, a.block_capacity] for a in (part.store.high, part.store.low)],
                "flushes": [[f.start, f.end, *astuple(f.high), *astuple(f.low)] for f in part.store.flushes],
            }
            for part in state.history.parts
        ],
    }


def restore(
    kind: type[LayerState], policy: Policy | None, found: Mapping[str, Tensor], description: Mapping[str, Any]
) -> LayerState:
    """The state that `tensors` and `meta` describe."""
    if description.get("format") != FORMAT:
        raise ArtifactError(
            f"saved cache has format {description.get('format')!r}; this version reads format {FORMAT}", code="CKPT-050"
        )
    try:
        saved = Policy.from_dict(description["policy"])
        if policy is not None and policy != saved:
            raise ArtifactError(
                f"saved cache has policy {saved}, asked for is {policy}: codes can not be converted; pass policy=None "
                "to take the saved one",
                code="CKPT-050",
            )
        return _restore(kind, saved, found, description)
    except KeyError as error:
        raise ArtifactError(f"saved cache lacks {error}: the file is incomplete", code="CKPT-050") from error


def _restore(
    kind: type[LayerState], policy: Policy, found: Mapping[str, Tensor], description: Mapping[str, Any]
) -> LayerState:
    dtype = getattr(torch, description["dtype"])
    ids = found["sequence_id"]
    state = kind(
        policy, batch=description["batch"], kv_heads=description["kv_heads"], head_dim=description["head_dim"],
        dtype=dtype, device=ids.device, capacity=description["capacity"], layer_index=description["layer_index"],
        sequence_id=ids,
    )  # fmt: skip
    stores = description["stores"]
    history = state.history
    for i, described in enumerate(stores):
        last = i == len(stores) - 1
        named = {name.removeprefix(f"store{i}."): t for name, t in found.items() if name.startswith(f"store{i}.")}
        capacity = history.capacity if last and len(stores) == 1 else None
        store = PackedStore(history.policy, history.shape, named["skip"].clone(), capacity=capacity)
        _fill_store(store, named, described)
        if last:
            history.store = store
        else:
            history.segments.append(Segment(store, described["share"]))
    _fill_window(state, found, description["window"])
    return state


def _fill_store(store: PackedStore, named: Mapping[str, Tensor], described: Mapping[str, Any]) -> None:
    store.flushes = [
        Flush(start, end, Room(high, high_blocks), Room(low, low_blocks))
        for start, end, high, high_blocks, low, low_blocks in described["flushes"]
    ]
    for name, used, room in zip(("high", "low"), store.used, described["room"]):
        arena = arenas.make_arena(getattr(store, name), store.batch, Room(*room), store.shape.dtype)
        setattr(store, name, arena)
        if not used.fits(arena):
            raise ArtifactError(f"saved cache: {used} do not fit the described capacity {room}", code="CKPT-050")
        expected = arenas.trimmed(arena, used)
        source = {key: _checked(f"{name}.{key}", named[f"{name}.{key}"], like) for key, like in expected.items()}
        arenas.copy_into(arena, type(arena)(bits=arena.bits, **source))
    store.reserve_columns(described["columns"])
    store.columns = described["columns"]
    width = -(-store.columns // 8)
    for name in ("salient_bits", "valid_bits"):
        target = getattr(store, name)[..., :width]
        target.copy_(_checked(name, named[name], target))
    if "limits.high" in named:
        like = torch.empty(store.batch, store.shape.kv_heads, dtype=torch.int32)
        high, low = (_checked(name, named[name], like).clone() for name in ("limits.high", "limits.low"))
        store.limits = (high, low)


def _fill_window(state: LayerState, found: Mapping[str, Tensor], described: Mapping[str, Any]) -> None:
    window = state.window
    used = described["used"]
    for name, tensor in window.tensors().items():
        if name not in _WHOLE:
            tensor = tensor[:, :, :used] if name in _SLOT_AXIS_2 else tensor[..., :used]
        tensor.copy_(_checked(name, found[name], tensor))
    window.used, window.decode_from, window.evident = used, described["decode_from"], described["evident"]
    window.blank = False


def _checked(name: str, tensor: Tensor, like: Tensor) -> Tensor:
    if tensor.shape != like.shape or tensor.dtype != like.dtype:
        raise ArtifactError(
            f"saved cache: {name} has shape {tuple(tensor.shape)} {tensor.dtype}, described is {tuple(like.shape)} "
            f"{like.dtype}: the file is damaged or foreign",
            code="CKPT-050",
        )
    return tensor
