"""The `thoughts` stage: a model (plain, one expert, or routed) learns to think before each token.

Its result, read by `evaluate` and `export`:

    thoughts/    START, END, mixing head and the config they think by      (thought_model.py)
    adapter/     the LoRA on top, PEFT's format                            trainable: lora
    model/       the whole model, Hugging Face format                      trainable: full
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..base.errors import RecipeError
from ..base.seeding import derive
from ..routing.expert import ExpertCard
from ..routing.library import ExpertLibrary
from ..routing.model import detach
from ..routing.on_top import TopLora, as_expert
from ..routing.sites import AdapterLayout, all_sites, find_sites, target_names
from ..thoughts.anchors import term_counts
from ..thoughts.config import Curriculum
from ..thoughts.generation import check_model
from ..thoughts.parameters import ThoughtParameters
from ..thoughts.types import TERMS
from .base_models import LoadedBase
from .data.loader import Terms
from .jobs.thoughts import ThoughtJob, adapter_vector, model_tensors, thought_tensors
from .recipe import Recipe, ThoughtSettings
from .stages import (
    Context,
    Writer,
    base_settings,
    expert_settings,
    gate_settings,
    step_data,
    the_base,
    the_library,
)
from .thought_model import Thinking, attach_below, save_thinking
from .thought_settings import BASE, ROUTED, final_config, thought_plan, training_steps
from .types import Batch

ADAPTER = "thoughts"


def thought_settings(recipe: Recipe) -> Mapping[str, Any]:
    """Everything the result depends on: what is thought over, the rows, the stage's own settings."""
    over = recipe.thoughts.over
    below = (
        base_settings(recipe) if over == BASE else gate_settings(recipe) if over == ROUTED else expert_settings(recipe)
    )
    return json.loads(
        json.dumps(
            {
                "below": below, "router": recipe.router if over == ROUTED else None, "thoughts": recipe.thoughts,
                "data": recipe.data.thoughts, "sequence_length": recipe.data.sequence_length,
            },
            default=dataclasses.asdict,
        )
    )  # fmt: skip


def run_thoughts(context: Context) -> Writer:
    recipe, settings = context.recipe, context.recipe.thoughts
    base = the_base(context, "thoughts")
    check_model(base.model)
    put_below(context, base, "thoughts")
    plan = thought_plan(settings, banned_tokens(settings, base.tokenizer))
    steps = training_steps(settings, recipe.data.sequence_length)
    train = dataclasses.replace(settings.train, steps=steps)
    parameters = fresh_parameters(base, settings, plan, recipe.seed).to(context.device)
    top, card = None, None
    if settings.trainable == "lora":
        top, card = lora_on_top(base.model, settings)
    job = ThoughtJob(base.model, settings, plan, steps, parameters, top, recipe.seed)
    rows = dataclasses.replace(recipe.data, loss_on=settings.loss_on)
    terms = Terms(TERMS, lambda step, batch: counts(plan, steps, job.seed, step, batch))
    data = step_data(context, {"thoughts": recipe.data.thoughts}, base.tokenizer, rows, train, terms)
    trained = context.train("thoughts", job, data, train, base.sha256)

    def write(folder: Path) -> None:
        final = fresh_parameters(base, settings, plan, recipe.seed)
        if job.thinks:
            final.load_state_dict(thought_tensors(trained), strict=True)
        vector = adapter_vector(trained)
        adapter = None if vector is None or card is None or top is None else as_expert(card, top.layout, vector)
        thinking = Thinking(settings.over, final_config(plan), final, adapter, settings.trainable)
        save_thinking(thinking, folder, base.id)
        if settings.trainable == "full":
            _save_model(base, model_tensors(trained), folder / "model")

    return write


def counts(plan: Curriculum, steps: int, seed: int, step: int, batch: Batch) -> torch.Tensor:
    """Summands of every loss term over all rows of a step (thoughts/anchors.py): no model is asked."""
    return term_counts(plan.at(step, steps), batch, seed=seed, step=step, row_ids=batch.row_B)


def put_below(context: Context, base: LoadedBase, wanted_by: str) -> ExpertLibrary | None:
    """Bring the model into the state that thoughts lie over; the experts that are attached, if any."""
    over, router = context.recipe.thoughts.over, context.recipe.router
    if over == BASE:
        detach(base.model)
        return None
    library = the_library(context, base, wanted_by, gates=over == ROUTED)
    return attach_below(base.model, library, over, router.name, router.k, context.recipe.seed)


def lora_on_top(model: Any, settings: ThoughtSettings) -> tuple[TopLora, ExpertCard]:
    """Places for the LoRA and its card."""
    sites = find_sites(model, settings.targets)
    targets = target_names([site.name for site in sites], [site.name for site in all_sites(model)])
    card = ExpertCard(ADAPTER, settings.rank, settings.alpha, targets)
    return TopLora(model, AdapterLayout.uniform(sites, settings.rank), card.scale_at(sites[0].name)), card


def fresh_parameters(base: LoadedBase, settings: ThoughtSettings, plan: Curriculum, seed: int) -> ThoughtParameters:
    """START, END and head as they begin; the only place where they are initialised."""
    embedding = base.model.get_input_embeddings()
    device = next(base.model.parameters()).device
    ids = [first_token(base.tokenizer, text, name) for text, name in
           ((settings.start_like, "start_like"), (settings.end_like, "end_like"))]  # fmt: skip
    with torch.no_grad():
        start_D, end_D = embedding(torch.tensor(ids, device=device)).float().cpu()
    return ThoughtParameters(start_D, end_D, final_config(plan), derive(seed, "thoughts"))


def first_token(tokenizer: Any, text: str, name: str) -> int:
    """The first token of `text`. RecipeError CFG-112 if there is none."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise RecipeError(
            f"thoughts.{name}: {text!r} has no token in this base's vocabulary; give another text", code="CFG-112"
        )
    return int(ids[0])


def banned_tokens(settings: ThoughtSettings, tokenizer: Any) -> tuple[int, ...]:
    """Tokens that no thought may hold: end, begin and padding, unless the recipe wants them."""
    if not settings.ban_special:
        return ()
    found = (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id)
    return tuple(sorted({int(token) for token in found if token is not None}))


def _save_model(base: LoadedBase, trained: Mapping[str, torch.Tensor], folder: Path) -> None:
    model = base.model
    missing = set(dict(model.named_parameters())) - set(trained)
    if missing:
        raise RuntimeError(f"trained tensors lack {sorted(missing)[:5]}")
    for name, parameter in model.named_parameters():
        parameter.data = trained[name].clone()  # memory of its own: under ZeRO the weights are parts of one buffer
    model.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
