"""One run from recipe to export: the stages in order, each skipped if sealed, resumed if torn, under one run folder.

Started by launch/train.py under the DeepSpeed launcher, torchrun or plain python:
`deepspeed launch/train.py --config launch/recipes/nano_demo.yaml`
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from ..base import distributed
from ..base.distributed import World
from ..base.errors import ExitCode, StopRequested
from ..base.files import read_json, sha256_json, write_atomic
from ..evaluation.report import Trace, read_events, write_report
from ..evaluation.tables import arm_table, from_json, summary
from .agreement import check_agreement, own_facts
from .checkpoint import Checkpoints
from .compare import has_scores, read_comparison
from .compare_page import write_comparison_report
from .compare_report import score_table
from .compare_settings import arm_recipe, chosen_runs, run_names
from .console import open_log
from .data.image_steps import ImageSteps
from .data.loader import StepData
from .engine import Engine, initialize_distributed, shutdown
from .evaluate_stage import run_evaluate
from .facts import facts
from .image_checks import draws_images
from .image_report import write_report_of_images
from .image_results import NAME as IMAGE_RESULTS
from .image_results import SHORT, read_image_results
from .image_results import table as image_table
from .loop import train
from .recipe import Recipe, TrainSettings
from .run_folder import RunFolder, held
from .settings import recipe_to_yaml
from .sinks import Sinks
from .snapshots import Snapshots
from .stages import (
    Context,
    Stage,
    base_settings,
    evaluate_settings,
    expert_settings,
    export_settings,
    gate_settings,
    run_base,
    run_experts,
    run_export,
    run_gates,
)
from .stages_images import image_stages
from .stages_thoughts import run_thoughts, thought_settings
from .stop import Progress, StopControl, leave, run_guarded
from .strategy import load_strategy
from .unet_folder import STEPS

STAGES: Mapping[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage("base", base_settings, run_base),
        Stage("experts", expert_settings, run_experts),
        Stage("gates", gate_settings, run_gates),
        Stage("thoughts", thought_settings, run_thoughts),
        *image_stages(
            Stage("evaluate", evaluate_settings, run_evaluate),
            Stage("export", export_settings, run_export),
        ),
    )
}


def run(recipe: Recipe) -> int:
    """Run the recipe's stages on this rank; returns the exit code, which `outcome.json` repeats. Collective."""
    world = initialize_distributed()
    disable_progress_bar()  # transformers' bars: the console has its own
    code = int(ExitCode.FINISHED)
    for one in [arm_recipe(recipe, run) for run in chosen_runs(recipe)] or [recipe]:
        open_log(Path(one.output), world.rank)
        code = _run_guarded(one, world, arm=bool(recipe.compare.only))
        if code != ExitCode.FINISHED:
            break
    if code not in (ExitCode.FINISHED, ExitCode.STOPPED_SAVED, ExitCode.STOPPED_NOT_SAVED):
        leave(code)  # a rank that fails alone must not wait for the others in the libraries' clean-up
    shutdown()
    return code


def _run_guarded(recipe: Recipe, world: World, *, arm: bool) -> int:
    folder, progress = RunFolder(Path(recipe.output)), Progress()
    return run_guarded(folder.root, lambda: _run(recipe, folder, world, progress, arm=arm), progress)


def _run_within(recipe: Recipe, world: World, outer: StopControl) -> None:
    """A recipe as a part of another one: its outcome is written like any run's, its end is the outer run's too."""
    folder, progress = RunFolder(Path(recipe.output)), Progress()
    failed: list[BaseException] = []

    def main() -> None:
        try:
            _run(recipe, folder, world, progress, outer)
        except BaseException as error:
            failed.append(error)
            outer.progress.step = progress.step
            raise

    run_guarded(folder.root, main, progress)
    if failed:
        raise failed[0]


def _run(
    recipe: Recipe, folder: RunFolder, world: World, progress: Progress, outer: StopControl | None = None, *,
    arm: bool = False,
) -> None:  # fmt: skip
    """`arm`: a run of a comparison, of which nothing but its scores is wanted: its weights may have been deleted after them."""
    check_agreement(own_facts(recipe))
    with ExitStack() as stack:
        distributed.on_main(lambda: stack.enter_context(held(folder)))
        if world.is_main:
            write_atomic(folder.root / "recipe.yaml", recipe_to_yaml(recipe))
        stop = StopControl(folder.root, outer=outer, progress=progress).install()
        stack.callback(stop.close)
        sinks = stack.enter_context(Sinks(recipe, folder.root, world))
        device = torch.device("cuda", world.local_rank) if torch.cuda.is_available() else torch.device("cpu")
        context = Context(
            recipe=recipe,
            folder=folder,
            device=device,
            world=world,
            train=lambda *arguments: _train(recipe, folder, sinks, stop, device, *arguments),
            event=sinks.event,
            progress=sinks.progress,
            facts=facts(),
            run=lambda inner: _run_within(inner, world, stop),
        )
        if arm and distributed.on_main(lambda: has_scores(recipe)):
            sinks.event("arm_found", run=recipe.name)
        else:
            for name in recipe.stages:
                _stage(STAGES[name], context, sinks, stop)
        if world.is_main:
            show_results(recipe, folder, sinks)
            report = write_run_report(recipe, folder, context.facts)
            sinks.tracker.artifact(report)
            sinks.say(f"report: {report}")


