"""Settings of one training: how long, in which portions, with which optimizer. Part of the recipe (train/recipe.py)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class OptimizerSettings:
    """AdamW and its schedule. `clip` is the largest gradient norm, per expert where experts train together;
    0 turns clipping off. `warmup` is a share of `steps`."""

    lr: float = 1e-3
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    warmup: float = 0.06
    min_lr_ratio: float = 0.0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip: float = 1.0


@dataclass
class TrainSettings:
    """How long and in which portions. `rows_per_expert`: packed rows of each expert (images, where images are trained) in
    one optimizer step, over all ranks and accumulation. `micro_rows`: rows one process holds at once."""

    steps: int = 100
    rows_per_expert: int = 8
    micro_rows: int = 8
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    activation_checkpointing: bool = False
    strategy: str | None = None


@dataclass
class RowTrainSettings(TrainSettings):
    """Training of experts or gates. How fast, not what: no trained number depends on these but by rounding.

    compile     off | layers (torch.compile of the model's repeated layers) | graph (that, and the model's forward and
                backward replayed as CUDA graphs) | auto (graph on CUDA where strategy and model let it, layers with
                activation_checkpointing, else off)
    attention   base (what base.attention says) | flex (compiled block mask) | varlen (flash kernels that come with torch) |
                auto (varlen on CUDA in 16 bit, else base)
    parallel    data (every process trains all experts on its share of the rows) | expert (every process has experts, rows,
                gradients and moments of its own, and nothing of them is sent)
    """

    compile: Literal["auto", "off", "layers", "graph"] = "auto"
    attention: Literal["auto", "base", "flex", "varlen"] = "auto"
    parallel: Literal["data", "expert"] = "data"
