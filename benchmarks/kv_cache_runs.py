"""The peers of kv_cache.py, each as a Run: prefill, steps without a wait, bytes.

Names: `dynamic`, `static_compiled`, `quanto4`, `quanto2`, `hqq4`, `hqq2`, `fp8`, `kivi4`, `kivi2`, `mikv`, `h2o`,
`static_captured` (ours, plain 16 bit), `zip_eager`, `zip_captured`; a ZipCache takes its policy after a colon, as in
`zip_captured:quality`. Everything is stock transformers but the last four and kv_peers.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from measure import wait
from torch import Tensor

DEFAULT_PEERS = (
    "dynamic", "static_compiled", "quanto4", "quanto2", "hqq4", "hqq2", "fp8", "kivi4", "kivi2", "mikv", "h2o",
    "zip_eager", "static_captured", "zip_captured",
)  # fmt: skip
STOCK_ATTENTION = "sdpa"


class NotAvailable(Exception):
    """The peer does not exist here: a package or a version is missing, or the cell is not for it."""


@dataclass(frozen=True)
class StepSettings:
    """How our captured step is made."""

    fuse: str = "layer"
    join: bool = True
    stream: bool = False
    tune: bool = False

    def __str__(self) -> str:
        extras = [
            word for word, on in (("apart", not self.join), ("streamed", self.stream), ("tuned", self.tune)) if on
        ]
        return ", ".join([f"fuse={self.fuse}", *extras])


class Run:
    """One peer on one cell. `step` must not wait for the device."""

    def __init__(self, model: Any, rows: int, tokens: int, room: int) -> None:
        self.model, self.rows, self.tokens, self.room = model, rows, tokens, room
        self.device = next(model.parameters()).device
        self.dtype = next(model.parameters()).dtype
        self.token = torch.zeros(rows, 1, dtype=torch.long, device=self.device)
        self.attention(STOCK_ATTENTION)

    def attention(self, name: str) -> None:
        if self.model.config._attn_implementation != name:
            self.model.set_attn_implementation(name)

    def prefill(self, ids: Tensor) -> None:
        """An empty cache, then the whole prompt."""
        raise NotImplementedError

    def fill(self) -> None:
        """A cache of random keys and values instead of a prefill that would take too long."""
        raise NotImplementedError

    def step(self) -> None:
        raise NotImplementedError

    def cache_bytes(self) -> int:
        raise NotImplementedError

    def launches(self) -> str:
        return "eager"

    def close(self) -> None:
        self.model = None

    def random_layer(self, heads: int | None = None) -> Tensor:
        text = self.model.config.get_text_config(decoder=True)
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        shape = (self.rows, heads or text.num_key_value_heads, self.tokens, width)
        return torch.randn(shape, dtype=self.dtype, device=self.device)


class EagerRun(Run):
    """`model(...)` with a transformers cache, as `generate` calls it."""

    def __init__(self, model: Any, rows: int, tokens: int, room: int, make: Callable[[], Any]) -> None:
        super().__init__(model, rows, tokens, room)
        self.make = make
        self.peer: Any = None
        self.fresh()

    def fresh(self) -> None:
        self.peer = None
        self.attention(STOCK_ATTENTION)
        self.peer = self.make()
        self.attention(self.peer.attention)

    def prefill(self, ids: Tensor) -> None:
        if self.peer.cache.get_seq_length():
            self.fresh()
        out = self.model(input_ids=ids, past_key_values=self.peer.cache, use_cache=True, logits_to_keep=1)
        self.token = out.logits[:, -1:].argmax(-1)

    def fill(self) -> None:
        if self.peer.attention != STOCK_ATTENTION:
            raise NotAvailable("this cache scores tokens by attention: it needs a real prefill, too long here")
        for layer in range(self.model.config.num_hidden_layers):
            self.peer.cache.update(self.random_layer(), self.random_layer(), layer)

    def step(self) -> None:
        out = self.model(input_ids=self.token, past_key_values=self.peer.cache, use_cache=True)
        self.token = out.logits[:, -1:].argmax(-1)

    def cache_bytes(self) -> int:
        return self.peer.true_bytes()["total"]

    def close(self) -> None:
        self.peer = None
        self.attention(STOCK_ATTENTION)
        super().close()


class ZipEagerRun(EagerRun):
    """A ZipCache under the model's own launches."""

    def fill(self) -> None:
        fill_zip(self, self.peer.cache)


