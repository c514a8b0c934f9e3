"""Settings of the image family (U-REPA): the recipe's blocks `images`, `teacher`, `urepa`, `compare` and `evaluate.images`.

Part of the recipe (train/recipe.py). Teachers, samplers and judges: alignment/settings.py; the U-Net and its alignment:
alignment/model_settings.py; images: train/image_settings.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from ..alignment.model_settings import AlignSettings, AverageSettings, BackboneSettings
from ..alignment.settings import TeacherSettings
from .image_settings import ImageEvaluation, ImageSettings
from .recipe_train import OptimizerSettings, TrainSettings

__all__ = ["ImageEvaluation", "ImageSettings", "TeacherSettings"]


def _training() -> TrainSettings:
    optimizer = OptimizerSettings(lr=1e-4, warmup=0.0)
    return TrainSettings(steps=4000, rows_per_expert=256, micro_rows=256, optimizer=optimizer)


@dataclass
class UrepaSettings:
    """The `urepa` stage. `dtype`: of the forward pass (weights and optimizer stay fp32). `compile`: torch.compile the step's
    forward and backward; not under ZeRO-3. `label_drop`: share of labels replaced by the null class.
    train.rows_per_expert: images of a step."""

    backbone: BackboneSettings = field(default_factory=BackboneSettings)
    align: AlignSettings = field(default_factory=AlignSettings)
    average: AverageSettings = field(default_factory=AverageSettings)
    label_drop: float = 0.1
    dtype: Literal["float32", "bfloat16"] = "float32"
    compile: bool = False
    train: TrainSettings = field(default_factory=_training)


@dataclass
class CompareSettings:
    """The `compare` stage: every arm with every seed is a run of its own below the output folder, run here unless it is found
    finished (train/compare.py).

    arms         name -> settings that differ from the recipe's (dotted name -> value)
    seeds        one_seed: arms that run with the first seed only
    only         names of runs (ARM-SEED) to run in this process, without the table
    treatment    the arm in question. It is called better only if its first score is below that of each of `controls`, by more than
                 the 95 % interval of the paired differences over seeds
    """

    arms: dict[str, dict[str, Any]] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    one_seed: list[str] = field(default_factory=list)
    only: list[str] = field(default_factory=list)
    treatment: str = ""
    controls: list[str] = field(default_factory=list)
