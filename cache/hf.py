"""ZipCache: the quantised KV cache as a transformers `Cache`, for any causal LM that uses the attention registry.

    cache = ZipCache(model.config)                       # or policy="small", {"preset": "quality", "seed": 1}, ...
    model.generate(**inputs, past_key_values=cache)

Making one switches the config to the attention `quietgoose_zip`, which reads packed keys and values in place; calls
without a ZipCache keep running the stock attention with its own mask. Full-attention layers are packed; sliding-window
and linear-attention layers keep transformers' own cache layer. Not compileable by `generate` (decode.py captures the
step instead). Shapes: B rows, Hk KV heads, D head size. transformers 5.17 and later.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

from ..base.errors import EnvironmentProblem, RecipeError
from .columns import SharedTables
from .hf_attention import NAME, restore, switch
from .hf_layer import SharedConfig, ZipLayer, warn_once
from .memory import Bytes
from .policy import Policy, resolve_policy

__all__ = ["NAME", "ZipCache", "restore", "switch"]

OLDEST = (5, 17)
KEPT_STOCK = (DynamicSlidingWindowLayer, LinearAttentionLayer)


class ZipCache(Cache):
    """A KV cache in 4 and 2 bits by token saliency, read in place by the attention.

    config    the model's own config object (composite ones: the text part is taken)
    policy    a Policy, the name of a preset (default, paper, quality, small, lossless), or a mapping of settings
    capacity  tokens, for static storage (CUDA graphs); None: storage grows
    offload   every packed layer goes to the CPU after its attention and comes back for the next; sliding windows stay

    Raises RecipeError for encoder-decoder models, attention implementations we cannot stand in front of and layer
    types that mix attention with other states; EnvironmentProblem for a transformers older than 5.17.
    """

    def __init__(
        self,
        config: Any,
        policy: Policy | str | Mapping[str, Any] | None = "default",
        capacity: int | None = None,
        *,
        offload: bool = False,
    ) -> None:
        _check_version()
        _check_architecture(config)
        if capacity is not None and (isinstance(capacity, bool) or not isinstance(capacity, int) or capacity < 1):
            raise RecipeError(f"ZipCache capacity = {capacity!r}: a number of tokens, or None to grow", code="CFG-070")
        self.policy = resolve_policy(policy)
        self.capacity = capacity
        text = config.get_text_config(decoder=True)
        shared, tables = SharedConfig(text), SharedTables()
        layers: list[Any] = []
        for index, stock in enumerate(DynamicCache(config=text).layers):
            if type(stock) is DynamicLayer:
                layers.append(ZipLayer(self.policy, index, shared, capacity, offload, tables))
            elif type(stock) in KEPT_STOCK:
                layers.append(stock)
            else:
                raise RecipeError(
                    f"layer {index} keeps a {type(stock).__name__}; a ZipCache packs full-attention layers and leaves "
                    "sliding-window and linear-attention layers to transformers; use a DynamicCache",
                    code="CFG-071",
                )
        beyond = [index for index in self.policy.sixteen_bit_layers if index >= len(layers)]
        if beyond:
            raise RecipeError(
                f"cache policy: sixteen_bit_layers names {beyond}; this model's layers are 0 to {len(layers) - 1}",
                code="CFG-050",
            )
        if not any(isinstance(layer, ZipLayer) for layer in layers):
            warn_once(
                "nothing to pack",
                "no layer of this model is a full-attention layer (sliding windows stay at 16 bits): a ZipCache saves "
                "nothing here",
            )
        switch(text)
        super().__init__(layers=layers)
        self._shared = shared

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As transformers calls it, a layer at a time (hf_layer.py); refuses a model of more layers."""
        if layer_idx >= len(self.layers):
            raise RecipeError(
                f"layer {layer_idx} of the model with a ZipCache of {len(self.layers)} layers: make it as "
                "ZipCache(model.config), with the very config of the model",
                code="CFG-068",
            )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    @property
    def zip_layers(self) -> list[ZipLayer]:
        """The layers that are packed; the others are transformers' own."""
        return [layer for layer in self.layers if isinstance(layer, ZipLayer)]

    @property
    def is_compileable(self) -> bool:
        """False, so that `generate` does not compile on its own; `compile_decode` captures the step instead."""
        return False

    def fork(self, times: int) -> ZipCache:
        """A cache of `times` rows for each row of this one, all reading this one's packed tokens without a copy.

        Row b * times + s continues row b. Only the 16-bit tail is copied. This cache must not be written while the
        fork is in use.
        """
        if isinstance(times, bool) or not isinstance(times, int) or times < 1:
            raise RecipeError(f"fork({times!r}): a number of continuations, at least 1", code="CFG-072")
        made, tables = self._shell(), SharedTables()
        for layer in self.layers:
            if isinstance(layer, ZipLayer):
                made.layers.append(layer.fork(times, tables))
            else:
                twin: Any = copy.deepcopy(layer)
                if not hasattr(twin, "batch_repeat_interleave"):
                    raise RecipeError(f"a {type(twin).__name__} cannot be forked", code="CFG-072")
                twin.batch_repeat_interleave(times)
                made.layers.append(twin)
        return made

    def to(self, device: torch.device | str) -> ZipCache:
        """Move everything stored; the next forward brings packed layers back to the device of their keys, `to` the others."""
        for layer in self.layers:
            if isinstance(layer, ZipLayer):
                if layer.state is not None:
                    layer.state.to(device)
            else:
                for holder, name, value in _tensors_of(layer):
                    holder[name] = value.to(device)
        return self

    def save(self, path: str | Path) -> Path:
        """Write everything stored, bit for bit, as one safetensors file; `ZipCache.load` is the inverse."""
        from .hf_save import save

        return save(self, Path(path))

    @classmethod
    def load(cls, path: str | Path, config: Any, *, device: torch.device | str = "cpu") -> ZipCache:
        """Restore what `save` wrote, for a model of the same shape. Nothing is unpickled.

        Raises ArtifactError for a file that is torn, foreign, of another version or of another model's shape.
        """
        from .hf_save import load

        return load(cls, Path(path), config, torch.device(device))

    def nbytes(self) -> Bytes:
        """Bytes in use by part, all layers together; stock layers count in `tail`, everything in `total`."""
        parts = [layer.state.nbytes() for layer in self.zip_layers if layer.state is not None]
        stock = sum(_stock_bytes(layer) for layer in self.layers if not isinstance(layer, ZipLayer))
        return sum(parts, Bytes(tail=stock, total=stock))

    def bytes_per_token(self) -> float:
        """Bytes of all layers together for one stored token of one row; 0 when nothing is stored."""
        counted = self.nbytes()
        return counted.total / counted.tokens if counted.tokens else 0.0

    def __repr__(self) -> str:
        policy = self.policy
        packed, rows = len(self.zip_layers), next((x.state.batch for x in self.zip_layers if x.state is not None), 0)
        counted = self.nbytes()
        return (
            f"ZipCache({rows} rows, {self.get_seq_length()} columns, {packed} of {len(self.layers)} layers packed in "
            f"{policy.high_bits}/{policy.low_bits} bits, salient {policy.salient_ratio:g}, {counted.total} bytes, "
            f"{self.bytes_per_token():.1f} a token)"
        )

    def _shell(self) -> ZipCache:
        """This cache without layers, for the same config."""
        made = object.__new__(type(self))
        made.policy, made.capacity, made._shared = self.policy, self.capacity, self._shared
        Cache.__init__(made, layers=[])
        return made


def _stock_bytes(layer: Any) -> int:
    return sum(x.numel() * x.element_size() for _, _, x in _tensors_of(layer))


def _tensors_of(layer: Any) -> list[tuple[dict[Any, Any], Any, Tensor]]:
    """(where it is held, under which name, tensor) of a layer of transformers; states of linear attention lie in dicts."""
    holders = [vars(layer), *(held for held in vars(layer).values() if isinstance(held, dict))]
    return [(holder, name, held) for holder in holders for name, held in holder.items() if isinstance(held, Tensor)]


def _check_version() -> None:
    found = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if found < OLDEST:
        raise EnvironmentProblem(
            f"transformers {transformers.__version__}: ZipCache needs {OLDEST[0]}.{OLDEST[1]} or later",
            code="ENV-010",
        )


def _check_architecture(config: Any) -> None:
    if not hasattr(config, "get_text_config"):
        raise RecipeError(
            f"ZipCache({type(config).__name__}): pass the config of a transformers model, model.config", code="CFG-073"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise RecipeError(
            f"{type(config).__name__} is an encoder-decoder: ZipCache is for decoder-only models", code="CFG-073"
        )
