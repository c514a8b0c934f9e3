"""The `urepa` job on one micro-batch: what the loss is made of, what is off is off, what the teacher never gets; compiled on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from quietgoose.alignment import losses, path, schedules
from quietgoose.alignment.backbone import build_backbone
from quietgoose.alignment.model_settings import AlignSettings, BackboneSettings
from quietgoose.base.errors import RecipeError
from quietgoose.train.data.image_steps import AlignBatch, image_share
from quietgoose.train.jobs.urepa import TeacherShape, UrepaJob
from quietgoose.train.recipe import TrainSettings
from quietgoose.train.recipe_images import UrepaSettings
from torch import Tensor

ROWS, DIM, GRID, STEPS = 4, 6, (8, 8), 10
TAUGHT = TeacherShape(DIM, GRID)
NANO = BackboneSettings(preset="nano", width=32, heads=2)


def job_of(device: str = "cpu", teacher: TeacherShape | None = TAUGHT, **changes: Any) -> UrepaJob:
    """A job moved off its zero initialisations."""
    own = {k: changes.pop(k) for k in ("label_drop", "dtype", "compile") if k in changes}
    train = TrainSettings(steps=STEPS, rows_per_expert=ROWS, micro_rows=ROWS)
    settings = UrepaSettings(backbone=NANO, align=AlignSettings(**{"hidden": 16, **changes}), train=train, **own)
    job = UrepaJob(build_backbone(NANO, (1, 8, 8), 5, 0), settings, STEPS, 0, teacher)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in job.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return job.to(device)


def batch_of(grid: tuple[int, int] = GRID) -> AlignBatch:
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(ROWS, 1, 8, 8, generator=generator)
    return AlignBatch(
        images, torch.arange(4), torch.arange(4) + 8, torch.randn(ROWS, grid[0] * grid[1], DIM, generator=generator)
    )


def run(job: UrepaJob, batch: AlignBatch, step: int = 0) -> Any:
    job.begin_step(step, torch.full((len(job.names),), 1.0 / ROWS, device=batch.labels_B.device))
    return job(batch)


def by_hand(job: UrepaJob, batch: AlignBatch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(t, velocity loss, cosines [B], intra losses [B]) with the rooms' functions alone."""
    t = path.times(job.seed, batch.place_B)
    noise = path.noise_like(job.seed, batch.place_B, batch.images_BCHW)
    labels = path.drop_labels(job.seed, batch.place_B, batch.labels_B, job.settings.label_drop, 5)
    v, tokens = job.backbone(path.interpolate(batch.images_BCHW, noise, t), t, labels, tap="middle.0")
    assert job.projector is not None
    assert batch.teacher_BND is not None
    student = job.projector(tokens, t)
    velocity = losses.velocity_sum(v, noise - batch.images_BCHW) / ROWS
    return t, velocity, losses.cosines(batch.teacher_BND, student), losses.intra(batch.teacher_BND, student)


@pytest.mark.parametrize("manifold", [0.0, 3.0])
@pytest.mark.parametrize("over_time", ["constant", "ends"])
def test_the_total_is_the_formula(manifold: float, over_time: str) -> None:
    """w = 0 removes the term exactly (`w or 3.0` would not)."""
    job, batch = job_of(manifold=manifold, over_time=over_time), batch_of()
    terms = run(job, batch)
    t, velocity, cosine, intra = by_hand(job, batch)
    factor = schedules.time_weight(job.align, t)
    want = velocity + 0.5 * (-(cosine * factor).mean() + manifold * (intra * factor).mean())
    assert float(terms.total.detach()) == pytest.approx(float(want), rel=1e-6)
    sums = [float(velocity) * ROWS, float(-cosine.sum()), float(intra.sum()) if manifold else 0.0]
    assert terms.sum_E.tolist() == pytest.approx(sums, rel=1e-5)
    assert (float(factor.min()) < 1) == (over_time == "ends")


def test_the_manifold_loss_alone() -> None:
    job, batch = job_of(token=0.0, manifold=2.0), batch_of()
    _, velocity, _, intra = by_hand(job, batch)
    assert float(run(job, batch).total.detach()) == pytest.approx(float(velocity + 0.5 * 2.0 * intra.mean()), rel=1e-6)


def test_dropped_labels_are_the_null_class_of_these_classes() -> None:
    """With every label dropped the loss does not know the labels; a null class of 1000 would not exist here."""
    job, batch = job_of(label_drop=1.0), batch_of()
    other = AlignBatch(batch.images_BCHW, batch.labels_B.flip(0), batch.place_B, batch.teacher_BND)
    assert torch.equal(run(job, batch).total, run(job, other).total)
    keeps = job_of(label_drop=0.0)
    assert not torch.equal(run(keeps, batch).total, run(keeps, other).total)


def test_no_gradient_reaches_the_teacher() -> None:
    job, batch = job_of(scope="both"), batch_of()
    assert batch.teacher_BND is not None
    batch.teacher_BND.requires_grad_()
    run(job, batch).total.backward()
    assert batch.teacher_BND.grad is None
    assert all(p.grad is not None for p in job.parameters())


