"""Training state as whole fp32 tensors, whatever the ZeRO stage and world size: parameter, exp_avg, exp_avg_sq, average.

AdamW's moments of one parameter are gathered from the flat partitions that DeepSpeed made, and put back into the
partitions of whatever stage and world size continues the run. So a checkpoint needs no pickle, no conversion, and
ZeRO-2 on 2 ranks resumes as ZeRO-3 on 1. Collective: all ranks call with the same names in the same order.

Limit: rank 0 holds one parameter at a time while gathering, but 12 bytes per trained parameter in CPU memory while
the file is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..alignment.ema import ShardedAverage
from ..base import distributed
from ..base.errors import ArtifactError

if TYPE_CHECKING:
    from .engine import Engine

MOMENTS = ("exp_avg", "exp_avg_sq")
KINDS = ("parameter", *MOMENTS)
KEPT = "kept"
"""Further tensors of a job (Engine.kept), not trained, the same on every rank."""
AVERAGE = "average"
"""The moving average of the parameters that Engine.averaged names (alignment/ema.py)."""


class Slice:
    """This rank's part of one flattened parameter: entries `start : start + numel` lie in `flat[offset : ...]`."""

    def __init__(self, start: int, offset: int, numel: int, flat: Tensor) -> None:
        self.start, self.offset, self.numel, self.flat = start, offset, numel, flat

    def view(self, whole_flat: Tensor) -> Tensor:
        """The same entries within another tensor laid out like `flat` (a moment)."""
        return whole_flat.narrow(0, self.offset, self.numel)


def slice_of(engine: Engine, parameter: nn.Parameter) -> Slice | None:
    """Where this rank keeps the fp32 master of `parameter`; None if it owns no entry of it."""
    zero = engine.deepspeed.optimizer
    if engine.stage == 0:
        return Slice(0, 0, parameter.numel(), parameter)
    if engine.stage < 3:
        group, begin = _place(zero, parameter)
        size = int(zero.partition_size[group])
        mine = engine.shard.rank * size
        start, end = max(begin, mine), min(begin + parameter.numel(), mine + size)
        flat = zero.single_partition_of_fp32_groups[group]
        return Slice(start - begin, start - mine, end - start, flat) if end > start else None
    sub_group, offset, padded = zero.grad_position[zero.get_param_id(parameter)]
    start = padded * zero._get_param_partition_rank(parameter)
    numel = max(0, min(padded, parameter.ds_numel - start))  # type: ignore[attr-defined]
    return Slice(start, offset, numel, zero.fp32_partitioned_groups_flat[sub_group]) if numel else None


def _place(zero: Any, parameter: nn.Parameter) -> tuple[int, int]:
    """Group of a parameter and where it begins in the group's flat tensor, ZeRO-1 and 2.

    Not `parameter._hp_mapping` (nor DeepSpeed's `safe_get_full_*`, which read it): with `round_robin_gradients` it
    takes the group's original order for the flat one and returns other parameters' numbers (0.19.8, measured).
    """
    for group, members in enumerate(zero.round_robin_bit16_groups):
        for member, offset in zip(members, zero.round_robin_bit16_offsets[group]):
            if member is parameter:
                return group, int(offset)
    raise KeyError("parameter is in no optimizer group")


def full_parameter(engine: Engine, name: str) -> Tensor:
    """The fp32 master of a parameter, whole, in its shape. Collective above ZeRO-0."""
    return _gather(engine, name, "parameter")


def start_average(engine: Engine) -> tuple[ShardedAverage | None, tuple[str, ...]]:
    """The moving average that the job asks for by `averaged()`, and the names of the parameters it is of."""
    if not hasattr(engine.job, "averaged"):
        return None, ()
    settings, names = engine.job.averaged()  # type: ignore[operator]
    pieces = [slice_of(engine, engine.parameters[name]) for name in names]
    return ShardedAverage(settings, [piece.flat for piece in pieces if piece is not None]), tuple(names)


def full_average(engine: Engine, name: str) -> Tensor:
    """The moving average of a parameter, whole, in its shape. Collective above ZeRO-0."""
    return _gather(engine, name, AVERAGE)


def kinds(engine: Engine, name: str) -> tuple[str, ...]:
    """What is kept of a parameter."""
    return (*KINDS, AVERAGE) if name in engine.averaged else KINDS