class StaticCompiledRun(Run):
    """transformers' StaticCache and torch.compile(mode="reduce-overhead"): its documented fast path."""

    def __init__(self, model: Any, rows: int, tokens: int, room: int) -> None:
        super().__init__(model, rows, tokens, room)
        from transformers import StaticCache

        self.cache = StaticCache(config=model.config, max_cache_len=tokens + room)
        self.position = torch.full((rows, 1), tokens, dtype=torch.long, device=self.device)
        mode = "reduce-overhead" if self.device.type == "cuda" else "default"
        self.compiled = torch.compile(model.forward, mode=mode, fullgraph=True, dynamic=False)

    def prefill(self, ids: Tensor) -> None:
        self.cache.reset()
        out = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.token = out.logits[:, -1:].argmax(-1)
        self.position.fill_(self.tokens)

    def fill(self) -> None:
        for layer in range(self.model.config.num_hidden_layers):
            self.cache.update(self.random_layer(), self.random_layer(), layer)

    def step(self) -> None:
        torch.compiler.cudagraph_mark_step_begin()
        out = self.compiled(
            input_ids=self.token, position_ids=self.position, past_key_values=self.cache, use_cache=True
        )
        self.token = out.logits[:, -1:].argmax(-1)
        self.position = self.position + 1

    def cache_bytes(self) -> int:
        held = [layer for layer in self.cache.layers if layer.is_initialized]
        used = int(held[0].get_seq_length())
        return sum(2 * layer.keys[:, :, :used].numel() * layer.keys.element_size() for layer in held)

    def launches(self) -> str:
        return "compiled"

    def close(self) -> None:
        self.cache = self.compiled = None
        torch._dynamo.reset()  # its graphs would keep the cache's memory
        super().close()


class CapturedRun(Run):
    """Our captured step, with the cache that `make` returns."""

    def __init__(
        self, model: Any, rows: int, tokens: int, room: int, make: Callable[[], Any], settings: StepSettings
    ) -> None:
        super().__init__(model, rows, tokens, room)
        from quietgoose.cache.decode import compile_decode

        self.settings = settings
        self.decode = compile_decode(
            model, make(), capacity=tokens + room, fuse=settings.fuse, join=settings.join, stream=settings.stream,
            tune=settings.tune,
        )  # fmt: skip

    def prefill(self, ids: Tensor) -> None:
        self.decode.reset()
        self.token = self.decode.prefill(ids).argmax(-1)

    def fill(self) -> None:
        cache = self.decode.cache
        if hasattr(cache, "begin"):
            cache.begin(self.rows, self.tokens, None, self.device)
            for layer in range(self.model.config.num_hidden_layers):
                cache.update(self.random_layer(), self.random_layer(), layer)
        else:
            fill_zip(self, cache)
        self.decode.resume(self.rows, self.tokens)

    def step(self) -> None:
        self.token = self.decode.step(self.token).argmax(-1)

    def cache_bytes(self) -> int:
        counted = self.decode.cache.nbytes()
        return int(getattr(counted, "total", counted))

    def launches(self) -> str:
        return f"captured, {self.settings}"

    def close(self) -> None:
        self.decode.close()
        self.decode = None
        self.attention(STOCK_ATTENTION)
        super().close()


def fill_zip(run: Run, cache: Any) -> None:
    """Random queries, keys and values packed by the policy, layer by layer."""
    heads = run.model.config.num_attention_heads
    valid = torch.ones(run.rows, run.tokens, dtype=torch.bool, device=run.device)
    for layer in cache.layers:
        key, value = run.random_layer(), run.random_layer()
        layer.lazy_initialization(key, value)
        layer.state.prefill(run.random_layer(heads), key, value, valid, scaling=key.shape[-1] ** -0.5)
    wait(run.device)


def make_run(name: str, model: Any, rows: int, tokens: int, room: int, settings: StepSettings) -> Run:
    """The peer called `name` on a cell of rows x tokens with room for `room` steps. NotAvailable, with the reason."""
    base, _, policy = name.partition(":")
    policy = policy or "paper"
    if base == "static_compiled":
        return StaticCompiledRun(model, rows, tokens, room)
    if base == "static_captured":
        from quietgoose.cache.decode_static import StaticKV

        kernel: Any = policy if name.endswith((":flash", ":sdpa")) else "auto"
        return CapturedRun(
            model, rows, tokens, room,
            lambda: StaticKV(model.config, capacity=tokens + room, kernel=kernel), settings,
        )  # fmt: skip
    if base == "zip_captured":
        from quietgoose.cache.hf import ZipCache

        return CapturedRun(
            model, rows, tokens, room, lambda: ZipCache(model.config, policy, capacity=tokens + room), settings
        )
    if base == "zip_eager":
        return ZipEagerRun(model, rows, tokens, room, _peer(model, "zipcache", policy=policy))
    kind, bits = re.fullmatch(r"([a-z0-9]*?)([24]?)", base).groups()
    options: dict[str, Any] = {}
    if kind in ("quanto", "hqq"):
        options = {"nbits": int(bits or 4)}
    elif kind == "kivi":
        options = {"bits": int(bits or 2)}
    return EagerRun(model, rows, tokens, room, _peer(model, base if base in ("h2o", "fp8") else kind, **options))


def _peer(model: Any, name: str, **options: Any) -> Callable[[], Any]:
    def make() -> Any:
        try:
            from kv_peers import make_peer
        except ImportError as reason:
            raise NotAvailable(f"kv_peers.py: {reason}") from reason
        try:
            return make_peer(name, model.config, **options)
        except (ImportError, ValueError) as reason:
            raise NotAvailable(f"{type(reason).__name__}: {reason}") from reason

    return make
