"""A sentence for every setting, for `launch/train.py --help`. The docstrings of the settings' classes say more.

Class -> setting -> what it is; tests hold it complete. Read only when help is asked for (train/settings.py).
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

FIT: Mapping[str, str] = {
    "steps": "optimizer steps",
    "batch": "images of a step",
    "lr": "learning rate of AdamW",
    "weight_decay": "of AdamW",
    "warmup": "share of the steps in which the learning rate rises",
}
TRAIN: Mapping[str, str] = {
    "steps": "optimizer steps",
    "rows_per_expert": "packed rows of each expert (of the stage, where it has none; images) in one step, over all processes",
    "micro_rows": "rows or images that one process holds at once; the rest of a step is accumulated",
    "optimizer": "AdamW and its schedule",
    "activation_checkpointing": "keep only the input of every layer and compute the rest again: less memory, more time",
    "strategy": "a file in deepspeed_configs/ or a path, instead of the recipe's strategy",
}
MEANING: Mapping[str, Mapping[str, str]] = {
    "Recipe": {
        "version": "of the recipe's format",
        "name": "of the run: in tables, the report and MLflow",
        "output": "folder of the run; the same command continues what lies there",
        "seed": "of weights, order of rows, dropout of labels, bootstrap",
        "stages": "what is done, in this order",
        "strategy": "a file in deepspeed_configs/ (zero0 to zero3, zero2_offload, zero3_offload) or a path",
        "base": "the base model", "data": "rows to train on", "experts": "LoRA experts", "gates": "gates of the experts",
        "thoughts": "thoughts before tokens", "images": "images to train on", "teacher": "whose tokens a U-Net is drawn to",
        "urepa": "the U-Net", "compare": "arms times seeds", "router": "how tokens choose experts", "evaluate": "tables",
        "tracking": "MLflow", "checkpoint": "what is saved while training", "resume": "how a run goes on",
    },
    "BaseSettings": {
        "model": "nano, smollm2, a GGUF file of it, a folder in Hugging Face format, or a hub id (owner/name, owner/name@commit)",
        "revision": "branch, tag or commit of a hub id",
        "dtype": "of the frozen weights",
        "attention": "kernel of the model's attention; auto takes the fastest that fits",
        "nano": "shape of the embedded nano model",
        "train": "training of the nano model in the stage `base`",
    },
    "NanoSettings": {
        "layers": "transformer blocks", "width": "of the residual stream", "heads": "query heads", "kv_heads": "key-value heads",
        "mlp_width": "inner width of the MLP", "context": "longest sequence in tokens",
    },
    "TrainSettings": TRAIN,
    "RowTrainSettings": {
        **TRAIN,
        "compile": "torch.compile of layers, CUDA graphs of the whole step (graph), off, or auto; changes speed only",
        "attention": "kernel for packed rows: the base's, flex, varlen, or auto; changes speed only",
        "parallel": "data (every process trains all experts on its rows) or expert (every process has experts of its own)",
    },
    "OptimizerSettings": {
        "lr": "highest learning rate of AdamW", "schedule": "how it falls after the warm-up",
        "warmup": "share of the steps in which it rises", "min_lr_ratio": "share of `lr` at the last step",
        "weight_decay": "of AdamW, times the learning rate", "betas": "decay of AdamW's two moments",
        "eps": "added to the root of the second moment",
        "clip": "largest gradient norm, per expert where experts train together; 0: no limit",
    },
    "DataSettings": {
        "collection": "a folder of task folders; each is an expert",
        "include": "only these tasks of the collection; none named: all",
        "experts": "further experts, name -> source",
        "base": "rows of the stage `base`", "thoughts": "rows of the stage `thoughts`",
        "sequence_length": "tokens of a packed row",
        "loss_on": "the tokens that are learned", "on_bad_row": "stop with file, line and field, or skip and count",
        "cache": "folder of tokenised rows; ~/.cache/quietgoose if not set",
    },
    "SourceSettings": {
        "path": "a .jsonl(.gz) file, a task folder, a Hugging Face dataset, skills:NAME or steps:NAME; several joined by ` + `",
        "split": "train, validation or test", "limit": "only the first rows",
    },
    "ExpertSettings": {
        "rank": "of the LoRA matrices", "alpha": "LoRA's scale is alpha / rank", "rslora": "scale alpha / sqrt(rank) instead",
        "misrouting": "probability that an adapter counts only in part at a site while it is trained",
        "targets": "names of linears as in PEFT, or all-linear",
        "load": "name -> folder of a PEFT adapter, taken as an expert as it is",
        "train": "training of the experts",
    },
    "GateSettings": {"train": "training of the gates"},
    "ThoughtSettings": {
        "preset": "the numbers of a paper; what is set beside it overrides it",
        "over": "what thinks: base, routed (experts and gates), or expert:NAME",
        "trainable": "a fresh LoRA with START, END and mixing head; these without the LoRA (embeddings); or all weights",
        "control": "make the run a control experiment",
        "tokens": "sampled tokens of a thought", "lookahead": "true tokens scored after each thought",
        "samples": "thoughts of a position", "temperature": "of sampling", "policy_temperature": "of the policy term",
        "advantage": "what is subtracted from a reward", "ratio_cap": "largest importance weight; 0: no weight",
        "clip": "PPO's epsilon; 0: none", "base_weight": "of the loss without thought", "mixed_weight": "of the loss with it",
        "beta": "of the policy term", "entropy_bonus": "of the entropy of thought tokens",
        "head": "how predictions are mixed: paper, bounded, or the thought's alone",
        "initial_weight": "mixing weight at the first step", "anchors": "positions that think while training",
        "every": "anchors every_n: one position in so many", "share": "anchors random and entropy: share of the positions",
        "limit": "most anchors of a row", "baseline_decay": "of the moving average that rewards are measured against; 0: none",
        "rollout_cache": "how keys and values of thoughts are kept while sampling",
        "curriculum_sizes": "preset curriculum: [tokens, lookahead] of equal shares of the steps",
        "start_like": "START begins as the first token of this text", "end_like": "END begins as the first token of this text",
        "ban_special": "never sample the tokenizer's special tokens",
        "chunk": "anchors at once in the gradient pass, bounds memory; 0: all",
        "rollout_chunk": "thoughts of a row sampled together, bounds memory; 0: all",
        "capture": "replay a step as CUDA graphs where possible, or never", "loss_on": "the tokens that are learned",
        "rank": "of the LoRA on top", "alpha": "of the LoRA on top", "targets": "linears of the LoRA on top",
        "lr_meta": "learning rate of START and END", "lr_head": "learning rate of the mixing head",
        "train": "training of the thoughts",
    },
    "ImageSettings": {
        "source": "digits, a .parquet file, a folder of images by class, or a Hugging Face dataset (NAME, NAME:CONFIG)",
        "split": "of the training images", "test": "source of the held-out images", "test_split": "their split",
        "holdout": "share of the training images held out where there are no test images",
        "image_column": "column of the images; found if not set", "label_column": "column of the labels; found if not set",
        "size": "side in pixels to resize and crop to; not set: as they are", "colour": "rgb, grey, or as the first image",
        "flip": "mirror images at random while training", "limit": "only the first images",
        "vae": "folder of a diffusers AutoencoderKL: train on its latents",
        "on_bad_image": "stop, or skip and count", "cache": "folder of decoded images, latents and features",
    },
    "TeacherSettings": {
        "kind": "none, a ViT trained here without labels (self) or on labels (label), random, a folder (file), or the average (ema)",
        "path": "kind file: a ViT or DINOv2 folder of transformers", "resize": "kind file: side the images are resized to",
        "grid": "side that the teacher's tokens are resized to", "patch": "of the ViT trained here", "width": "of that ViT",
        "layers": "of that ViT", "heads": "of that ViT", "mask_ratio": "share of the patches that are masked",
        "decoder_width": "of masked autoencoding", "decoder_layers": "of masked autoencoding",
        "seed": "of the teacher's weights and masks", "cache": "keep the teacher's tokens on disk, or compute them every step",
        "cache_gib": "most of the disk that `cache: auto` takes", "train": "training of the teacher",
    },
    "FitSettings": FIT,
    "UrepaSettings": {
        "backbone": "shape of the U-Net", "align": "how its tokens are drawn to the teacher's", "average": "of its weights",
        "label_drop": "share of labels replaced by the null class", "dtype": "of the forward pass; weights stay float32",
        "compile": "torch.compile the step; not under ZeRO-3", "train": "training of the U-Net",
    },
    "BackboneSettings": {
        "kind": "a U of transformer blocks, or diffusers' UNet2DModel", "preset": "its size; what is set beside it overrides it",
        "patch": "side of a patch", "width": "of the blocks", "heads": "of the attention",
        "blocks": "numbers of blocks: encoder, middle, decoder",
        "extra_merge": "what the linear after the upsampling joins: the encoder's output, the patches, or nothing",
        "time_scale": "factor of t before it is embedded", "diffusers": "kind diffusers: options of UNet2DModel",
    },
    "AlignSettings": {
        "weight": "of the alignment; 0: none", "token": "of the token loss", "manifold": "of the manifold loss",
        "tap": "the block that is aligned: auto, a number from 1, or a module's name",
        "order": "upsampling before, inside or after the projector", "upsample": "its mode",
        "match": "whose grid tokens are compared on", "scope": "manifold within an image, over images, or both",
        "projector": "three layers, or one 3x3 convolution", "hidden": "width of the mlp projector",
        "time_aware": "scale and shift projected tokens from t", "normalise_space": "z-score teacher tokens over space",
        "schedule": "of the weight over the steps", "stop": "share of the steps after which alignment ends",
        "over_time": "of the weight over t", "teacher_tap": "kind ema: the average's block",
        "noise_gap": "kind ema: how much less noise the average may see",
        "inter_over_micro": "let scope inter look at one micro-batch at a time",
    },
    "AverageSettings": {"decay": "of the moving average of weights", "ramp": "smaller decay at the start"},
    "CompareSettings": {
        "arms": "name -> settings that differ", "seeds": "of every arm", "one_seed": "arms with the first seed only",
        "only": "runs (ARM-SEED) to do in this process, without the table", "treatment": "the arm in question",
        "controls": "arms that it has to beat",
    },
    "RouterSettings": {"name": "how tokens choose experts", "k": "experts a token"},
    "EvaluateSettings": {
        "collection": "a folder of task folders; the training one if nothing is named", "include": "only these tasks of it",
        "tasks": "further tasks, name -> folder or skills:NAME", "split": "train, validation or test",
        "arms": "rows of the table", "limit": "only the first items of every task", "batch_tokens": "tokens of a forward pass",
        "max_new_tokens": "for numeric targets", "bootstrap": "resamples of the intervals",
        "baseline": "the arm that differences are taken against", "thoughts": "the table of thoughts",
        "images": "the table of images",
    },
    "ThoughtEvaluation": {
        "tasks": "name -> folder or steps:NAME", "generated": "tasks with numeric answers that are really generated",
        "arms": "rows of the table", "text": "held-out rows whose gain is shown by entropy", "rows": "packed rows of `text`",
        "limit": "only the first items of every task", "temperature_split": "split that the arm temperature is fitted on",
    },
    "ImageEvaluation": {
        "count": "samples that are judged", "at": "steps at which the curve has a point",
        "at_count": "samples of such a point", "samplers": "name -> sampler; the first is the one of verdicts",
        "raw": "judge the last raw weights too", "judge": "the classifier that judges", "neighbours": "k of precision and recall",
        "subsets": "of the kernel distance", "subset_size": "of the kernel distance", "bootstrap": "resamples of the spread",
        "inception": "a TorchScript file with the Inception weights: adds a column that may be called FID",
    },
    "SamplerSettings": {
        "method": "euler, heun (ODE) or sde", "steps": "from noise to image", "guidance": "classifier-free; 1: none",
        "guidance_low": "smallest t with guidance", "guidance_high": "largest t with guidance",
        "last": "sde: t of the last, deterministic step", "batch": "images at once",
    },
    "JudgeSettings": {"width": "of the classifier", "seed": "of its weights", "train": "its training"},
    "TrackingSettings": {
        "enabled": "write to MLflow", "uri": "sqlite:///PATH or http(s)://...; not set: a SQLite file in the output folder",
        "experiment": "its name", "credentials": "a 0600 file with token, or username and password",
        "system_metrics": "log processor, memory and GPU",
    },
    "CheckpointSettings": {"every": "optimizer steps between checkpoints", "keep": "newest verified ones, at least 2"},
    "ResumeSettings": {
        "mode": "auto continues what is there, required stops if nothing is, never begins anew",
        "step": "continue from this checkpoint", "allow": "training settings that may differ from the saved ones",
    },
}  # fmt: skip


def explain(parser: Any, kind: Any) -> None:
    """Give every option of the parser that is a setting of the dataclass `kind` its sentence, and every section its heading."""
    for action in parser._actions:
        text = meaning_of(action.dest.split("."), kind)
        if text is not None:
            action.help = text
    for group in parser._action_groups:
        first = group._group_actions[0] if group._group_actions else None
        if first is None or meaning_of(first.dest.split("."), kind) is None:
            continue
        if "." in first.dest or dataclasses.is_dataclass(typing.get_type_hints(kind)[first.dest]):
            group.title = f"{first.dest}, {first.help}"
            first.help = "a YAML file with these settings"
        else:
            group.title = "the run"


def meaning_of(parts: list[str], kind: Any) -> str | None:
    """The sentence of a dotted setting; None if it is none."""
    hints = typing.get_type_hints(kind) if parts and isinstance(kind, type) else {}
    if not parts or parts[0] not in hints:
        return None
    if len(parts) == 1:
        return MEANING[kind.__name__][parts[0]]
    return meaning_of(parts[1:], hints[parts[0]])
