"""`torch.compile` of a model's repeated layers: one graph, forward and backward, serves all of them.

A layer at a time, because thirty layers in one graph compile for minutes and a layer's graph already fuses what matters.
DeepSpeed is outside of the graphs: ZeRO-0 to 2 hook parameters only. ZeRO-3 hooks every module, so it goes without.
Called by the jobs; `train.compile` in the recipe (recipe_train.py) chooses.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from ..base.errors import RecipeError
from ..routing.routed_linear import RoutedLinear
from .recipe import RowTrainSettings
from .strategy import zero_stage

Mode = Literal["off", "layers", "graph"]


@dataclass(frozen=True)
class Speed:
    """How a training goes: `mode` and why, and the attention the model was set to."""

    mode: Mode
    reason: str
    attention: str


def choose_speed(
    model: nn.Module, base_attention: str, settings: RowTrainSettings, device: torch.device, strategy: str
) -> Speed:
    """What `settings` mean on this device with this strategy, and set the model's attention accordingly.

    RecipeError CFG-032 if what is asked for cannot run; `auto` takes what can.
    """
    mode, reason = choose_mode(settings, device, strategy)
    if mode != "off" and not any(True for _ in _repeated(model)):
        if settings.compile != "auto":
            raise _impossible(settings.compile, f"{type(model).__name__} names no repeated layers")
        mode, reason = "off", f"{type(model).__name__} names no repeated layers"
    dtype = next(model.parameters()).dtype
    dropout = float(getattr(model.config, "attention_dropout", 0.0) or 0.0)  # type: ignore[union-attr]
    attention = choose_attention(settings.attention, base_attention, device, dtype, mode, dropout)
    if attention != base_attention:
        from .data import packed_attention  # noqa: F401  (registers the names)

        model.set_attn_implementation(attention)  # type: ignore[operator]
    return Speed(mode, reason, attention)


def choose_mode(settings: RowTrainSettings, device: torch.device, strategy: str) -> tuple[Mode, str]:
    """The mode and its reason; `auto` takes graphs on CUDA, layers where activations are recomputed, off elsewhere."""
    wanted = settings.compile
    stage = zero_stage(strategy)
    obstacle = ""
    if stage == 3:
        obstacle = f"strategy {strategy}: ZeRO-3 gathers weights in hooks of every module, which cut a graph to pieces"
    elif wanted == "graph" and device.type != "cuda":
        obstacle = f"CUDA graphs need a CUDA device, not {device.type}"
    elif wanted == "graph" and settings.activation_checkpointing:
        obstacle = "activation_checkpointing, which a captured step has no use for"
    if wanted == "auto":
        if obstacle or device.type != "cuda":
            return "off", obstacle or f"device {device.type}"
        return ("layers", "activation_checkpointing") if settings.activation_checkpointing else ("graph", "device cuda")
    if obstacle and wanted != "off":
        raise _impossible(wanted, obstacle)
    return wanted, "asked for"


def _impossible(wanted: str, why: str) -> RecipeError:
    return RecipeError(f"train.compile: {wanted} is impossible: {why}; set train.compile: auto", code="CFG-032")


def _repeated(model: nn.Module) -> Iterator[nn.Module]:
    """The repeated layers: what Hugging Face never splits over devices."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    return (m for m in model.modules() if type(m).__name__ in names)


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The repeated layers that hold adapted linears, in module order."""
    return [m for m in _repeated(model) if any(isinstance(part, RoutedLinear) for part in m.modules())]


def compile_layers(model: nn.Module) -> int:
    """Compile every repeated layer in place; returns how many. Shapes are static: rows, length and groups of a run are."""
    layers = layers_of(model)
    torch._dynamo.reset()  # all modules share one limit of graphs, and what an earlier stage compiled is over
    for layer in layers:
        layer.compile(fullgraph=True, dynamic=False)
    return len(layers)


def choose_attention(
    wanted: str, base: str, device: torch.device, dtype: torch.dtype, mode: Mode, dropout: float = 0.0
) -> str:
    """The attention of a training: `wanted` of the recipe, `base` what the model was loaded with. RecipeError CFG-032."""
    from .data.attention import FLEX, VARLEN

    obstacle = ""
    if device.type != "cuda":
        obstacle = f"a CUDA device, not {device.type}"
    elif wanted == "varlen" and dtype not in (torch.bfloat16, torch.float16):
        obstacle = f"base.dtype bfloat16, not {dtype}"
    elif wanted == "flex" and mode == "off":
        obstacle = "train.compile: layers"
    if dropout > 0:
        obstacle = f"a model without attention dropout, not {dropout:g}"
    if wanted == "base" or (wanted == "auto" and (obstacle or base == "flash_attention_2" or dtype.itemsize > 2)):
        return base
    if obstacle:
        raise RecipeError(f"train.attention: {wanted} needs {obstacle}; set train.attention: auto", code="CFG-032")
    return FLEX if wanted == "flex" else VARLEN
