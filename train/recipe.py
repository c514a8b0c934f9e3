"""The recipe: typed settings of one run. YAML on disk, overridable on the command line, saved with every checkpoint.

Parsing and cross-checks live in train/settings.py (`load_recipe`); this file only names the settings.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Stage = Literal["base", "experts", "gates", "evaluate", "export"]
RouterName = Literal["phatgoose", "average_activation", "arrow", "random", "uniform", "oracle"]
ArmName = Literal[
    "base", "experts", "oracle", "random", "permuted", "average_activation", "arrow", "uniform", "merged", "ties",
    "dare", "phatgoose",
]  # fmt: skip
STAGES: tuple[str, ...] = ("base", "experts", "gates", "evaluate", "export")


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
    """How long and in which portions. `rows_per_expert`: packed rows of each expert in one optimizer step, over
    all ranks and accumulation. `micro_rows`: rows one process holds at once."""

    steps: int = 100
    rows_per_expert: int = 8
    micro_rows: int = 8
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    activation_checkpointing: bool = False
    strategy: str | None = None


@dataclass
class NanoSettings:
    """Shape of the embedded nano model, a Llama trained from scratch by the `base` stage."""

    layers: int = 4
    width: int = 256
    heads: int = 4
    kv_heads: int = 2
    mlp_width: int = 640
    context: int = 256


@dataclass
class BaseSettings:
    """`model`: `nano`, `smollm2`, a folder in Hugging Face format, or a hub id. dtype of the frozen weights."""

    model: str = "nano"
    revision: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    nano: NanoSettings = field(default_factory=NanoSettings)
    train: TrainSettings = field(default_factory=TrainSettings)


@dataclass
class SourceSettings:
    """Where an expert's rows come from: a .jsonl or .jsonl.gz file, a folder in the collection's layout
    (train/validation/test.jsonl.gz), a Hugging Face dataset name, or `skills:NAME` (procedural, embedded)."""

    path: str = ""
    split: str = "train"
    limit: int | None = None


@dataclass
class DataSettings:
    """`collection`: a folder of task folders; `include` picks experts from it. `experts`: further sources by name.
    Exactly the union is trained."""

    collection: str | None = None
    include: list[str] = field(default_factory=list)
    experts: dict[str, SourceSettings] = field(default_factory=dict)
    base: SourceSettings | None = None
    sequence_length: int = 512
    loss_on: Literal["completion", "all"] = "completion"
    on_bad_row: Literal["error", "skip"] = "error"
    cache: str | None = None


@dataclass
class ExpertSettings:
    """LoRA by PEFT's format. `targets`: names of linears as in PEFT, or `all-linear`. `load`: folders of PEFT
    adapters taken as experts as they are, by name; they are not trained, their gates are."""

    rank: int = 16
    alpha: float = 16.0
    rslora: bool = False
    targets: list[str] = field(default_factory=lambda: ["all-linear"])
    load: dict[str, str] = field(default_factory=dict)
    train: TrainSettings = field(default_factory=TrainSettings)


@dataclass
class GateSettings:
    """PHATGOOSE, stage two; defaults are the paper's: lr 5e-3, 100 steps, constant after 6 % warm-up."""

    train: TrainSettings = field(default_factory=lambda: TrainSettings(steps=100, optimizer=OptimizerSettings(lr=5e-3)))


@dataclass
class RouterSettings:
    """`k` experts a token at inference."""

    name: RouterName = "phatgoose"
    k: int = 2


@dataclass
class EvaluateSettings:
    """`collection`/`include` or `tasks`: folders in the collection's layout; with neither, `data.collection`.
    `arms`: rows of the table."""

    collection: str | None = None
    include: list[str] = field(default_factory=list)
    tasks: dict[str, str] = field(default_factory=dict)
    split: str = "test"
    arms: list[ArmName] = field(
        default_factory=lambda: [
            "base",
            "experts",
            "oracle",
            "random",
            "average_activation",
            "merged",
            "arrow",
            "phatgoose",
        ]
    )
    limit: int | None = None
    batch_tokens: int = 8192
    max_new_tokens: int = 64
    bootstrap: int = 1000
    baseline: str = "base"


@dataclass
class TrackingSettings:
    """MLflow. `uri` none: a SQLite file in the output folder. `credentials`: a 0600 file with user and password or
    token, read on rank 0 only."""

    enabled: bool = True
    uri: str | None = None
    experiment: str = "quietgoose"
    credentials: str | None = None
    system_metrics: bool = True


@dataclass
class CheckpointSettings:
    """`every` optimizer steps; `keep` newest verified ones (at least 2)."""

    every: int = 50
    keep: int = 2


@dataclass
class ResumeSettings:
    mode: Literal["auto", "required", "never"] = "auto"
    step: int | None = None
    allow: list[str] = field(default_factory=list)


@dataclass
class Recipe:
    """One run. `strategy` names a file in deepspeed_configs/ (or a path); a stage's `train.strategy` overrides it."""

    version: int = 1
    name: str = "run"
    output: str = "runs/run"
    seed: int = 0
    stages: list[Stage] = field(default_factory=lambda: ["experts", "gates", "evaluate", "export"])
    strategy: str = "zero2"
    base: BaseSettings = field(default_factory=BaseSettings)
    data: DataSettings = field(default_factory=DataSettings)
    experts: ExpertSettings = field(default_factory=ExpertSettings)
    gates: GateSettings = field(default_factory=GateSettings)
    router: RouterSettings = field(default_factory=RouterSettings)
    evaluate: EvaluateSettings = field(default_factory=EvaluateSettings)
    tracking: TrackingSettings = field(default_factory=TrackingSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    resume: ResumeSettings = field(default_factory=ResumeSettings)
