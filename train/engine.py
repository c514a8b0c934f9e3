"""The only place that knows how DeepSpeed trains: builds it, takes one optimizer step, hands out full tensors.

The loss of a step is sum_e sum_E[e] / count_E[e] over all ranks and micro-batches, so its curve does not depend on
world size, accumulation or ZeRO stage. Per step there is ONE collective beside DeepSpeed's: a float64 vector (verdict.py)
with the loss sums, the squared gradient norm of every group, the caller's flags and the job's statistics. From it every
rank decides alike whether the step is finite, how each group is clipped (clipping is per group: N experts together equal
N separate runs), and whether somebody asked to stop. On a GPU the engine never waits for the device at ZeRO 0 to 2 without
offload; ZeRO-3, offload, DeepSpeed's `overlap_comm` among several processes (at every bucket) and rollouts of thoughts do.

Called by train/loop.py; checkpoints go through train/checkpoint.py and train/state.py.
"""

from __future__ import annotations

import logging
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
from ..base.errors import DataError
from . import faults, parallel, state
from . import strategy as strategies
from .groups import check_groups
from .recipe import OptimizerSettings
from .schedule import learning_rate
from .types import Batch, LossTerms, StepBatch, StepReport
from .verdict import Layout, Pending, Reading, blame, coefficients

COLLECTIVE_TIMEOUT = timedelta(minutes=30)


