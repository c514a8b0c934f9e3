"""The only place that knows how DeepSpeed trains: builds it, takes one optimizer step, hands out full tensors.

The loss of a step is sum_e sum_E[e] / count_E[e] over all ranks and micro-batches, so its curve does not depend on
world size, accumulation or ZeRO stage. Per step there is ONE collective and ONE wait for the device: a float64 vector
with the loss sums, the squared gradient norm of every group, the caller's flags and the job's statistics. From it every
rank decides alike whether the step is finite, how each group is clipped (clipping is per group: N experts together equal
N separate runs), and whether somebody asked to stop.

Called by train/loop.py; checkpoints go through train/checkpoint.py and train/state.py.
"""

from __future__ import annotations

import logging
import math
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..base import distributed
from ..base.distributed import World
from ..base.errors import DataError, RecipeError
from . import faults
from . import strategy as strategies
from .recipe import OptimizerSettings
from .schedule import learning_rate
from .types import Batch, LossTerms, StepBatch, StepReport

COLLECTIVE_TIMEOUT = timedelta(minutes=30)


def initialize_distributed(timeout: timedelta = COLLECTIVE_TIMEOUT) -> World:
    """Join the process group of the launcher (deepspeed, torchrun, srun with RANK...), or form one of one process.

    Idempotent. `timeout` bounds every collective. DeepSpeed's shared-memory operation, which it would compile at
    the first start on a CPU and which only its inference uses, is left out.
    """
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\..*")
    if not dist.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
            os.environ.setdefault("LOCAL_RANK", "0")
            dist.init_process_group(backend, timeout=timeout)
        else:
            os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
            dist.init_process_group(backend, timeout=timeout, store=dist.HashStore(), rank=0, world_size=1)
    if not torch.cuda.is_available():
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(timeout=timeout, auto_mpi_discovery=False, verbose=False)
    return distributed.world()


def shutdown() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


class _Root(nn.Module):
    """Gives DeepSpeed a module that returns a tensor: ZeRO-3 hooks do not look inside our LossTerms. `terms` keeps them."""

    def __init__(self, job: nn.Module) -> None:
        super().__init__()
        self.job = job
        self.terms: LossTerms | None = None

    def forward(self, batch: Batch) -> Tensor:
        """The differentiable part: the sums by term [E], or the total of a job that weighs its terms itself."""
        terms: LossTerms = self.job(batch)
        self.terms = terms
        return terms.sum_E if terms.total is None else terms.total


