"""What a site adds to its linear while experts or gates are trained: every row's own expert.

The tensors of a site are attributes, put there before each forward by routing/training.py: the layers of a model then look alike
to torch.compile, which makes one graph for all of them. Compiled and eager code compute the same in two ways, each with what it
is good at: compiled code takes the base's product too (kernels/routed_lora/rows.py). Callers: routing/training.py,
routing/routed_linear.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..base.errors import QuietGooseError
from ..base.modules import hooked
from ..kernels.routed_lora import add_row_lora, gate_logits, linear_rows, shrink_rows


@dataclass
class RowContext:
    """What the sites of a model read during one forward and its backward: the adapters (and gates) of every group of rows,
    and the share [B, T, 1] with which a token's adapter counts at every site. A group is rows of one expert, one after
    another; all groups are equally large (Batch.group_G), or every row is one."""

    adapters: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    gates: list[Tensor] | None = None
    shares: Sequence[Tensor] | None = None


class InputGroup:
    """Sites that read one input (q, k, v; gate, up), in the order of their calls. In compiled code the first of them shrinks
    for all, so the input is read once forward and once backward; in eager code it makes the logits of all their gates, from one wide
    copy of the input. The last lets go of what waits. A site that is called with another input, or out of order, works by
    itself."""

    def __init__(self) -> None:
        self.parts: tuple[Tensor, ...] = ()
        self.gates: tuple[Tensor, ...] = ()
        self.x: Tensor | None = None
        self.h_GTR: Tensor | None = None
        self.logits_GTS: Tensor | None = None

    def bind(self, members: Sequence[RowAdapter]) -> None:
        """The members' A and gates, and where each finds its part."""
        self.parts = tuple(member.a_GRI for member in members)  # type: ignore[misc]
        self.gates = tuple(member.gate_GI for member in members if member.gate_GI is not None)
        start = 0
        for number, (member, a_GRI) in enumerate(zip(members, self.parts)):
            member.first, member.last = number == 0, number == len(members) - 1
            member.number, member.start = number, start
            start += a_GRI.shape[1]


class RowAdapter(nn.Module):
    """Adds every row's own expert at one site."""

    def __init__(self, site: str, scale: float) -> None:
        super().__init__()
        self.site, self.scale = site, scale
        self.a_GRI: Tensor | None = None
        self.b_GOR: Tensor | None = None
        self.gate_GI: Tensor | None = None
        self.share_BT1: Tensor | None = None
        self.group: InputGroup | None = None
        self.first, self.last, self.number, self.start = True, True, 0, 0

    def takes_base(self, base: nn.Linear) -> bool:
        """Whether `linear` may stand for the base's own call and `forward`: in compiled code, of a plain frozen linear that
        nobody listens to."""
        if not torch.compiler.is_compiling() or type(base) is not nn.Linear or hooked(base):
            return False
        return not (base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad))

    def linear(self, x: Tensor, base: nn.Linear) -> Tensor:
        """base(x) + scale * g * B_e A_e x, x [B, T, I] or [1, B*T, I], the adapter's product added inside the base's."""
        _, b_GOR = self._parts(x)
        return linear_rows(x, base.weight, base.bias, self._hidden(x), b_GOR, self.scale)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x [B, T, I] or [1, B*T, I], y alike -> y + scale * g * B_e A_e x, shape of y."""
        a_GRI, b_GOR = self._parts(x)
        if torch.compiler.is_compiling():
            update_GTO = torch.bmm(self._hidden(x), b_GOR.transpose(1, 2))
            return y + self.scale * update_GTO.view_as(y)
        groups = a_GRI.shape[0]
        x_GTI, y_GTO = x.reshape(groups, -1, x.shape[-1]), y.reshape(groups, -1, y.shape[-1])
        gate_GT1 = None if self.share_BT1 is None else self.share_BT1.reshape(groups, -1, 1)
        if self.gate_GI is not None:
            gate_GT1 = torch.sigmoid(self._gate(x, x_GTI, self.gate_GI)).to(x.dtype)
        return add_row_lora(y_GTO, x_GTI, a_GRI, b_GOR, gate_GT1, self.scale).view_as(y)

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The groups' A and B for this input."""
        a_GRI, b_GOR = self.a_GRI, self.b_GOR
        assert a_GRI is not None, "the rows' experts are set before the forward"
        assert b_GOR is not None
        if x.numel() % (a_GRI.shape[0] * x.shape[-1]):
            raise QuietGooseError(
                f"site {self.site}: input {tuple(x.shape)} does not divide into the batch's {a_GRI.shape[0]} groups of rows",
                code="RTE-003",
            )
        return a_GRI, b_GOR

    def _hidden(self, x: Tensor) -> Tensor:
        """g A x [G, L, R]; in compiled code only."""
        h_GTR = self._shrink(x)
        if self.gate_GI is not None:
            x_GTI = x.reshape(h_GTR.shape[0], -1, x.shape[-1])
            return h_GTR * torch.sigmoid(_logits(x_GTI, self.gate_GI)).to(x.dtype)
        return h_GTR if self.share_BT1 is None else h_GTR * self.share_BT1.reshape(*h_GTR.shape[:2], 1)

    def _gate(self, x: Tensor, x_GTI: Tensor, gate_GI: Tensor) -> Tensor:
        """The logit [G, T, 1] of this site's gate, in the gate's dtype; in eager code only."""
        group = self.group
        if group is None:
            return gate_logits(x_GTI, gate_GI[:, None])
        if self.first:
            group.x, group.logits_GTS = x, gate_logits(x_GTI, torch.stack(group.gates, 1))
        if group.x is x and group.logits_GTS is not None:
            logits_GT1 = group.logits_GTS.narrow(2, self.number, 1)
        else:
            logits_GT1 = gate_logits(x_GTI, gate_GI[:, None])
        if self.last:
            group.x = group.logits_GTS = None
        return logits_GT1

    def _shrink(self, x: Tensor) -> Tensor:
        """A x [G, T, R] of this site; in compiled code only."""
        a_GRI, group = self.a_GRI, self.group
        assert a_GRI is not None
        if group is None:
            return shrink_rows(x, a_GRI)
        if self.first:
            group.x = x
            group.h_GTR = shrink_rows(x, torch.cat(group.parts, dim=1))
        if group.x is x and group.h_GTR is not None:
            h_GTR = group.h_GTR.narrow(2, self.start, a_GRI.shape[1])
        else:
            h_GTR = shrink_rows(x, a_GRI)
        if self.last:
            group.x = group.h_GTR = None
        return h_GTR


def _logits(x_GTI: Tensor, v_GI: Tensor) -> Tensor:
    """x . v [G, T, 1] in v's dtype, which a compiler fuses into another reading of x; eager code takes the kernel that keeps no
    wide copy of x."""
    return (x_GTI.to(v_GI.dtype) * v_GI[:, None]).sum(-1, keepdim=True)
