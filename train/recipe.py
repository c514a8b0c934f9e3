"""The recipe: typed settings of one run. YAML on disk, overridable on the command line, saved with every checkpoint.

Parsing and cross-checks live in train/settings.py (`load_recipe`); this file only names the settings.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from .recipe_images import CompareSettings, ImageEvaluation, ImageSettings, TeacherSettings, UrepaSettings
from .recipe_train import OptimizerSettings, RowTrainSettings, TrainSettings

__all__ = ["OptimizerSettings", "RowTrainSettings", "TrainSettings"]

Stage = Literal["base", "experts", "gates", "thoughts", "teacher", "urepa", "evaluate", "export", "compare"]
RouterName = Literal["phatgoose", "phatgoose_mean", "average_activation", "arrow", "random", "uniform", "oracle"]
ArmName = Literal[
    "base", "experts", "oracle", "random", "permuted", "average_activation", "arrow", "uniform", "merged", "ties",
    "dare", "phatgoose", "phatgoose_mean",
]  # fmt: skip
ThoughtArmName = Literal[
    "base", "no_thought", "untrained", "thought", "shuffled", "pause", "random", "temperature",
]  # fmt: skip
STAGES: tuple[str, ...] = (
    "base", "experts", "gates", "thoughts", "teacher", "urepa", "evaluate", "export", "compare",
)  # fmt: skip


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
    """`model`: `nano`, `smollm2`, a folder in Hugging Face format, or a hub id (`owner/name`, `owner/name@commit`). dtype of the
    frozen weights."""

    model: str = "nano"
    revision: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    nano: NanoSettings = field(default_factory=NanoSettings)
    train: TrainSettings = field(default_factory=TrainSettings)


@dataclass
class SourceSettings:
    """Where an expert's rows come from: a .jsonl or .jsonl.gz file, a folder in the collection's layout
    (train/validation/test.jsonl.gz), a Hugging Face dataset name, `skills:NAME` or `steps:NAME` (procedural, embedded);
    several, joined by ` + `, are read one after another."""

    path: str = ""
    split: str = "train"
    limit: int | None = None


@dataclass
class DataSettings:
    """`collection`: a folder of task folders; `include` picks experts from it. `experts`: further sources by name.
    Exactly the union is trained. `base`, `thoughts`: the rows of those stages."""

    collection: str | None = None
    include: list[str] = field(default_factory=list)
    experts: dict[str, SourceSettings] = field(default_factory=dict)
    base: SourceSettings | None = None
    thoughts: SourceSettings | None = None
    sequence_length: int = 512
    loss_on: Literal["completion", "all"] = "completion"
    on_bad_row: Literal["error", "skip"] = "error"
    cache: str | None = None


@dataclass
class ExpertSettings:
    """LoRA by PEFT's format. `targets`: names of linears as in PEFT, or `all-linear`. `load`: folders of PEFT
    adapters taken as experts as they are, by name; they are not trained, their gates are. `misrouting`: probability
    that a token's adapter counts at a site with a random weight in [0, 1) only while it is trained, as if a router
    had sent the rest elsewhere."""

    rank: int = 16
    alpha: float = 16.0
    rslora: bool = False
    misrouting: float = 0.0
    targets: list[str] = field(default_factory=lambda: ["all-linear"])
    load: dict[str, str] = field(default_factory=dict)
    train: RowTrainSettings = field(default_factory=RowTrainSettings)


@dataclass
class GateSettings:
    """PHATGOOSE, stage two; defaults are the paper's: lr 5e-3, 100 steps, constant after 6 % warm-up."""

    train: RowTrainSettings = field(
        default_factory=lambda: RowTrainSettings(steps=100, optimizer=OptimizerSettings(lr=5e-3))
    )


