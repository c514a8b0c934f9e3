"""The 16-bit tail of one layer: sinks in the first slots, then a window of the most recent columns, and their saliency.

Slot s < sinks holds a row's s-th valid token once that token has left the window (valid = 0 until then: rows that begin
with padding fill their sinks later). Slot sinks + j is column base + j for all rows. Beyond `used` every slot's valid
flag is 1, so that a step without padding writes keys and values only. The window's length lives on the device (kernels
read it, graphs replay it) and is mirrored on the host (it is the same for all rows).

Evidence of a slot: `total` attention from `count` probe rows. Decoded tokens are all probes; what is here counts only the
rows before `decode_from`, the others follow from the slots themselves when the window is flushed. Caller: cache/state.py.

The buffers tell apart the queries of the last call of attention only. Where one forward takes several calls, the buffers
as they were before each later one are kept (`Call`) until the next forward or flush, so that `drop` can go back to them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.cached_attention import MAX_QUERY, SaliencyBuffers, Tail
from ..kernels.quantize.layout import zeros_together
from .policy import Policy
from .store import Shape


@dataclass
class Call:
    """A later call of a forward that takes several: its queries that are still there, the buffers before it."""

    queries: int
    before: SaliencyBuffers


class TailWindow:
    """Tail, saliency buffers (None where the policy needs none) and the host mirror of the length."""

    def __init__(self, policy: Policy, shape: Shape, batch: int, device: torch.device) -> None:
        self.policy, self.shape = policy, shape
        self.sinks = self.used = self.decode_from = policy.sink_tokens
        self.evident = False  # does any evidence exist?
        self.blank = True  # neither columns nor evidence, on the device too (sinks apart)
        width, heads = policy.tail_slots, shape.kv_heads
        tokens = ((batch, heads, width, shape.head_dim), shape.dtype)
        sums = [((batch, heads, width), torch.float32), ((batch, heads, MAX_QUERY, width), torch.float32)]
        sums += [((1,), torch.int32), ((batch, width), torch.float32)]
        key, value, *made = zeros_together([tokens, tokens, *(sums if policy.uses_attention else ())], device)
        self.tail = Tail(
            key=key,
            value=value,
            valid=torch.ones(batch, width, dtype=torch.uint8, device=device),
            length=torch.full((1,), self.sinks, dtype=torch.int32, device=device),
        )
        if self.sinks:
            self.tail.valid[:, : self.sinks] = 0
        self.calls: list[Call] = []  # of the last forward, without its first; at most three (cache/hf_layer.py)
        self.unseen = 0  # last columns that were written, and whose own queries no call of attention has had
        self.buffers = SaliencyBuffers(*made[:3]) if made else None
        self.count: Tensor | None = made[3] if made else None

    def clear(self) -> None:
        """No tokens, no evidence."""
        self.evident = False
        if self.sinks:
            self.tail.valid[:, : self.sinks] = 0
        self.empty()

    def empty(self) -> None:
        """No columns in the window and no evidence; sinks stay. Nothing to do where it is so already."""
        self.decode_from = self.sinks
        if self.blank:
            return
        self.set_used(self.sinks)
        self.tail.valid[:, self.sinks :] = 1
        self._forget()
        self.blank = True

    def _forget(self) -> None:
        """No evidence, on the device."""
        self.calls, self.unseen = [], 0
        if self.buffers is not None and self.count is not None:
            torch._foreach_zero_([self.buffers.total, self.buffers.pending, self.count])
            self.buffers.accepted.zero_()

    @property
    def columns(self) -> int:
        """Columns in the window."""
        return self.used - self.sinks

    @property
    def window(self) -> slice:
        return slice(self.sinks, self.used)

    def set_used(self, used: int) -> None:
        self.used, self.blank = used, False
        self.tail.length.fill_(used)

    # tokens ----------------------------------------------------------------------------------------------------

    def write(self, key: Tensor, value: Tensor, valid: Tensor | None) -> None:
        """Device work of an append: q tokens [B,Hk,q,D] at the device's length, which grows. Capturable."""
        self.blank = False
        queries = key.shape[2]
        if queries == 1 and key.is_cuda and valid is None:
            from .decode_append import write_last

            self.tail.length.add_(1)
            write_last(key, value, self.tail.key, self.tail.value, self.tail.length)
            return
        slots = self.tail.length.long() + torch.arange(queries, device=key.device)
        self.tail.key.index_copy_(2, slots, key)
        self.tail.value.index_copy_(2, slots, value)
        if valid is not None:
            self.tail.valid.index_copy_(1, slots, valid.to(torch.uint8))
        self.tail.length.add_(queries)

    def begin_call(self, queries: int, follows: bool) -> None:
        """Before attention of `queries` queries; `follows`: the call before belongs to the same forward."""
        self.unseen = 0
        if not follows or self.buffers is None:
            self.calls = []
        else:
            self.calls.append(Call(queries, copied(self.buffers)))

    def drop(self, columns: int, rejected: int) -> None:
        """Forget the last `columns` of the window; the queries of the last `rejected` columns no longer count as probes."""
        without = min(self.unseen, rejected)
        self.unseen, rejected = self.unseen - without, rejected - without
        self.set_used(self.used - columns)
        self.decode_from = min(self.decode_from, self.used)
        self.tail.valid[:, self.used :] = 1
        if self.buffers is not None and self.count is not None:
            while self.calls and rejected >= self.calls[-1].queries:
                call = self.calls.pop()
                put_back(self.buffers, call.before)
                rejected -= call.queries
            if self.calls:
                self.calls[-1].queries -= rejected
            self.buffers.accepted.sub_(rejected).clamp_(min=0)
            self.buffers.total[:, :, self.used :] = 0
            self.count[:, self.used :] = 0

    def keep_last(self, columns: int) -> None:
        """A flush: the last `columns` of the window become its first, with the evidence that they have."""
        source = slice(self.used - columns, self.used)
        key, value = self.tail.key[:, :, source].clone(), self.tail.value[:, :, source].clone()
        valid = self.tail.valid[:, source].bool()
        evidence = None
        if self.buffers is not None:
            total, count = self.evidence()
            first = self.columns - columns
            evidence = (total[:, :, first:], count[:, first:])
        self.refill(key, value, valid, evidence)

    def refill(self, key: Tensor, value: Tensor, valid: Tensor, evidence: tuple[Tensor, Tensor] | None) -> None:
        """The window becomes these columns: key, value [B,Hk,m,D], valid bool [B,m], evidence ([B,Hk,m], [B,m])."""
        if key.shape[2] == 0:
            self.empty()
            return
        self.set_used(self.sinks + key.shape[2])
        self.decode_from = self.used
        self.tail.key[:, :, self.window] = key
        self.tail.value[:, :, self.window] = value
        self.tail.valid[:, self.window] = valid.to(torch.uint8)
        self.tail.valid[:, self.used :] = 1
        self._forget()
        if evidence is not None and self.buffers is not None and self.count is not None:
            self.buffers.total[:, :, self.window] = evidence[0]
            self.count[:, self.window] = evidence[1]

    def fill_sinks(self, key: Tensor, value: Tensor, rank: Tensor, leaving: Tensor) -> None:
        """Tokens [B,Hk,m,D] of rank < sinks among their row's valid ones move to their slots; no synchronisation.

        rank int64 [B,m]; leaving bool [B,m]: valid columns that leave the window now.
        """
        if self.sinks == 0 or key.shape[2] == 0:
            return
        batch, width = rank.shape
        slot = torch.where(leaving & (rank < self.sinks), rank, self.sinks)  # one more slot takes the others
        source = torch.full((batch, self.sinks + 1), -1, dtype=torch.int64, device=rank.device)
        source.scatter_(1, slot, torch.arange(width, device=rank.device).expand(batch, -1))
        source = source[:, : self.sinks]
        found = source >= 0
        index = source.clamp(min=0)[:, None, :, None].expand(-1, key.shape[1], -1, key.shape[3])
        for tensor, new in ((self.tail.key, key), (self.tail.value, value)):
            old = tensor[:, :, : self.sinks]
            tensor[:, :, : self.sinks] = torch.where(found[:, None, :, None], new.gather(2, index), old)
        self.tail.valid[:, : self.sinks] |= found.to(torch.uint8)

    def drop_sinks(self, valid_columns: Tensor) -> None:
        """After a crop: sinks of rank >= valid_columns int [B] are no longer there."""
        if self.sinks:
            ranks = torch.arange(self.sinks, device=valid_columns.device)
            self.tail.valid[:, : self.sinks] &= (ranks < valid_columns.unsqueeze(1)).to(torch.uint8)

    # evidence --------------------------------------------------------------------------------------------------

    def evidence(self) -> tuple[Tensor, Tensor]:
        """(total fp32 [B, Hk, columns], count fp32 [B, columns]) of the window, accepted queries included."""
        assert self.buffers is not None
        assert self.count is not None
        counted = torch.arange(MAX_QUERY, device=self.count.device) < self.buffers.accepted
        pending = torch.where(counted[:, None], self.buffers.pending[..., self.window], 0.0).sum(2)
        total = self.buffers.total[:, :, self.window] + pending
        decoded = self.tail.valid[:, self.window].float()
        decoded[:, : self.decode_from - self.sinks] = 0
        seen_by = decoded.flip(1).cumsum(1).flip(1)
        return total, self.count[:, self.window] + seen_by

    # rows and tensors --------------------------------------------------------------------------------------------

    def select(self, index: Tensor) -> None:
        """Row i becomes row index[i]; in place if the number of rows stays."""
        self._replace(lambda tensor: tensor.index_select(0, index), in_place=index.shape[0] == self.tail.valid.shape[0])

    def copy_from(self, other: TailWindow, index: Tensor) -> None:
        """Take rows index of another window with the same policy: tokens, evidence, host mirrors."""
        self.calls = []
        theirs = other.tensors()
        for name, tensor in self.tensors().items():
            per_row = name not in ("tail.length", "saliency.accepted")
            tensor.copy_(theirs[name].index_select(0, index) if per_row else theirs[name])
        self.used, self.decode_from, self.evident = other.used, other.decode_from, other.evident
        self.blank, self.unseen = other.blank, other.unseen

    def to(self, device: torch.device) -> None:
        self._replace(lambda tensor: tensor.to(device), in_place=False, shared=True)

    def _replace(self, change: Callable[[Tensor], Tensor], *, in_place: bool, shared: bool = False) -> None:
        def new(tensor: Tensor, per_row: bool = True) -> Tensor:
            if not per_row and not shared:
                return tensor if in_place else tensor.clone()  # not a view that keeps the old storage alive
            return tensor.copy_(change(tensor)) if in_place else change(tensor)

        self.calls = []
        tail, buffers = self.tail, self.buffers
        self.tail = Tail(new(tail.key), new(tail.value), new(tail.valid), new(tail.length, per_row=False))
        if buffers is not None and self.count is not None:
            accepted = new(buffers.accepted, per_row=False)
            self.buffers = SaliencyBuffers(new(buffers.total), new(buffers.pending), accepted)
            self.count = new(self.count)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by name, all slots."""
        found = {f"tail.{name}": tensor for name, tensor in vars(self.tail).items()}
        if self.buffers is not None and self.count is not None:
            found |= {f"saliency.{name}": tensor for name, tensor in vars(self.buffers).items()}
            found["saliency.count"] = self.count
        return found


def copied(buffers: SaliencyBuffers) -> SaliencyBuffers:
    """The same numbers in storage of their own."""
    return SaliencyBuffers(*(tensor.clone() for tensor in vars(buffers).values()))


def put_back(buffers: SaliencyBuffers, kept: SaliencyBuffers) -> None:
    """The buffers hold what `copied` kept; where they lie stays."""
    for now, then in zip(vars(buffers).values(), vars(kept).values(), strict=True):
        now.copy_(then)
