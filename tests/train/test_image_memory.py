"""What the dry run says of a step's memory is what torch's allocator is asked for when that step is taken."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from quietgoose.alignment.backbone import build_backbone
from quietgoose.alignment.model_settings import AlignSettings, BackboneSettings
from quietgoose.train.data.image_steps import AlignBatch
from quietgoose.train.image_memory import step_bytes
from quietgoose.train.jobs.urepa import TeacherShape, UrepaJob
from quietgoose.train.living_bytes import drop_gradients, peak_bytes
from quietgoose.train.recipe_images import UrepaSettings

from .allocator import allocator_peak

SHAPE, ROWS, CLASSES = (3, 16, 16), 12, 5
TEACHER = TeacherShape(24, (8, 8))
SMALL = BackboneSettings(preset="nano", patch=2)


def allocated(settings: UrepaSettings, teacher: TeacherShape | None) -> int:
    """The allocator's peak above where it stood, in a step with numbers; gradients of weights are let go at once."""
    job = UrepaJob(build_backbone(settings.backbone, SHAPE, CLASSES, 0), settings, 100, 0, teacher)
    drop_gradients(job)
    generator = torch.Generator().manual_seed(0)
    tokens = None if teacher is None or teacher.own else torch.randn(ROWS, 64, 24, generator=generator)
    images = torch.randn(ROWS, *SHAPE, generator=generator)
    batch = AlignBatch(images, torch.zeros(ROWS, dtype=torch.int64), torch.arange(ROWS), tokens)
    job.begin_step(0, torch.ones(len(job.names)))
    job(batch).total.backward()  # what is made once and kept (tables of positions) is there now
    return allocator_peak(lambda: job(batch).total.backward())


@pytest.mark.parametrize(
    ("changes", "teacher"),
    [({}, TEACHER), ({}, None), ({"dtype": "bfloat16"}, TEACHER), ({"checkpointing": True}, TEACHER),
     ({}, TeacherShape(64, (8, 8), own=True))],
)  # fmt: skip
def test_an_estimated_step_is_the_step_that_is_taken(changes: dict, teacher: TeacherShape | None) -> None:
    settings = UrepaSettings(
        backbone=SMALL, align=AlignSettings(), **{k: v for k, v in changes.items() if k == "dtype"}
    )
    settings.train = dataclasses.replace(settings.train, activation_checkpointing="checkpointing" in changes)
    told = step_bytes(settings, SHAPE, CLASSES, teacher, ROWS)
    assert told == pytest.approx(allocated(settings, teacher), rel=0.05)


def test_the_peak_counts_a_storage_once_and_forgets_what_is_freed() -> None:
    given = torch.zeros(1000)

    def step() -> None:
        first = given + 1  # 4,000 bytes
        view = first[::2].view(500)
        del first
        second = view * 2  # 2,000 more while the first lives on in its view
        del view, second
        _ = given * 3  # 4,000 again
        given.add_(1)

    assert peak_bytes(step, [given]) == 6000


def test_more_rows_and_larger_images_hold_more() -> None:
    settings, rows = UrepaSettings(backbone=SMALL), 400  # many, so that the size of the weights does not matter
    few = step_bytes(settings, SHAPE, CLASSES, TEACHER, rows)
    assert 1.9 < step_bytes(settings, SHAPE, CLASSES, TEACHER, 2 * rows) / few < 2.1
    assert 3.5 < step_bytes(settings, (3, 32, 32), CLASSES, TeacherShape(24, (16, 16)), rows) / few < 4.5
    checkpointed = dataclasses.replace(settings.train, activation_checkpointing=True)
    assert step_bytes(dataclasses.replace(settings, train=checkpointed), SHAPE, CLASSES, TEACHER, rows) < 0.6 * few