@dataclass
class ThoughtSettings:
    """Quiet-STaR: thoughts before each token. What is null is the preset's (thoughts/config.py, with the meaning of each).

    over         base | routed (frozen experts and gates, the recipe's router) | expert:NAME (that expert for every token)
    trainable    lora (a fresh one on top, START, END, mixing head) | embeddings (START, END, head) | full (all weights too)
    control      the run is a control: no_thoughts (plain fine-tuning, same tokens), same_compute (plain fine-tuning for as
                 many steps as cost the same), pause, random_thoughts, no_policy
    start_like, end_like   texts whose first token the embeddings of START and END begin as
    ratio_cap, clip, baseline_decay   0 switches them off
    curriculum_sizes         [tokens, lookahead] of one equal share of the steps each (preset curriculum)
    chunk        anchors of a row in one piece of the gradient pass; 0: all
    rollout_chunk   thoughts of a row (anchors x samples) sampled together; 0: all. Both bound memory and change nothing else
    capture      auto (on a GPU the rollout's steps, the pass over the text and the gradient pass become CUDA graphs) | never (for a
                 forward that waits for the device)
    lr_meta, lr_head         their learning rates; train.optimizer.lr is the adapter's (or the weights')
    train.activation_checkpointing   layers of the gradient pass run again instead of keeping what they computed
    train.rows_per_expert    packed rows a step
    """

    preset: Literal["default", "paper", "rlp", "curriculum"] = "default"
    over: str = "base"
    trainable: Literal["lora", "embeddings", "full"] = "lora"
    control: Literal[
        "none", "no_thoughts", "same_compute", "pause", "random_thoughts", "no_policy"
    ] = "none"  # fmt: skip
    tokens: int | None = None
    lookahead: int | None = None
    samples: int | None = None
    temperature: float | None = None
    policy_temperature: float | None = None
    advantage: Literal["two_sided", "one_sided", "leave_one_out"] | None = None
    ratio_cap: float | None = None
    clip: float | None = None
    base_weight: float | None = None
    mixed_weight: float | None = None
    beta: float | None = None
    entropy_bonus: float | None = None
    head: Literal["paper", "bounded", "thought"] | None = None
    initial_weight: float | None = None
    anchors: Literal["every", "every_n", "random", "entropy"] | None = None
    every: int | None = None
    share: float | None = None
    limit: int | None = None
    baseline_decay: float | None = None
    rollout_cache: Literal["exact", "int8", "int4"] = "exact"
    curriculum_sizes: list[list[int]] = field(default_factory=list)
    start_like: str = "---"
    end_like: str = "---"
    ban_special: bool = True
    chunk: int = 0
    rollout_chunk: int = 0
    capture: Literal["auto", "never"] = "auto"
    loss_on: Literal["completion", "all"] = "all"
    rank: int = 16
    alpha: float = 16.0
    targets: list[str] = field(default_factory=lambda: ["all-linear"])
    lr_meta: float = 1e-4
    lr_head: float = 1e-3
    train: TrainSettings = field(default_factory=lambda: TrainSettings(steps=200, optimizer=OptimizerSettings(lr=3e-4)))


@dataclass
class RouterSettings:
    """`k` experts a token at inference."""

    name: RouterName = "phatgoose"
    k: int = 2


@dataclass
class ThoughtEvaluation:
    """The table of thoughts. `tasks`: name -> folder or `steps:NAME`; `arms`: its rows (train/thought_arms.py);
    `generated`: tasks with numeric answers that are really generated, thinking before every token, in a table of their own;
    `text`: held-out rows whose gain is shown by the base's entropy; `limit`: items of a task; `temperature_split` fits the
    temperature arm's one number, on the tasks that have it: the arm leaves the others out, and the table says so; `rows`: packed
    rows of `text`."""

    tasks: dict[str, str] = field(default_factory=dict)
    generated: dict[str, str] = field(default_factory=dict)
    arms: list[ThoughtArmName] = field(
        default_factory=lambda: [
            "base",
            "no_thought",
            "untrained",
            "thought",
            "shuffled",
            "pause",
            "random",
            "temperature",
        ]
    )
    text: SourceSettings | None = None
    rows: int = 32
    limit: int | None = None
    temperature_split: str = "validation"


@dataclass
class EvaluateSettings:
    """`collection`/`include` or `tasks`: folders in the collection's layout; with neither, `data.collection`.
    `arms`: rows of the table. `thoughts`, `images`: the tables of the stages `thoughts` and `urepa`."""

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
            "phatgoose_mean",
        ]
    )
    limit: int | None = None
    batch_tokens: int = 8192
    max_new_tokens: int = 64
    bootstrap: int = 1000
    baseline: str = "base"
    thoughts: ThoughtEvaluation = field(default_factory=ThoughtEvaluation)
    images: ImageEvaluation = field(default_factory=ImageEvaluation)


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
    thoughts: ThoughtSettings = field(default_factory=ThoughtSettings)
    images: ImageSettings = field(default_factory=ImageSettings)
    teacher: TeacherSettings = field(default_factory=TeacherSettings)
    urepa: UrepaSettings = field(default_factory=UrepaSettings)
    compare: CompareSettings = field(default_factory=CompareSettings)
    router: RouterSettings = field(default_factory=RouterSettings)
    evaluate: EvaluateSettings = field(default_factory=EvaluateSettings)
    tracking: TrackingSettings = field(default_factory=TrackingSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    resume: ResumeSettings = field(default_factory=ResumeSettings)
