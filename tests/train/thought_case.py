"""A tiny run of the `thoughts` stage for rank_worker.py: a model of random weights, its experts, packed random rows.

A case names: over (base, routed, expert:ant), trainable, thoughts (changes of the recipe's settings), dtype.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from quietgoose.base.files import sha256_tensors
from quietgoose.routing.expert import Expert, ExpertCard, SiteAdapter
from quietgoose.routing.library import ExpertLibrary
from quietgoose.routing.sites import all_sites
from quietgoose.thoughts.config import Curriculum
from quietgoose.thoughts.parameters import ThoughtParameters
from quietgoose.thoughts.types import TERMS
from quietgoose.train.data.loader import StepData, Terms
from quietgoose.train.data.packing import pack
from quietgoose.train.data.rows import RowReport
from quietgoose.train.data.tokens import TokenSet
from quietgoose.train.jobs.thoughts import ThoughtJob
from quietgoose.train.recipe import OptimizerSettings, ThoughtSettings, TrainSettings
from quietgoose.train.stages_thoughts import counts, lora_on_top
from quietgoose.train.thought_model import attach_below
from quietgoose.train.thought_settings import final_config, thought_plan
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY, WIDTH, LENGTH, ROWS, MICRO = 40, 32, 24, 8, 2
TOTAL_STEPS, SEED = 20, 3
OPTIMIZER = OptimizerSettings(lr=1e-2, clip=0.5, weight_decay=0.1, eps=1e-3)
SETTINGS: dict[str, Any] = {
    "tokens": 3, "lookahead": 2, "samples": 2, "head": "bounded", "rank": 2, "lr_meta": 3e-2, "lr_head": 1e-3,
    "chunk": 7,
}  # fmt: skip


def model_of(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2, attn_implementation="sdpa",
            )
        )  # fmt: skip
    return model.to(dtype).eval()


def library_of(model: Any) -> ExpertLibrary:
    """Two experts with gates, all random."""
    random = torch.Generator().manual_seed(5)
    experts = []
    for name in ("ant", "bee"):
        adapters, gates = {}, {}
        for site in all_sites(model):
            a_RI = torch.randn(2, site.in_features, generator=random) * 0.2
            adapters[site.name] = SiteAdapter(a_RI, torch.randn(site.out_features, 2, generator=random) * 0.2, 1.0)
            gates[site.name] = torch.randn(site.in_features, generator=random)
        experts.append(Expert(ExpertCard(name, 2, 2.0, ("all-linear",)), adapters, gates))
    return ExpertLibrary(experts)


def settings_of(case: dict) -> ThoughtSettings:
    train = TrainSettings(steps=TOTAL_STEPS, rows_per_expert=ROWS, micro_rows=MICRO, optimizer=OPTIMIZER)
    changes = {**SETTINGS, **case.get("thoughts", {})}
    return ThoughtSettings(
        over=case.get("over", "base"), trainable=case.get("trainable", "lora"), train=train, **changes
    )


def documents(seed: int = 0) -> TokenSet:
    """Sentences that repeat their first half, so that there is something to learn; two in three tokens are labels."""
    random = np.random.default_rng(seed)
    found = [np.tile(random.integers(3, VOCABULARY, n), 2) for n in random.integers(3, 10, 60)]
    ends = np.cumsum([len(one) for one in found])
    trained = (random.random(ends[-1]) < 0.67).astype(np.uint8)
    return TokenSet(np.concatenate(found).astype(np.int32), trained, ends, RowReport())


def build(case: dict, rank: int = 0, world: int = 1) -> tuple[ThoughtJob, StepData, Any]:
    """(job, data, hash of everything that must stay as it is)."""
    settings = settings_of(case)
    plan: Curriculum = thought_plan(settings, banned=(0, 1))
    model = model_of(getattr(torch, case.get("dtype", "float32")))
    if settings.over != "base":
        attach_below(model, library_of(model), settings.over, "phatgoose", 2)
    rows_VD = model.get_input_embeddings().weight.detach()
    parameters = ThoughtParameters(rows_VD[5].float(), rows_VD[6].float(), final_config(plan), SEED)
    top = lora_on_top(model, settings)[0] if settings.trainable == "lora" else None
    job = ThoughtJob(model, settings, plan, TOTAL_STEPS, parameters, top, SEED)
    terms = Terms(TERMS, lambda step, batch: counts(plan, TOTAL_STEPS, job.seed, step, batch))
    packed = pack("thoughts", documents(), LENGTH, 0, SEED)
    data = StepData([packed], ROWS, MICRO, SEED, rank, world, 0, terms)
    return job, data, lambda: frozen_hash(job)


def frozen_hash(job: ThoughtJob) -> str:
    """Hash of base, experts and gates: all tensors of the model but its trained ones."""
    model = job.policy.model
    tensors = {n: p for n, p in model.named_parameters() if not p.requires_grad}
    return sha256_tensors({**tensors, **dict(model.named_buffers())})


def with_control(case: dict, control: str) -> dict:
    return {**case, "thoughts": {**case.get("thoughts", {}), "control": control}}


def optimizer() -> OptimizerSettings:
    return dataclasses.replace(OPTIMIZER)