def _stage(stage: Stage, context: Context, sinks: Sinks, stop: StopControl) -> None:
    """One stage, unless it is sealed. Rank 0 writes the result; its failure ends all ranks."""
    if distributed.any_rank(stop.requested()):
        raise StopRequested(f"{stop.reason()}: stopped before stage '{stage.name}', nothing is lost", saved=True)
    settings = stage.settings(context.recipe)
    if distributed.on_main(lambda: context.folder.finished(stage.name, settings)):
        sinks.event("stage_skipped", stage=stage.name, reason="finished before, files verified")
        return
    with sinks.stage(stage.name):
        writer = stage.run(context)

        def write() -> None:
            with context.folder.staging(stage.name) as staging:
                writer(staging)
            context.folder.seal(stage.name, settings)

        distributed.on_main(write)
        sinks.result(stage.name, context.folder.result(stage.name))


def _train(
    recipe: Recipe,
    folder: RunFolder,
    sinks: Sinks,
    stop: StopControl,
    device: torch.device,
    stage: str,
    job: Any,
    data: StepData | ImageSteps,
    settings: TrainSettings,
    base_sha256: str,
    steps: Sequence[int] = (),
) -> Mapping[str, torch.Tensor]:
    """One training loop with its checkpoints; the trained tensors, whole, on every rank. `steps`: where they are kept aside."""
    job.to(device)
    engine = Engine(
        job,
        job.parameter_groups(),
        settings.optimizer,
        settings.steps,
        data.micro_count,
        load_strategy(settings.strategy or recipe.strategy),
        data.names,
        device,
        micro_rows=data.share.rows,
    )
    checkpoints = Checkpoints(
        folder.checkpoints(stage),
        keep=recipe.checkpoint.keep,
        identity={
            "settings": sha256_json(STAGES[stage].settings(recipe)),
            "base": base_sha256,
            "data": data.hash(),
        },
        recipe_yaml=recipe_to_yaml(recipe),
        event=sinks.event,
    )
    with sinks.training(stage, settings.steps):
        train(
            engine,
            data,
            checkpoints,
            [sinks, Snapshots(engine, folder.stage(stage) / STEPS, steps)],
            stop,
            settings.steps,
            every=recipe.checkpoint.every,
            resume=recipe.resume,
        )
    trained = engine.trainable()
    engine.destroy()
    data.close()
    return trained


def show_results(recipe: Recipe, folder: RunFolder, sinks: Sinks) -> None:
    """The tables and the routing of the stages `evaluate` and `compare` on the console, if they ran."""
    if "compare" in recipe.stages:
        comparison = read_comparison(folder.result("compare"))
        sinks.table(f"{recipe.name}: {comparison['final']}", *score_table(comparison))
        sinks.say(f"{recipe.name}: {comparison['verdict']['result']}; {folder.result('compare') / 'compare.md'}")
    evaluated = folder.result("evaluate")
    if "evaluate" not in recipe.stages:
        return
    if (evaluated / "thoughts.json").is_file():
        results = from_json(read_json(evaluated / "thoughts.json"))
        sinks.table(f"{recipe.name}: thoughts, per cent right [95 % interval]", *arm_table(results))
        if (evaluated / "thoughts.html").is_file():  # a control without thoughts has none to show
            sinks.say(f"what was thought: {evaluated / 'thoughts.html'}")
    if (evaluated / f"{IMAGE_RESULTS}.json").is_file():
        sinks.table(f"{recipe.name}: samples", *image_table(read_image_results(evaluated), SHORT))
    if not (evaluated / "results.json").is_file():
        return
    header, rows = summary(from_json(read_json(evaluated / "results.json")))
    sinks.table(f"{recipe.name}: accuracy, per cent [95 % interval]", header, rows)
    routing = read_json(evaluated / "routing.json")
    if routing["decisive_right"] is not None:
        sinks.say(
            f"{recipe.router.name} sends {100 * routing['decisive_right']:.1f} % of {routing['decisive_tokens']} decisive "
            "tokens to the right expert"
        )


def write_run_report(recipe: Recipe, folder: RunFolder, known: Mapping[str, Any]) -> Path:
    """report.html from what the run left on disk."""
    evaluated = folder.result("evaluate")
    if "compare" in recipe.stages:
        runs = {run: Path(arm_recipe(recipe, run).output) for run in run_names(recipe)}
        comparison = read_comparison(folder.result("compare"))
        return write_comparison_report(folder.root, recipe.name, comparison, runs, comparison["facts"])
    if draws_images(recipe):
        return write_report_of_images(folder.root, evaluated, recipe.name, known)
    results = from_json(read_json(evaluated / "results.json")) if (evaluated / "results.json").is_file() else None
    traces = read_json(evaluated / "traces.json") if (evaluated / "traces.json").is_file() else []
    return write_report(
        folder.root / "report.html",
        recipe.name,
        results=results,
        traces=[Trace(**one) for one in traces],
        events=read_events(folder.root / "events.jsonl"),
        facts=known,
        highlight=recipe.router.name,
    )
