"""One run from recipe to export: the stages in order, each skipped if sealed, resumed if torn, under one run folder.

Started by launch/train.py under the DeepSpeed launcher, torchrun or plain python:
`deepspeed launch/train.py --config launch/recipes/nano_demo.yaml`
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from ..base import distributed
from ..base.distributed import World
from ..base.errors import ExitCode, QuietGooseError, RecipeError, StopRequested
from ..base.files import sha256_json, write_atomic
from ..evaluation.report import Trace, read_events, write_report
from ..evaluation.tables import from_json, to_markdown
from . import facts as machine
from .checkpoint import Checkpoints
from .engine import Engine, initialize_distributed, shutdown
from .evaluate_stage import run_evaluate
from .loop import train
from .recipe import Recipe, TrainSettings
from .run_folder import RunFolder, held
from .settings import recipe_to_yaml
from .stages import STAGES, Context, Stage
from .stop import StopControl, leave, run_guarded
from .strategy import load_strategy