def initialize_distributed(timeout: timedelta = COLLECTIVE_TIMEOUT) -> World:
    """Join the process group of the launcher (deepspeed, torchrun, srun with RANK...), or form one of one process.

    Idempotent. `timeout` bounds every collective. DeepSpeed's shared-memory operation, which it would compile at
    the first start on a CPU and which only its inference uses, is left out.
    """
    if not torch.cuda.is_available():  # told, DeepSpeed does not look for itself and warn that it found nothing
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
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
    """Gives DeepSpeed a module that returns the one tensor to differentiate; `terms` keeps the rest."""

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
    `resting(step)` names the groups that a step must leave as they are, moments and all; `kept()` gives further fp32 tensors,
    alike on all ranks, that checkpoints hold; `own` (experts) says that this process trains parameters which no other does
    (parallel.py), `groups` being its own; `averaged()` gives the settings of a moving average and the names of the parameters
    it is of, and `take_average(read)`, called before a step, may read it by name.
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
        self.by_expert = bool(getattr(module, "own", None))
        self.shard = distributed.World(0, 1, self.world.local_rank) if self.by_expert else self.world
        self.optimizer_settings = optimizer
        self.total_steps = total_steps
        self.micro_count = micro_count
        self.parameters = check_groups(module, groups)
        self.group_names = tuple(str(group["name"]) for group in groups)
        self.shapes = {name: parameter.shape for name, parameter in self.parameters.items()}
        if self.by_expert:
            self.group_names, self.shapes = parallel.everywhere(self.names, self.group_names, self.parameters)
        self.applied = 0
        self.skipped = 0
        self.skipped_in_row = 0
        self.empty_in_row = 0
        self.forward_seconds = 0.0  # of the host, in the last step that was submitted
        self.fault = ""
        self.flags: tuple[float, ...] = ()
        self.config = strategies.merge(
            strategy,
            micro_rows=micro_rows,
            micro_count=micro_count,
            world_size=self.shard.size,
            trainable=sum(p.numel() for p in self.parameters.values()),
        )
        self.stage = int(self.config["zero_optimization"]["stage"])
        adamw = self._adamw(groups)
        self._root = _Root(module)
        self.deepspeed: Any = deepspeed.initialize(
            model=self._root,
            optimizer=adamw,
            config=dict(self.config),  # type: ignore[arg-type]
            mpu=parallel.Alone() if self.by_expert else None,
        )[0]
        self.adamw = adamw
        self.layout = Layout(self.names, self.group_names, self.extra_names)
        self._coefficients: Mapping[str, float | Tensor] = {}
        self._reported = 0.0
        self._resting: tuple[str, ...] = ()
        self._hidden: list[tuple[Tensor, Tensor | None]] = []
        self._bad = False
        self.average, self.averaged = state.start_average(self)
        if self.stage == 0 and self.shard.size == 1:
            self.deepspeed.enable_backward_allreduce = False  # it would copy all gradients into a bucket and back
        if self.stage > 0:
            zero = self.deepspeed.optimizer
            zero.check_grad_overflow = True
            zero.has_overflow = lambda partition_gradients=True: self._bad

    # ------------------------------------------------------------------ one step

    def step(self, batch: StepBatch, flags: Callable[[], Sequence[float]] = tuple) -> StepReport:
        """One optimizer step over `batch`. Collective. `flags()` (for example: this rank was asked to stop), asked for
        after the last backward, are summed over ranks into `self.flags`. A step with a non-finite loss or gradient, or without
        a label token on any rank, changes nothing and is counted.
        """
        return self.report(self.submit(batch, flags))

    def submit(self, batch: StepBatch, flags: Callable[[], Sequence[float]] = tuple) -> Pending:
        """The step, given to the device; `report` says how it went, at most `lag` steps later."""
        pending = Pending(batch, time.monotonic(), learning_rate(self.optimizer_settings, batch.step, self.total_steps))
        if len(batch.micro) != self.micro_count:
            raise DataError(
                f"step {batch.step}: {len(batch.micro)} micro-batches, the engine was built for {self.micro_count}",
                code="DATA-005",
            )
        if not bool((batch.count_E > 0).any()):
            return self._empty(pending, flags())
        if hasattr(self.job, "take_average"):
            self.job.take_average(self.read_average)  # type: ignore[operator]
        pending.local, vector = self._agree(*self._backward(batch), flags())
        limit = self.optimizer_settings.clip
        if self._device_decides:
            self.adamw.found_inf, self._coefficients = self.layout.on_device(vector, limit)  # type: ignore[attr-defined]
            pending.hold(vector)
        else:
            pending.hold(vector.cpu())
            reading = pending.read(self.layout)
            self._bad, self._coefficients = reading.bad, coefficients(reading.norms, limit)
        self._apply(pending.rate)
        return pending

    def report(self, pending: Pending) -> StepReport:
        """What a submitted step did; in the order of submission. Collective after a bad step."""
        now = time.monotonic
        if pending.empty:
            self.skipped += 1
            self.empty_in_row += 1
            self.fault = f"step {pending.step}: no row of any rank has a label token"
        else:
            self.empty_in_row = 0
        reading = pending.read(self.layout)
        self.flags = reading.flags
        if not pending.empty:
            self._count(pending, reading)
        since, self._reported = max(pending.started, self._reported), now()
        extra = self.job.summarise(reading.extra) if reading.extra else {}  # type: ignore[operator]
        return pending.report(self.main_terms, self._reported - since, extra)

    def _count(self, pending: Pending, reading: Reading) -> None:
        if not reading.bad:
            self.applied += 1
            self.skipped_in_row = 0
            self.fault = ""
            return
        self.skipped += 1
        self.skipped_in_row += 1
        assert pending.local is not None
        found = blame(self.layout, pending.local.cpu(), distributed.gather)
        parts = [f"rank {rank}: {', '.join(labels)}" for rank, labels in enumerate(found) if labels]
        self.fault = f"step {pending.step}: not finite: {'; '.join(parts) or 'only the sum over ranks'}"

    @property
    def _device_decides(self) -> bool:
        """Whether AdamW skips a bad step by a flag on the device, so that the host need not know."""
        return self.stage < 3 and not strategies.offloads(self.config["zero_optimization"])

    @property
    def lag(self) -> int:
        """How many submitted steps may wait for their report: 1 where the device works on while the host goes on, else 0."""
        return int(self._device_decides and self.device.type == "cuda")

    def _empty(self, pending: Pending, flags: Sequence[float]) -> Pending:
        """A step with nothing to learn: the counts alone tell every rank, only the flags are exchanged. Collective."""
        flags_F = torch.tensor(list(flags), dtype=torch.float64).to(self.device)
        pending.reading = Reading({}, {}, tuple(distributed.all_reduce_sum(flags_F).tolist()), {})
        pending.empty = True
        return pending

    def _backward(self, batch: StepBatch) -> tuple[Tensor, Tensor]:
        """Gradients of all micro-batches; returns this rank's loss sums, float64 [E], and statistics, float64 [X]."""
        weights_E = self._weights(batch.count_E)
        begin, resting = getattr(self.job, "begin_step", None), getattr(self.job, "resting", None)
        if begin is not None:
            begin(batch.step, weights_E)
        self._resting = () if resting is None else resting(batch.step)
        sums_E = torch.zeros(len(self.names), dtype=torch.float64, device=self.device)
        extra_X = torch.zeros(len(self.extra_names), dtype=torch.float64, device=self.device)
        last = len(batch.micro) - 1
        self.forward_seconds = 0.0
        for index, micro in enumerate(batch.micro):
            self.deepspeed.set_gradient_accumulation_boundary(index == last)
            began = time.perf_counter()
            output = faults.tensor("loss", batch.step, self.deepspeed(micro.to(self.device)))
            self.forward_seconds += time.perf_counter() - began
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
        weights_E = torch.where(count_E > 0, self.shard.size / count_E.clamp(min=1), torch.zeros(())).float()
        return weights_E.to(self.device, non_blocking=True)

    def _agree(self, sums_E: Tensor, extra_X: Tensor, flags: Sequence[float]) -> tuple[Tensor, Tensor]:
        """What the ranks must agree on, float64: this rank's share, and its sum over ranks. Collective."""
        flags_F = torch.tensor(list(flags), dtype=torch.float64).to(self.device, non_blocking=True)
        local = torch.cat([sums_E, self._squares(), flags_F, extra_X])
        return local, distributed.all_reduce_sum(local.clone())

    def _apply(self, rate: float) -> None:
        for group in self.adamw.param_groups:
            group["lr"] = rate * group["lr_scale"]
        if self._bad and self.stage == 0:  # plain AdamW underneath, which would let NaN into every trainable
            self.deepspeed.zero_grad()
            return
        self.deepspeed.step()
        if self.average is not None:
            self.average.update(self.adamw.found_inf if self._device_decides else float(self._bad))  # type: ignore[attr-defined]

    # ------------------------------------------------------------------ gradients

    def _squares(self) -> Tensor:
        """This rank's share of the squared gradient norm per group, float64 [G]; the sum over ranks is the whole."""
        norms = [torch.nn.utils.get_total_norm(parts) for parts in self._gradient_partitions()]
        own = {group["name"]: norm.to(self.device) for group, norm in zip(self.adamw.param_groups, norms)}
        none = torch.zeros((), device=self.device)
        squares_G = torch.stack([own.get(name, none).double().square() for name in self.group_names])
        return squares_G / self.shard.size if self.stage == 0 else squares_G

    def _gradient_partitions(self) -> list[list[Tensor]]:
        """Reduced gradients that this rank owns, by group: whole ones at ZeRO-0, flat partitions above."""
        if self.stage == 0:
            return [[p.grad for p in group["params"] if p.grad is not None] for group in self.adamw.param_groups]
        zero = self.deepspeed.optimizer
        offloaded = strategies.offloads(self.config["zero_optimization"])
        if self.stage < 3:
            if offloaded:
                zero._wait_for_offload_copies()
                return [[flat.grad] for flat in zero.single_partition_of_fp32_groups]
            return [list(zero.averaged_gradients[index]) for index in range(len(self.adamw.param_groups))]
        parts: list[list[Tensor]] = [[] for _ in self.group_names]
        for sub_group, flat in enumerate(zero.fp32_partitioned_groups_flat):
            owned = [flat.grad] if offloaded else zero.averaged_gradients[sub_group]
            parts[zero.sub_group_to_group_id[sub_group]] += owned
        return parts

    def _adamw(self, groups: Sequence[Mapping[str, Any]]) -> torch.optim.AdamW:
        settings = self.optimizer_settings
        adamw = torch.optim.AdamW(
            [
                {"name": str(group["name"]), "params": list(group["params"]), "lr_scale": group.get("lr_scale", 1.0)}
                for group in groups
            ],
            lr=settings.lr,
            betas=tuple(settings.betas),  # type: ignore[arg-type]
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            fused=True,  # on the CPU too, where offload updates: one reading of the state instead of ten
        )
        adamw.register_step_pre_hook(self._clip)
        adamw.register_step_post_hook(self._unhide)
        return adamw

    def _clip(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Scale the gradients AdamW is about to use, per group, and take away those of resting groups: AdamW leaves a tensor
        without a gradient alone. DeepSpeed calls AdamW group by group, with the flat partition that this rank owns; the
        coefficient is the same on all ranks."""
        for group in optimizer.param_groups:
            if group["name"] in self._resting:
                self._hidden += [(parameter, parameter.grad) for parameter in group["params"]]
                for parameter in group["params"]:
                    parameter.grad = None
                continue
            coefficient = self._coefficients.get(group["name"], 1.0)
            if isinstance(coefficient, Tensor) or coefficient < 1.0:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.grad.mul_(coefficient)

    def _unhide(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Put back what `_clip` took away: under offload it is a buffer that DeepSpeed goes on using."""
        for parameter, gradient in self._hidden:
            parameter.grad = gradient
        self._hidden.clear()

    # ------------------------------------------------------------------ tensors

    def trainable(self) -> dict[str, Tensor]:
        """Every trained parameter, whole, fp32, on the CPU, named as `module.named_parameters()` did, and moving averages as
        `average/NAME`. Collective."""
        trained = {name: state.full_parameter(self, name).cpu() for name in self.shapes}
        averages = {f"{state.AVERAGE}/{name}": self.read_average(name).cpu() for name in self.averaged}
        return trained | averages

    def read_average(self, name: str) -> Tensor:
        """The moving average of a parameter, whole, fp32. Collective: all ranks ask for the same names in the same order."""
        return state.full_average(self, name)

    def shape(self, name: str) -> torch.Size:
        return self.shapes[name]

    def destroy(self) -> None:
        """Remove DeepSpeed's hooks and buffers; the next engine of this process starts clean."""
        self.deepspeed.destroy()
        if self.by_expert:
            import deepspeed

            deepspeed.utils.groups.mpu = None
        self.adamw.zero_grad(set_to_none=True)
        del self.deepspeed
