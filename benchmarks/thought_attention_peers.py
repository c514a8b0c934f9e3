"""The calls that benchmarks/thought_attention.py times, and the peers that compute them with one dense mask.

dense  what the authors' code does a layer: keys of prefix and thoughts concatenated and repeated for the group, one bool
       mask [A * S * M, L + A * S * N], SDPA. Their mask is built once a step, so it is not part of the time
flex   FlexAttention over the same concatenated keys, compiled, with a block mask that is built once
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

SHAPES = {"smollm2": (9, 3, 64), "mistral": (32, 8, 128), "tiny": (4, 2, 16)}  # query heads, KV heads, head size
DOCUMENTS = 4
MASK_BYTES = 32 * 2**30  # a larger mask is not built


@dataclass
class Case:
    """One call: shape:L:anchors:S:T:J and whether it is a gradient pass or a rollout step."""

    name: str
    kind: str
    rows: int
    device: torch.device
    dtype: torch.dtype
    tensors: list[Tensor] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        shape, length, anchors, samples, thought, ahead = self.name.split(":")
        self.H, self.K, self.D = SHAPES[shape]
        self.L, self.S, self.scale = int(length), int(samples), self.D**-0.5
        self.backward = self.kind == "gradient"
        self.M = int(thought) + 2 + int(ahead) - 1 if self.backward else 1
        self.N = self.M if self.backward else int(thought)
        # a rollout is timed at its last step
        self.own_length = None if self.backward else torch.tensor([self.N], device=self.device)
        position = torch.arange(self.L, device=self.device)
        start = torch.zeros_like(position)
        if anchors == "packed":
            start = position // -(-self.L // DOCUMENTS) * -(-self.L // DOCUMENTS)
        elif anchors == "nth4":
            position, start = position[::4], start[::4]
        elif anchors != "every":
            raise SystemExit(f"case {self.name}: anchors are every, nth4 or packed")
        self.A = len(position)
        self.anchor, self.start = (x.expand(self.rows, -1).contiguous() for x in (position, start))
        self.consecutive_from = 0 if anchors == "every" else None
        g = torch.Generator(self.device).manual_seed(0)

        def normal(*sizes: int) -> Tensor:
            return torch.randn(*sizes, generator=g, device=self.device).to(self.dtype)

        def six(heads: int, width: int) -> Tensor:
            """As a model's projections leave it: heads beside each other."""
            x = normal(self.rows, self.A * self.S * width, heads, self.D).transpose(1, 2)
            return x.unflatten(2, (self.A, self.S, width))

        prefix = [normal(self.rows, self.K, self.L, self.D) for _ in range(2)]
        self.tensors = [six(self.H, self.M), *prefix, *(six(self.K, self.N) for _ in range(2))]
        self.grad = six(self.H, self.M)
        self.state: dict[str, Any] = {}

    @property
    def q(self) -> Tensor:
        return self.tensors[0]

    @property
    def title(self) -> str:
        return f"{self.name} x{self.rows} {self.kind}"

    @property
    def flops(self) -> float:
        """Of the forward: two products over the keys that each query sees."""
        prefix = (self.anchor - self.start + 1).sum().item() * self.S * self.M
        own = self.rows * self.A * self.S * (self.M * (self.M + 1) / 2 if self.backward else self.N)
        return 4.0 * self.H * self.D * (prefix + own)


def concatenated(q: Tensor, k: Tensor, v: Tensor, own_k: Tensor, own_v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Branch positions as one axis; prefix and own keys one behind the other."""
    return q.flatten(2, 4), *(torch.cat([x, own.flatten(2, 4)], dim=2) for x, own in ((k, own_k), (v, own_v)))


def dense_mask(anchor: Tensor, start: Tensor, filled: Tensor | int, S: int, M: int, N: int, L: int) -> Tensor:
    """bool [rows, 1, A * S * M, L + A * S * N]."""
    rows, A = anchor.shape
    size = rows * A * S * M * (L + A * S * N)
    if size > MASK_BYTES:
        raise torch.OutOfMemoryError(f"the dense mask alone has {size / 2**30:.0f} GiB. ")
    query = torch.arange(A * S * M, device=anchor.device)[:, None]
    own = torch.arange(A * S * N, device=anchor.device)
    diagonal = (query // M == own // N) & (own % N <= filled - M + query % M)
    anchor, start = (x.repeat_interleave(S * M, 1).unsqueeze(-1) for x in (anchor, start))
    key = torch.arange(L, device=anchor.device)
    prefix = (key <= anchor) & (key >= start)
    return torch.cat([prefix, diagonal.expand(rows, -1, -1)], dim=-1).unsqueeze(1)


class DenseAttention:
    """thought_attention as one SDPA call under the dense mask. A gradient pass's mask is kept for the next layers."""

    def __init__(self) -> None:
        self._kept: tuple[Any, Tensor] | None = None

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, own_k: Tensor, own_v: Tensor, anchor: Tensor, start: Tensor,
        own_length: Tensor | int | None = None, scale: float | None = None, **_: Any,
    ) -> Tensor:  # fmt: skip
        A, S, M = q.shape[2:5]
        N, L = own_k.shape[4], k.shape[2]
        key = (q.shape, own_k.shape, k.shape, None if own_length is None else "rollout")
        if self._kept is None or self._kept[0] != key or own_length is not None:
            self._kept = None
            self._kept = key, dense_mask(anchor, start, N if own_length is None else own_length, S, M, N, L)
        q, k, v = concatenated(q, k, v, own_k, own_v)
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        return scaled_dot_product_attention(q, k, v, attn_mask=self._kept[1], scale=scale).unflatten(2, (A, S, M))


def dense(case: Case, *tensors: Tensor) -> Tensor:
    """Attention under the dense diagonal mask, which is built once."""
    if "mask" not in case.state:
        filled = case.N if case.own_length is None else case.own_length
        case.state["mask"] = dense_mask(case.anchor, case.start, filled, case.S, case.M, case.N, case.L)
    q, k, v = concatenated(*tensors)
    k, v = (x.repeat_interleave(case.H // case.K, dim=1) for x in (k, v))
    out = scaled_dot_product_attention(q, k, v, attn_mask=case.state["mask"], scale=case.scale)
    return out.unflatten(2, (case.A, case.S, case.M))


def flex(case: Case, *tensors: Tensor) -> Tensor:
    """FlexAttention, its own forward and backward."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, k, v = concatenated(*tensors)
    S, M, N, L = case.S, case.M, case.N, case.L
    anchors, starts = case.anchor, case.start

    def visible(b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        anchor = row // (S * M)
        own = key - L
        prefix = (key < L) & (key <= anchors[b, anchor]) & (key >= starts[b, anchor])
        branch = (key >= L) & (own // N == row // M) & (own % N <= N - M + row % M)
        return prefix | branch

    if "flex" not in case.state:
        mask = create_block_mask(visible, case.rows, None, q.shape[2], k.shape[2], device=str(q.device), _compile=True)
        case.state["flex"] = mask, torch.compile(flex_attention)
    mask, run = case.state["flex"]
    out = run(q, k, v, block_mask=mask, scale=case.scale, enable_gqa=case.H != case.K)
    return out.unflatten(2, (case.A, case.S, case.M))