def gather(engine: Engine) -> dict[str, Tensor]:
    """`KIND/name` -> whole fp32 CPU tensor on rank 0, nothing elsewhere. Collective."""
    tensors: dict[str, Tensor] = {}
    if engine.world.is_main:
        tensors = {f"{KEPT}/{name}": tensor.detach().cpu().clone() for name, tensor in engine.kept.items()}
    for name in engine.shapes:
        for kind in kinds(engine, name):
            whole = _gather(engine, name, kind)
            if engine.world.is_main:
                tensors[f"{kind}/{name}"] = whole.cpu().clone()
    return tensors


def expected(engine: Engine) -> dict[str, torch.Size]:
    kept = {f"{KEPT}/{name}": tensor.shape for name, tensor in engine.kept.items()}
    return kept | {f"{kind}/{name}": engine.shape(name) for name in engine.shapes for kind in kinds(engine, name)}


def scatter(engine: Engine, tensors: Mapping[str, Tensor], applied: int) -> None:
    """Put whole tensors (the same on every rank) into this engine's partitions and weights. Collective.

    ArtifactError CKPT-004 unless names, shapes and dtypes are exactly this engine's.
    """
    _check(engine, tensors)
    for name, tensor in engine.kept.items():
        tensor.copy_(tensors[f"{KEPT}/{name}"])
    for name, parameter in engine.parameters.items():
        piece = slice_of(engine, parameter)
        if piece is None:
            continue
        _adam_state(engine, piece.flat, applied)
        for kind in kinds(engine, name):
            target = _flat(engine, piece.flat, kind).view(-1)
            source = tensors[f"{kind}/{name}"].reshape(-1).narrow(0, piece.start, piece.numel)
            piece.view(target.data).copy_(source)
    engine.applied = applied
    if engine.average is not None:
        engine.average.resume(applied)
    _refresh_weights(engine)


def _gather(engine: Engine, name: str, kind: str) -> Tensor:
    own = engine.parameters.get(name)
    piece = None if own is None else slice_of(engine, own)
    shape = engine.shape(name)
    if engine.stage == 0 and not engine.by_expert:
        assert piece is not None
        return _flat(engine, piece.flat, kind).float().reshape(shape)
    whole = torch.zeros(shape.numel(), dtype=torch.float32, device=engine.device)
    if piece is not None:
        whole.narrow(0, piece.start, piece.numel).copy_(piece.view(_flat(engine, piece.flat, kind).view(-1)))
    # every entry has one owner; adding integers' zeros keeps all bits, where adding floats would turn -0.0 into 0.0
    distributed.all_reduce_sum(whole.view(torch.int32))
    return whole.reshape(shape)


def _flat(engine: Engine, flat: Tensor, kind: str) -> Tensor:
    """The tensor of one kind that is laid out like the master `flat`."""
    if kind == "parameter":
        return flat.detach()
    if kind == AVERAGE:
        assert engine.average is not None
        return engine.average.of(flat)
    return _adam_state(engine, flat, 0)[kind]


def _adam_state(engine: Engine, flat: Tensor, applied: int) -> dict[str, Tensor]:
    """AdamW's state of one tensor it steps, made as AdamW would make it if there was no step yet."""
    state = engine.adamw.state[flat]
    if "exp_avg" not in state:
        fused = bool(engine.adamw.defaults.get("fused"))
        state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device if fused else "cpu")
        state["exp_avg"] = torch.zeros_like(flat, memory_format=torch.preserve_format)
        state["exp_avg_sq"] = torch.zeros_like(flat, memory_format=torch.preserve_format)
    if applied:
        state["step"].fill_(float(applied))
    return state


def _refresh_weights(engine: Engine) -> None:
    """Copy fp32 masters into the weights that `forward` reads."""
    zero = engine.deepspeed.optimizer
    if engine.stage in (1, 2):
        zero.update_lp_params()
    elif engine.stage == 3:
        zero._partition_all_parameters()
        for sub_group in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(sub_group)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)


def _check(engine: Engine, tensors: Mapping[str, Tensor]) -> None:
    wanted = expected(engine)
    problems = [f"{key} is missing" for key in wanted if key not in tensors]
    problems += [f"{key} is not part of this run" for key in tensors if key not in wanted]
    for key, shape in wanted.items():
        found = tensors.get(key)
        if found is None:
            continue
        if found.shape != shape or found.dtype != torch.float32:
            problems.append(f"{key} is {found.dtype} {tuple(found.shape)}, wanted float32 {tuple(shape)}")
        elif not bool(torch.isfinite(found).all()):
            problems.append(f"{key} holds NaN or infinity")
    if problems:
        raise ArtifactError(f"state of another model: {'; '.join(problems[:5])}", code="CKPT-004")
