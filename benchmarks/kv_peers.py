"""Other ways to shrink a KV cache, as transformers caches, so that every method is compared in one harness.

    peer = make_peer("kivi", model.config, bits=2)         # see PEERS for the names
    model.set_attn_implementation(peer.attention)
    model.generate(tokens, past_key_values=peer.cache);  peer.true_bytes()["total"]

KIVI (Liu et al. 2024, arXiv 2402.02750, section 3.2, algorithm 1; settings of jy-yuan/KIVI): keys per channel in groups
of 32 tokens, values per token in groups of 32 channels, asymmetric round to nearest, the newest R tokens in 16 bit. The
original multiplies packed keys in a kernel of its own; here they are dequantised on read, so compare its bytes and its
quality, not its speed.
MiKV and H2O live in kv_peers_importance.py. The quantised caches of transformers are used as they are, with the axes
its documentation recommends (quanto 0, hqq 1), groups of 64 and 128 tokens in 16 bit.

Bytes count what a method must hold between two steps: codes at packed size, parameters, 16-bit tokens, importance
scores, tables. A 16-bit value counts two bytes even where a CPU run keeps it in float32.
Called by kv_quality.py, kv_cache.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, QuantizedCache

PART_NAMES = ("codes", "parameters", "sixteen_bit", "index", "scores")
SIXTEEN_BIT_BYTES = 2


@dataclass(frozen=True)
class Groups:
    """Numbers quantised in groups along the last dimension, or left alone (bits 16: `codes` are the numbers)."""

    codes: Tensor  # uint8 [..., n * bits / 8]
    scale: Tensor | None  # fp16 [..., n / group]
    low: Tensor | None  # fp16 [..., n / group]
    bits: int

    def parts(self) -> dict[str, int]:
        """Bytes by kind."""
        if self.scale is None or self.low is None:
            return {"sixteen_bit": self.codes.numel() * SIXTEEN_BIT_BYTES}
        return {"codes": self.codes.numel(), "parameters": (self.scale.numel() + self.low.numel()) * SIXTEEN_BIT_BYTES}


def quantize_groups(x: Tensor, bits: int, group: int) -> Groups:
    """Asymmetric round to nearest: u = round((x - low) / scale), scale = (high - low) / (2^bits - 1).

    Raises:
        ValueError: bits other than 2, 4, 8, 16, or a last dimension that is no multiple of `group`.
    """
    if bits == 16:
        return Groups(x, None, None, 16)
    if bits not in (2, 4, 8):
        raise ValueError(f"bits: {bits}; allowed are 2, 4, 8, 16")
    if x.shape[-1] % group:
        raise ValueError(f"group: {group} does not divide the last dimension, {x.shape[-1]}")
    grouped = x.float().unflatten(-1, (-1, group))
    low, high = grouped.aminmax(dim=-1)
    low = low.half()
    scale = ((high - low.float()) / (2**bits - 1)).half().clamp(min=2**-14)
    codes = ((grouped - low.float()[..., None]) / scale.float()[..., None]).round_().clamp_(0, 2**bits - 1)
    return Groups(_pack(codes.flatten(-2).to(torch.uint8), bits), scale, low, bits)


def dequantize_groups(groups: Groups, dtype: torch.dtype) -> Tensor:
    """The numbers, in `dtype`."""
    if groups.scale is None or groups.low is None:
        return groups.codes.to(dtype)
    codes = _unpack(groups.codes, groups.bits)
    grouped = codes.unflatten(-1, (groups.scale.shape[-1], -1)).to(torch.float32)
    return torch.addcmul(groups.low.float()[..., None], grouped, groups.scale.float()[..., None]).flatten(-2).to(dtype)


def join(old: Groups | None, new: Groups, dim: int) -> Groups:
    """Both, one after the other along `dim`."""
    if old is None:
        return new
    if old.scale is None or old.low is None or new.scale is None or new.low is None:
        return Groups(torch.cat([old.codes, new.codes], dim), None, None, 16)
    return Groups(
        torch.cat([old.codes, new.codes], dim), torch.cat([old.scale, new.scale], dim),
        torch.cat([old.low, new.low], dim), old.bits,
    )  # fmt: skip


def _pack(codes: Tensor, bits: int) -> Tensor:
    per_byte = 8 // bits
    shifts = torch.arange(per_byte, device=codes.device, dtype=torch.uint8) * bits
    return (codes.unflatten(-1, (-1, per_byte)) << shifts).sum(-1, dtype=torch.uint8)


def _unpack(packed: Tensor, bits: int) -> Tensor:
    shifts = torch.arange(8 // bits, device=packed.device, dtype=torch.uint8) * bits
    return ((packed[..., None] >> shifts) & (2**bits - 1)).flatten(-2)


class PeerLayer(CacheLayerMixin):
    """What a layer of every peer has in common: tokens only come, none are taken back."""

    is_croppable = False
    is_sliding = False
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0  # tokens, evicted ones included

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def parts(self) -> dict[str, int]:
        """Bytes by kind."""
        raise NotImplementedError

    def reset(self) -> None:
        raise NotImplementedError(f"{type(self).__name__}: make a new one")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        raise NotImplementedError(f"{type(self).__name__}: no beam search")

    offload = prefetch = reset


class KiviLayer(PeerLayer):
    """KIVI, one layer. Keys leave the residual R at a time, values one by one, as in the authors' code.

    A prompt of n tokens leaves n mod R keys and min(n, R) values in 16 bit.
    """

    def __init__(self, bits: int, group: int, residual: int, value_bits: int | None = None) -> None:
        super().__init__()
        if residual % group:
            raise ValueError(f"residual: {residual} is no multiple of the group, {group}")
        self.bits, self.group, self.residual = bits, group, residual
        self.value_bits = bits if value_bits is None else value_bits
        self.key_groups: Groups | None = None  # transposed: [B,Hk,D,n]
        self.value_groups: Groups | None = None  # [B,Hk,n,D]
        self.recent_key: Tensor | None = None
        self.recent_value: Tensor | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.seen += key_states.shape[-2]
        recent_key, recent_value = key_states, value_states
        if self.recent_key is not None and self.recent_value is not None:
            recent_key = torch.cat([self.recent_key, key_states], -2)
            recent_value = torch.cat([self.recent_value, value_states], -2)
        key, value = recent_key, recent_value
        if self.key_groups is not None:
            key = torch.cat([dequantize_groups(self.key_groups, self.dtype).transpose(-1, -2), recent_key], -2)
        if self.value_groups is not None:
            value = torch.cat([dequantize_groups(self.value_groups, self.dtype), recent_value], -2)
        self._flush(recent_key, recent_value)
        return key, value

    def _flush(self, key: Tensor, value: Tensor) -> None:
        done = key.shape[-2] // self.residual * self.residual
        if done:
            new = quantize_groups(key[..., :done, :].transpose(-1, -2).contiguous(), self.bits, self.group)
            self.key_groups = join(self.key_groups, new, -1)
        self.recent_key = key[..., done:, :].contiguous()
        done = max(0, value.shape[-2] - self.residual)
        if done:
            new = quantize_groups(value[..., :done, :], self.value_bits, self.group)
            self.value_groups = join(self.value_groups, new, -2)
        self.recent_value = value[..., done:, :].contiguous()

    def parts(self) -> dict[str, int]:
        recent = [x for x in (self.recent_key, self.recent_value) if x is not None]
        found = [groups.parts() for groups in (self.key_groups, self.value_groups) if groups is not None]
        return add_parts(*found, {"sixteen_bit": sum(x.numel() for x in recent) * SIXTEEN_BIT_BYTES})


def add_parts(*parts: dict[str, int]) -> dict[str, int]:
    return {name: sum(part.get(name, 0) for part in parts) for name in PART_NAMES}


@dataclass
class Peer:
    """A cache, the attention implementation it needs, and its bytes."""

    name: str
    cache: Any
    attention: str
    settings: dict[str, Any] = field(default_factory=dict)
    heads: tuple[int, int, int] = (0, 0, 0)  # layers, KV heads, head size
    parts: Callable[[], dict[str, int]] = dict

    def true_bytes(self) -> dict[str, int]:
        """Bytes by kind, and `total`."""
        parts = add_parts(self.parts())
        return {**parts, "total": sum(parts.values())}

    def bits_per_element(self, batch: int, tokens: int | None = None) -> float:
        """Bits for each of the 2 * layers * B * Hk * tokens * D numbers a plain cache would hold."""
        layers, kv_heads, head_dim = self.heads
        count = 2 * layers * batch * kv_heads * head_dim * (tokens or self.cache.get_seq_length())
        return 8 * self.true_bytes()["total"] / count


def make_peer(name: str, config: Any, **settings: Any) -> Peer:
    """A fresh cache of a method.

    Args:
        name: one of PEERS.
        settings: kivi: bits, group, residual, value_bits (None: as bits).
            mikv: high_bits, low_bits, ratio, recent_share, window, query_chunk.
            h2o: heavy_ratio, recent_ratio, query_chunk. quanto, hqq: nbits, q_group_size, residual_length.
            zipcache: `policy` (a preset's name, a dict of its fields, a Policy), capacity. dynamic, fp8: none.

    Raises:
        ValueError: a name that is not in PEERS. ImportError: the package of a backend is missing.
    """
    if name not in PEERS:
        raise ValueError(f"peer: {name}; allowed are {', '.join(PEERS)}")
    text = config.get_text_config(decoder=True)
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    heads = (text.num_hidden_layers, text.num_key_value_heads, head_dim)
    return PEERS[name](name, config, heads, settings)


def _of_layers(
    name: str, layers: list[Any], attention: str, settings: dict[str, Any], heads: tuple[int, int, int]
) -> Peer:
    return Peer(
        name, Cache(layers=layers), attention, settings, heads, lambda: add_parts(*(layer.parts() for layer in layers))
    )


def _kivi(name: str, config: Any, heads: tuple[int, int, int], given: dict[str, Any]) -> Peer:
    settings = {"bits": 2, "group": 32, "residual": 32} | given
    return _of_layers(name, [KiviLayer(**settings) for _ in range(heads[0])], "sdpa", settings, heads)


def _importance(name: str, config: Any, heads: tuple[int, int, int], given: dict[str, Any]) -> Peer:
    from kv_peers_importance import ATTENTION, H2OLayer, MikvLayer

    kind: Any = MikvLayer if name == "mikv" else H2OLayer
    settings = kind.DEFAULTS | given
    return _of_layers(name, [kind(**settings) for _ in range(heads[0])], ATTENTION, settings, heads)


def _dynamic(name: str, config: Any, heads: tuple[int, int, int], given: dict[str, Any]) -> Peer:
    cache = DynamicCache(config=config, **given)

    def parts() -> dict[str, int]:
        held = [layer.keys.numel() + layer.values.numel() for layer in cache.layers if layer.is_initialized]
        return {"sixteen_bit": sum(held) * SIXTEEN_BIT_BYTES}

    return Peer(name, cache, "sdpa", given, heads, parts)


def _hugging_face(name: str, config: Any, heads: tuple[int, int, int], given: dict[str, Any]) -> Peer:
    if name == "fp8":
        settings = given
    else:
        axis = 0 if name == "quanto" else 1
        settings = {
            "nbits": 4,
            "axis_key": axis,
            "axis_value": axis,
            "q_group_size": 64,
            "residual_length": 128,
        } | given
    cache = QuantizedCache(name, config, **settings)

    def parts() -> dict[str, int]:
        found = []
        for layer in cache.layers:
            if layer.is_initialized:
                packed = [layer._quantized_keys, layer._quantized_values]
                held = [] if name == "fp8" else [layer.keys, layer.values]
                found += [_packed_parts(x) for x in packed]
                found += [{"sixteen_bit": sum(x.numel() for x in held) * SIXTEEN_BIT_BYTES}]
        return add_parts(*found)

    return Peer(name, cache, "sdpa", settings, heads, parts)


def _packed_parts(packed: Any) -> dict[str, int]:
    """Bytes of a quanto tensor, or of the pair (codes, meta or scale) that hqq and fp8 keep."""
    if isinstance(packed, tuple):
        codes, meta = packed
        rest = [meta["scale"], meta["zero"]] if isinstance(meta, dict) else [meta]
    else:
        codes, rest = getattr(packed._data, "_data", packed._data), [packed._scale, packed._shift]
    return {
        "codes": codes.numel() * codes.element_size(),
        "parameters": sum(x.numel() for x in rest) * SIXTEEN_BIT_BYTES,
    }


def _zipcache(name: str, config: Any, heads: tuple[int, int, int], given: dict[str, Any]) -> Peer:
    from quietgoose.cache.hf import NAME, ZipCache

    settings = {"policy": "default"} | given
    cache = ZipCache(config, **settings)

    def parts() -> dict[str, int]:
        found = cache.nbytes()
        wide = _element_size(cache) // SIXTEEN_BIT_BYTES  # 2 in a float32 run
        lossless = cache.policy.high_bits == cache.policy.low_bits == 16
        codes, tail = found.codes // (wide if lossless else 1), found.tail // wide
        return {"codes": codes, "parameters": found.parameters, "sixteen_bit": tail, "index": found.bitmap,
                "scores": found.saliency}  # fmt: skip

    return Peer(name, cache, NAME, settings, heads, parts)


def _element_size(cache: Any) -> int:
    return next((layer.dtype.itemsize for layer in cache.layers if getattr(layer, "dtype", None) is not None), 2)


PEERS: dict[str, Callable[[str, Any, tuple[int, int, int], dict[str, Any]], Peer]] = {
    "dynamic": _dynamic, "kivi": _kivi, "mikv": _importance, "h2o": _importance, "quanto": _hugging_face,
    "hqq": _hugging_face, "fp8": _hugging_face, "zipcache": _zipcache,
}  # fmt: skip