class Engine:
    """A job module under DeepSpeed.

    `groups`: `[{"name": ..., "params": [...]}]`, fp32, together exactly the parameters that need gradients; `"lr_scale"` in
    one multiplies its learning rate.
    `names`: the loss terms, in the order of `StepBatch.count_E`. `micro_count`: micro-batches per step on this rank.

    A job may have more than a forward: `begin_step(step, weights_E)` is told the weight of every term before the step's
    first forward; `extra_names` names the statistics in LossTerms.extra_X, whose sums over micro-batches and ranks
    `summarise(sums)` turns into StepReport.extra; `main_terms` are the terms whose mean is StepReport.loss (default: all);
    `kept()` gives further fp32 tensors, alike on all ranks, that checkpoints hold.
    """

    def __init__(
        self,
        module: nn.Module,
        groups: Sequence[Mapping[str, Any]],
        optimizer: OptimizerSettings,
        total_steps: int,
        micro_count: int,
        strategy: Mapping[str, Any],
        names: Sequence[str],
        device: torch.device | str,
        *,
        micro_rows: int = 1,
    ) -> None:
        import deepspeed

        initialize_distributed()
        self.world = distributed.world()
        self.device = torch.device(device)
        self.names = tuple(names)
        self.job = module
        self.extra_names: tuple[str, ...] = tuple(getattr(module, "extra_names", ()))
        self.main_terms: tuple[str, ...] = tuple(getattr(module, "main_terms", self.names))
        self.kept: dict[str, Tensor] = module.kept() if hasattr(module, "kept") else {}  # type: ignore[operator]
        self.group_names = tuple(str(group["name"]) for group in groups)
        self.optimizer_settings = optimizer
        self.total_steps = total_steps
        self.micro_count = micro_count
        self.parameters = _check_groups(module, groups)
        self.applied = 0
        self.skipped = 0
        self.skipped_in_row = 0
        self.fault = ""
        self.flags: tuple[float, ...] = ()
        self.config = strategies.merge(
            strategy,
            micro_rows=micro_rows,
            micro_count=micro_count,
            world_size=self.world.size,
            trainable=sum(p.numel() for p in self.parameters.values()),
        )
        self.stage = int(self.config["zero_optimization"]["stage"])
        adamw = self._adamw(groups)
        self._shapes = {name: parameter.shape for name, parameter in self.parameters.items()}
        self._root = _Root(module)
        self.deepspeed: Any = deepspeed.initialize(
            model=self._root,
            optimizer=adamw,
            config=dict(self.config),  # type: ignore[arg-type]
        )[0]
        self.adamw = adamw
        self._coefficients: dict[str, float] = {}
        self._bad = False
        if self.stage > 0:
            zero = self.deepspeed.optimizer
            zero.check_grad_overflow = True
            zero.has_overflow = lambda partition_gradients=True: self._bad

    # ------------------------------------------------------------------ one step

    def step(self, batch: StepBatch, flags: Callable[[], Sequence[float]] = tuple) -> StepReport:
        """One optimizer step over `batch`. Collective. `flags()` (for example: this rank was asked to stop), asked for
        after the last backward, are summed over ranks into `self.flags`. A step with a non-finite loss or gradient
        changes nothing and is counted.

        DataError DATA-004 if no rank has a label token.
        """
        started = time.monotonic()
        if len(batch.micro) != self.micro_count:
            raise DataError(
                f"step {batch.step}: {len(batch.micro)} micro-batches, the engine was built for {self.micro_count}",
                code="DATA-005",
            )
        if not bool((batch.count_E > 0).any()):
            raise DataError(
                f"step {batch.step}: no row of any rank has a label token; check loss_on and the data", code="DATA-004"
            )
        sums_E, extra_X = self._backward(batch)
        losses, norms, extra = self._agree(batch, sums_E, flags(), extra_X)
        rate = learning_rate(self.optimizer_settings, batch.step, self.total_steps)
        self._apply(rate, norms)
        finite = all(math.isfinite(value) for value in losses.values())
        return StepReport(
            step=batch.step,
            loss=sum(losses[name] for name in self.main_terms) / len(self.main_terms) if finite else math.nan,
            losses=losses,
            gradient_norms=norms,
            learning_rate=rate,
            tokens=batch.tokens,
            seconds=time.monotonic() - started,
            skipped=self._bad,
            extra=extra,
        )

    def _backward(self, batch: StepBatch) -> tuple[Tensor, Tensor]:
        """Gradients of all micro-batches; returns this rank's loss sums, float64 [E], and statistics, float64 [X]."""
        weights_E = self._weights(batch.count_E)
        begin = getattr(self.job, "begin_step", None)
        if begin is not None:
            begin(batch.step, weights_E)
        sums_E = torch.zeros(len(self.names), dtype=torch.float64, device=self.device)
        extra_X = torch.zeros(len(self.extra_names), dtype=torch.float64, device=self.device)
        last = len(batch.micro) - 1
        for index, micro in enumerate(batch.micro):
            self.deepspeed.set_gradient_accumulation_boundary(index == last)
            output = faults.tensor("loss", batch.step, self.deepspeed(micro.to(self.device)))
            terms = self._root.terms
            assert terms is not None
            own = terms.total is not None
            # count 0 means no label anywhere: 0 * 0, never 0 / 0. The sum makes a new tensor of a total, too: on the
            # forward's own output DeepSpeed's hooks would divide by the accumulation again (0.19.8)
            objective = (output.float() if own else output.float() * weights_E).sum()
            self.deepspeed.backward(objective, scale_wrt_gas=False)
            sums_E += (terms.sum_E + 0 * output.detach() if own else output).detach().double()  # NaN stays NaN
            if terms.extra_X is not None:
                extra_X += terms.extra_X
            self._root.terms = None
            faults.point("micro", batch.step)
        return sums_E, extra_X

    def _weights(self, count_E: Tensor) -> Tensor:
        """world / count per term, fp32 [E]: DeepSpeed averages gradients over ranks, the loss wants their sum."""
        weights_E = torch.where(count_E > 0, self.world.size / count_E.clamp(min=1), torch.zeros(())).float()
        return weights_E.to(self.device, non_blocking=True)

    def _agree(
        self, batch: StepBatch, sums_E: Tensor, flags: Sequence[float], extra_X: Tensor
    ) -> tuple[dict[str, float], dict[str, float], Mapping[str, float]]:
        """Losses, gradient norms and statistics over all ranks; sets the verdict, the clip coefficients and the flags."""
        squares_G = self._squares()
        flags_F = torch.tensor(list(flags), dtype=torch.float64).to(self.device, non_blocking=True)
        local = torch.cat([sums_E, squares_G, flags_F, extra_X])
        vector = distributed.all_reduce_sum(local.clone()).cpu()
        num_terms, num_groups = len(self.names), len(self.group_names)
        means_E = vector[:num_terms] / batch.count_E.clamp(min=1)
        norms_G = vector[num_terms : num_terms + num_groups].sqrt()
        end = len(vector) - len(extra_X)
        self.flags = tuple(vector[num_terms + num_groups : end].tolist())
        totals = dict(zip(self.extra_names, vector[end:].tolist()))
        extra = self.job.summarise(totals) if self.extra_names else totals  # type: ignore[operator]
        losses = dict(zip(self.names, means_E.tolist()))
        norms = dict(zip(self.group_names, norms_G.tolist()))
        self._bad = not all(math.isfinite(value) for value in (*losses.values(), *norms.values()))
        self.fault = self._blame(batch, local.cpu()) if self._bad else ""
        limit = self.optimizer_settings.clip
        self._coefficients = {
            name: min(1.0, limit / (norm + 1e-6)) if limit > 0 else 1.0 for name, norm in norms.items()
        }
        return losses, norms, extra

    def _blame(self, batch: StepBatch, local: Tensor) -> str:
        """Which rank holds which non-finite loss or gradient. Collective; only after a bad step."""
        labels = [f"loss of {n}" for n in self.names] + [f"gradient of {n}" for n in self.group_names]
        mine = [label for label, value in zip(labels, local.tolist()) if not math.isfinite(value)]
        found = distributed.gather(mine)
        # a bad loss makes gradients bad on all ranks: name the loss alone
        if any(label.startswith("loss") for labels in found for label in labels):
            found = [[label for label in labels if label.startswith("loss")] for labels in found]
        parts = [f"rank {rank}: {', '.join(labels)}" for rank, labels in enumerate(found) if labels]
        return f"step {batch.step}: not finite: {'; '.join(parts) or 'only the sum over ranks'}"

    def _apply(self, rate: float, norms: Mapping[str, float]) -> None:
        for group in self.adamw.param_groups:
            group["lr"] = rate * group["lr_scale"]
        if self._bad:
            self.skipped += 1
            self.skipped_in_row += 1
            if self.stage == 0:  # plain AdamW underneath, which would let NaN into every trainable
                self.deepspeed.zero_grad()
                return
        else:
            self.applied += 1
            self.skipped_in_row = 0
        self.deepspeed.step()

    # ------------------------------------------------------------------ gradients

    def _squares(self) -> Tensor:
        """This rank's share of the squared gradient norm per group, float64 [G]; the sum over ranks is the whole."""
        norms = [torch.nn.utils.get_total_norm(parts) for parts in self._gradient_partitions()]
        squares_G = torch.stack([norm.to(self.device).double().square() for norm in norms])
        return squares_G / self.world.size if self.stage == 0 else squares_G

    def _gradient_partitions(self) -> list[list[Tensor]]:
        """Reduced gradients that this rank owns, by group: whole ones at ZeRO-0, flat partitions above."""
        if self.stage == 0:
            return [[p.grad for p in group["params"] if p.grad is not None] for group in self.adamw.param_groups]
        zero = self.deepspeed.optimizer
        offloaded = self.config["zero_optimization"]["offload_optimizer"]["device"] != "none"
        if self.stage < 3:
            if offloaded:
                zero._wait_for_offload_copies()
                return [[flat.grad] for flat in zero.single_partition_of_fp32_groups]
            return [list(zero.averaged_gradients[index]) for index in range(len(self.group_names))]
        parts: list[list[Tensor]] = [[] for _ in self.group_names]
        for sub_group, flat in enumerate(zero.fp32_partitioned_groups_flat):
            owned = [flat.grad] if offloaded else zero.averaged_gradients[sub_group]
            parts[zero.sub_group_to_group_id[sub_group]] += owned
        return parts

    def _adamw(self, groups: Sequence[Mapping[str, Any]]) -> torch.optim.AdamW:
        settings = self.optimizer_settings
        zero = self.config["zero_optimization"]
        offloaded = zero.get("offload_optimizer", {}).get("device", "none") != "none"
        adamw = torch.optim.AdamW(
            [
                {"name": str(group["name"]), "params": list(group["params"]), "lr_scale": group.get("lr_scale", 1.0)}
                for group in groups
            ],
            lr=settings.lr,
            betas=tuple(settings.betas),  # type: ignore[arg-type]
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            fused=True if self.device.type == "cuda" and not offloaded else None,
        )
        adamw.register_step_pre_hook(self._clip)
        return adamw

    def _clip(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Scale the gradients AdamW is about to use, per group. DeepSpeed calls AdamW group by group, with the flat
        partition that this rank owns; the coefficient is the same on all ranks."""
        for group in optimizer.param_groups:
            coefficient = self._coefficients.get(group["name"], 1.0)
            if coefficient < 1.0:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.grad.mul_(coefficient)

    # ------------------------------------------------------------------ tensors

    def trainable(self) -> dict[str, Tensor]:
        """Every trained parameter, whole, fp32, on the CPU, named as `module.named_parameters()` did. Collective."""
        from .state import full_parameter

        return {name: full_parameter(self, name).cpu() for name in self.parameters}

    def shape(self, name: str) -> torch.Size:
        return self._shapes[name]

    def destroy(self) -> None:
        """Remove DeepSpeed's hooks and buffers; the next engine of this process starts clean."""
        self.deepspeed.destroy()
        self.adamw.zero_grad(set_to_none=True)
        del self.deepspeed


def _check_groups(module: nn.Module, groups: Sequence[Mapping[str, Any]]) -> dict[str, nn.Parameter]:
    """Name -> parameter for all grouped parameters; RecipeError CFG-030 if groups and trainables do not match or are
    not fp32 (rounding a gate to bf16 is a PHATGOOSE trap)."""
    grouped = [id(p) for group in groups for p in group["params"]]
    wanted = {id(p) for p in module.parameters() if p.requires_grad}
    named = {name: p for name, p in module.named_parameters() if id(p) in set(grouped)}
    problems = []
    if len(grouped) != len(set(grouped)):
        problems.append("a parameter is in two groups")
    if wanted != set(grouped):
        problems.append(f"{len(wanted)} parameters need gradients, {len(set(grouped))} are in groups")
    problems += [f"{name} is {p.dtype}, not float32" for name, p in named.items() if p.dtype != torch.float32]
    names = [str(group["name"]) for group in groups]
    if len(set(names)) != len(names):
        problems.append("two groups have one name")
    if problems:
        raise RecipeError(f"optimizer groups: {'; '.join(problems[:5])}", code="CFG-030")
    return named
