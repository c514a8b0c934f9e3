"""The `urepa` stage: a U-Net learns the velocity, its middle tokens are drawn to a frozen teacher's (u-repa.md 1.2 to 1.4).

    L = L_vel + lambda (token L_tok + w L_ml),   lambda = lambda(step) lambda(t)

The teacher's tokens of the clean images come with the batch: the teacher is no part of the engine. With teacher kind `ema` (SRA)
the teacher is the backbone's own average at lower noise, copied from the engine before every step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...alignment import losses, path, schedules
from ...alignment.model_settings import AlignSettings, AverageSettings
from ...alignment.projector import Projector, resize
from ...alignment.taps import describe_tap, resolve_tap
from ...base import distributed
from ...base.errors import RecipeError
from ...base.seeding import derive
from ..data.image_steps import AlignBatch
from ..recipe_images import UrepaSettings
from ..types import LossTerms

BACKBONE, PROJECTOR = "backbone", "projector"


@dataclass(frozen=True)
class TeacherShape:
    """Width and grid of the teacher's tokens; `own`: they are made here, by the average."""

    dim: int
    grid: tuple[int, int]
    own: bool = False


class UrepaJob(nn.Module):
    """`teacher` None: plain training of the same U-Net. RecipeError CFG-121 for a tap that is not there, CFG-122 for settings that
    contradict each other."""

    main_terms = ("velocity",)
    extra_names = ("token_cosine", "total", "lambda")

    def __init__(
        self, backbone: Any, settings: UrepaSettings, steps: int, seed: int, teacher: TeacherShape | None = None
    ) -> None:
        super().__init__()
        align = settings.align
        self.settings, self.align, self.steps, self.seed = settings, align, steps, derive(seed, "urepa")
        self.backbone = backbone
        backbone.activation_checkpointing = settings.train.activation_checkpointing
        self.names = ("velocity",) if teacher is None else ("velocity", "token", "manifold")
        self.teacher = teacher
        self.tap: str | None = None
        self.projector: Projector | None = None
        self._own_teacher: list[Any] = []
        if teacher is not None:
            self.tap = resolve_tap(backbone, align.tap)
            width, grid = backbone.tap_shape(self.tap)
            self.target = teacher.grid if align.match == "student" else grid
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(derive(seed, PROJECTOR))
                self.projector = Projector(align, width, grid, teacher.dim, self.target)
            if teacher.own:
                self.teacher_tap = resolve_tap(backbone, align.teacher_tap, "urepa.align.teacher_tap")
                # in a list, so that it is no part of this module: no optimizer, no ZeRO
                self._own_teacher.append(copy.deepcopy(backbone).requires_grad_(False).eval())
        self._terms: Callable[..., tuple[Tensor, Tensor, Tensor]] = self._compute
        if settings.compile:
            torch.compiler.reset()  # a comparison makes many jobs, and one function keeps few compiled versions
            self._terms = torch.compile(self._compute, dynamic=False)
        self._lambda = 0.0
        self._weights_E: Tensor = torch.ones(len(self.names))

    def describe(self) -> Mapping[str, Any]:
        """What the run shows at its start: which block is read, both grids."""
        if self.teacher is None or self.tap is None:
            return {"alignment": "none"}
        grid = self.backbone.tap_shape(self.tap)[1]
        tapped = describe_tap(self.backbone, self.tap)
        return {"tap": tapped, "student_grid": grid, "teacher_grid": self.teacher.grid, "compared_on": self.target}

    # ------------------------------------------------------------------ what the engine asks

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Backbone and projector, clipped each by its own norm, so that the projector cannot slow the backbone down."""
        groups: list[dict[str, Any]] = [{"name": BACKBONE, "params": list(self.backbone.parameters())}]
        if self.projector is not None:
            groups.append({"name": PROJECTOR, "params": list(self.projector.parameters())})
        return groups

    def averaged(self) -> tuple[AverageSettings, Iterable[str]]:
        """The moving average covers the backbone only."""
        return self.settings.average, [f"{BACKBONE}.{name}" for name, _ in self.backbone.named_parameters()]

    @torch.no_grad()
    def take_average(self, read: Callable[[str], Tensor]) -> None:
        """Copy the average into the teacher that is one."""
        device = next(self.backbone.parameters()).device
        for own in self._own_teacher:
            if next(own.parameters()).device != device:  # it is no part of this module, so `to` did not move it
                own.to(device)
            for name, parameter in own.named_parameters():
                parameter.copy_(read(f"{BACKBONE}.{name}"))

    def begin_step(self, step: int, weights_E: Tensor) -> None:
        self._lambda = self.weight_at(step)
        self._weights_E = weights_E

    def weight_at(self, step: int) -> float:
        """lambda of a step; 0: nobody teaches."""
        return 0.0 if self.teacher is None else schedules.step_weight(self.align, step, self.steps)

    def resting(self, step: int) -> tuple[str, ...]:
        """The projector, once the alignment has ended."""
        return (PROJECTOR,) if self.projector is not None and self.weight_at(step) == 0 else ()

    def summarise(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Of the step that `sums` are of, which need not be the last one begun."""
        images = self.settings.train.rows_per_expert
        shown = {"total": sums["total"] / distributed.world().size, "lambda": sums["lambda"] / images}
        if shown["lambda"] > 0:
            shown["token_cosine"] = sums["token_cosine"] / images
        return shown

    # ------------------------------------------------------------------ one micro-batch

    def forward(self, batch: AlignBatch) -> LossTerms:
        """Sums over the images of the micro-batch, fp32: velocity, and if there is a teacher token and manifold loss."""
        aligned = self._lambda > 0
        weight = self._weights_E.new_full((), self._lambda)
        teacher = batch.teacher_BND if aligned else None
        sum_E, cosine, total = self._terms(
            batch.images_BCHW, batch.labels_B, batch.place_B, teacher, self._weights_E, weight, aligned
        )
        extra_X = torch.stack([cosine.detach(), total.detach(), len(batch.labels_B) * weight]).double()
        return LossTerms(sum_E.detach(), total, extra_X)

    def _compute(
        self, x_BCHW: Tensor, labels_B: Tensor, place_B: Tensor, teacher_BND: Tensor | None, weights_E: Tensor,
        weight: Tensor, aligned: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """(loss sums [E], sum of cosines, weighted total)."""
        t_B = path.times(self.seed, place_B)
        noise_BCHW = path.noise_like(self.seed, place_B, x_BCHW)
        labels_B = path.drop_labels(self.seed, place_B, labels_B, self.settings.label_drop, self.backbone.num_classes)
        x_t = path.interpolate(x_BCHW, noise_BCHW, t_B)
        tap = self.tap if aligned else None
        with self._autocast(x_BCHW.device.type):
            made = self.backbone(x_t, t_B, labels_B, tap=tap)
            v_BCHW, tokens_BND = (made, None) if tap is None else made
            student_BND = self.projector(tokens_BND, t_B) if self.projector is not None and tap else None
        velocity = losses.velocity_sum(v_BCHW, path.velocity(x_BCHW, noise_BCHW))
        total = weights_E[0] * velocity
        zero = torch.zeros_like(velocity.detach())
        if student_BND is None:
            return torch.stack([velocity, *([zero] * (len(self.names) - 1))]), zero, total
        if teacher_BND is None:
            teacher_BND = self._own_tokens(x_BCHW, noise_BCHW, t_B, place_B, labels_B)
        cosine_B, manifold_B = self.compare(teacher_BND, student_BND)
        factor_B = schedules.time_weight(self.align, t_B)
        token = self.align.token * weights_E[1] * (-cosine_B * factor_B).sum()
        manifold = zero if manifold_B is None else manifold_B.sum()
        total = total + weight * token
        if manifold_B is not None:
            total = total + weight * self.align.manifold * weights_E[2] * (manifold_B * factor_B).sum()
        return torch.stack([velocity, -cosine_B.sum(), manifold]), cosine_B.sum(), total

    def compare(self, teacher_BND: Tensor, student_BND: Tensor) -> tuple[Tensor, Tensor | None]:
        """(token cosines [B], manifold loss [B] or None if w is 0), fp32, on one grid."""
        assert self.teacher is not None
        teacher_BND = teacher_BND.detach().float()
        grown = all(new >= old for new, old in zip(self.target, self.teacher.grid))
        teacher_BND = resize(teacher_BND, self.teacher.grid, self.target, "bilinear" if grown else "area")
        if self.align.normalise_space:
            teacher_BND = losses.normalise_space(teacher_BND)
        cosine_B = losses.cosines(teacher_BND, student_BND)
        if self.align.manifold == 0:
            return cosine_B, None
        parts = {"intra": losses.intra, "inter": losses.inter}
        scopes = ("intra", "inter") if self.align.scope == "both" else (self.align.scope,)
        manifold_B = torch.stack([parts[scope](teacher_BND, student_BND) for scope in scopes]).mean(0)
        return cosine_B, manifold_B

    @torch.no_grad()
    def _own_tokens(self, x_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor, place_B: Tensor, labels_B: Tensor) -> Tensor:
        before_B = path.earlier(self.seed, place_B, t_B, self.align.noise_gap)
        x_t = path.interpolate(x_BCHW, noise_BCHW, before_B)
        with self._autocast(x_BCHW.device.type):
            return self._own_teacher[0](x_t, before_B, labels_B, tap=self.teacher_tap)[1]

    def _autocast(self, device: str) -> torch.autocast:
        # no cache: every weight is used once, and under ZeRO-3 it is another tensor the next time
        wanted = self.settings.dtype == "bfloat16"
        return torch.autocast(device, dtype=torch.bfloat16, enabled=wanted, cache_enabled=False)


def check_job(align: AlignSettings, compiled: bool, zero_stage: int, micros: int) -> None:
    """RecipeError CFG-122 if settings of the training contradict each other."""
    if compiled and zero_stage == 3:
        raise RecipeError(
            "urepa.compile: ZeRO-3 takes weights apart between the blocks, which a compiled step cannot follow; choose a strategy "
            "of ZeRO 0 to 2 (urepa.train.strategy: zero2), or set urepa.compile: false",
            code="CFG-122",
        )
    if align.scope != "intra" and align.manifold != 0 and micros > 1 and not align.inter_over_micro:
        raise RecipeError(
            f"urepa.align.scope: {align.scope} compares all images of a step, which here come in {micros} micro-batches; raise "
            "urepa.train.micro_rows, choose intra, or set urepa.align.inter_over_micro: true to compare within a micro-batch",
            code="CFG-122",
        )