def test_grids_meet_on_the_teacher_s_or_on_the_student_s() -> None:
    """The student's 4x4 grows to the teacher's grid by default; only `match: teacher` shrinks the teacher, by averages of all its
    tokens (bilinear would read four of sixteen)."""
    fine = TeacherShape(DIM, (16, 16))
    grown, shrunk = job_of(teacher=fine), job_of(teacher=fine, match="teacher")
    assert (grown.target, shrunk.target) == ((16, 16), (4, 4))
    batch = batch_of((16, 16))
    assert batch.teacher_BND is not None
    small = batch.teacher_BND.reshape(ROWS, 4, 4, 4, 4, DIM).mean((2, 4)).reshape(ROWS, 16, DIM)
    student = torch.randn(ROWS, 16, DIM)
    cosine, _ = shrunk.compare(batch.teacher_BND, student)
    assert torch.allclose(cosine, losses.cosines(small, student), atol=1e-6)
    assert run(grown, batch).sum_E[1] != run(shrunk, batch).sum_E[1]
    assert grown.describe()["compared_on"] == (16, 16)


def test_a_shallow_tap_meets_the_teacher_s_grid_without_resizing() -> None:
    job = job_of(tap="1")
    assert job.tap == "encoder.0"
    assert job.projector is not None
    assert (job.projector.grid, job.projector.target) == ((8, 8), (8, 8))


def test_the_average_teaches_at_lower_noise() -> None:
    """SRA: tokens of the average's own late block; copied weights, no gradient, no parameter of the job."""
    job, batch = job_of(teacher=TeacherShape(32, (8, 8), own=True)), batch_of()
    batch = AlignBatch(batch.images_BCHW, batch.labels_B, batch.place_B)
    names = [name for name, _ in job.named_parameters()]
    assert all(name.startswith(("backbone.", "projector.")) for name in names)
    own = job._own_teacher[0]
    read: list[str] = []

    def average(name: str) -> Tensor:
        read.append(name)
        return dict(job.named_parameters())[name] * 0.5

    job.take_average(average)
    assert read == [name for name in names if name.startswith("backbone.")]
    assert torch.equal(own.patches.weight, job.backbone.patches.weight * 0.5)
    run(job, batch).total.backward()
    assert all(p.grad is None and not p.requires_grad for p in own.parameters())
    same = job_of(teacher=TeacherShape(32, (8, 8), own=True), noise_gap=0.0)
    assert not torch.equal(run(same, batch).sum_E[1], run(job, batch).sum_E[1])


@pytest.mark.parametrize(
    ("batch", "micro", "world", "want"), [(8, 8, 1, (1, 8)), (8, 3, 1, (4, 2)), (12, 4, 2, (2, 3)), (7, 4, 1, (7, 1))]
)
def test_micro_batches_are_equal(batch: int, micro: int, world: int, want: tuple[int, int]) -> None:
    share = image_share(batch, micro, world)
    assert (share.micros, share.rows) == want
    assert share.rows <= micro


def test_images_that_do_not_divide_by_the_processes() -> None:
    with pytest.raises(RecipeError, match=r"QG-CFG-091.*multiple of 3"):
        image_share(8, 8, 3)


def test_a_step_is_one_graph() -> None:
    """Whatever the options: a break would halve what compiling gains (fullgraph refuses one)."""
    options = {"scope": "both", "normalise_space": True, "time_aware": True, "over_time": "ends", "order": "inside"}
    job, batch = job_of(dtype="bfloat16", **options), batch_of()
    want = run(job, batch)
    torch.compiler.reset()
    job._terms = torch.compile(job._compute, fullgraph=True, dynamic=False, backend="eager")
    got = run(job, batch)
    torch.compiler.reset()
    assert torch.allclose(got.sum_E, want.sum_E, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("scope", ["intra", "both"])
def test_compiled_bf16_on_a_gpu_follows_fp32(scope: str) -> None:
    """Same loss within bf16's rounding, gradients too; one graph for the steps with alignment, one for those without."""
    batch = batch_of().to("cuda")
    exact = job_of("cuda", scope=scope, stop=0.5)
    quick = job_of("cuda", scope=scope, stop=0.5, dtype="bfloat16", compile=True)
    for step in (0, 1, 7):
        results = []
        for job in (exact, quick):
            job.zero_grad()
            terms = run(job, batch, step)
            terms.total.backward()
            gradients = {n: p.grad for n, p in job.named_parameters() if p.grad is not None}
            results.append((float(terms.total), gradients))
        (want, want_gradients), (got, got_gradients) = results
        assert got == pytest.approx(want, rel=2e-2)
        assert set(got_gradients) == set(want_gradients)
        assert any(name.startswith("projector") for name in got_gradients) == (step < 5)
        whole = [torch.cat([g.flatten() for g in found.values()]) for found in (got_gradients, want_gradients)]
        assert float((whole[0] - whole[1]).norm() / whole[1].norm()) < 5e-2
