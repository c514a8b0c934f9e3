"""Log-likelihood of continuations in one pass a batch: the prompt once, all its continuations behind it in
one row.

A row is a tree of depth one: `prompt | leaf 1 | leaf 2 | ...`. A leaf sees the prompt and itself (4-D mask)
and its positions restart after the prompt, so every leaf's log-probability equals that of `prompt + leaf`
alone. Logits exist only where a token is predicted: a hook narrows the hidden states before the model's own
output head, whatever that head does afterwards. For a leaf with tokens y_1..y_L, p = softmax of the logits,
all in fp32:

    sum_L   = sum_i log p(y_i | prompt, y_<i)             length-normalised score = sum_L / L
    nats_L  = -(sum_L + log p(eos | prompt, y)) over L+1 answer tokens
    exact_L = each y_i and eos is the argmax              iff greedy generation emits exactly this leaf

Called by evaluation/run.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ..base.errors import DataError
from .encoding import EncodedItem, ItemRef

ROW_MULTIPLE = 8  # the fused attention kernels want masks whose rows are aligned
MAX_LOGITS = 2**28  # logits of one batch: positions times vocabulary
FLOAT_LOGITS = 2**26  # logits held in fp32 at a time
MAX_ROW = 1024  # tokens; a longer list of choices is split over rows that repeat the prompt


@dataclass(frozen=True)
class TreeRow:
    """An item's prompt and some of its leaves. `first_leaf`: number of the first one among all leaves of a
    plan."""

    ref: ItemRef
    prompt: tuple[int, ...]
    leaves: tuple[tuple[int, ...], ...]
    first_leaf: int

    @property
    def length(self) -> int:
        return len(self.prompt) + sum(map(len, self.leaves))

    @property
    def predicted(self) -> int:
        """Positions whose logits are needed: the prompt's last and every leaf token's."""
        return 1 + sum(map(len, self.leaves))


@dataclass(frozen=True)
class TreeBatch:
    """Rows as tensors on the device. U: positions with logits; P: predictions (several may share a position).

    token_BT, position_BT int64; branch_BT int32: 0 prompt, 1.. leaves, -1 padding
    source_U  index into the flattened [B*T]    where_P  index into U    target_P  token id
    leaf_P    number of the leaf in the plan    end_P    True where the target is end-of-text
    rows      what the tensors were made of
    """

    refs: tuple[ItemRef, ...]
    token_BT: torch.Tensor
    position_BT: torch.Tensor
    branch_BT: torch.Tensor
    source_U: torch.Tensor
    where_P: torch.Tensor
    target_P: torch.Tensor
    leaf_P: torch.Tensor
    end_P: torch.Tensor
    rows: tuple[TreeRow, ...] = ()


@dataclass(frozen=True)
class LeafScores:
    """Of every leaf of a plan, on the device: log p of its tokens, of end-of-text after it, tokens not the
    argmax."""

    sum_L: torch.Tensor
    end_L: torch.Tensor
    missed_L: torch.Tensor

    @staticmethod
    def zeros(count: int, device: torch.device | str) -> LeafScores:
        return LeafScores(*(torch.zeros(count, dtype=torch.float64, device=device) for _ in range(3)))


def tree_rows(items: Sequence[EncodedItem], max_row: int = MAX_ROW) -> list[TreeRow]:
    """Every item as one row, or as several where its leaves do not fit into `max_row` tokens. Leaf numbers
    follow the order of items and choices."""
    rows: list[TreeRow] = []
    number = 0
    for item in items:
        part: list[tuple[int, ...]] = []
        for leaf in item.leaves:
            if part and len(item.prompt) + sum(map(len, part)) + len(leaf) > max_row:
                rows.append(TreeRow(item.ref, item.prompt, tuple(part), number))
                number, part = number + len(part), []
            part.append(leaf)
        rows.append(TreeRow(item.ref, item.prompt, tuple(part), number))
        number += len(part)
    return rows


def tree_batches(rows: Sequence[TreeRow], batch_tokens: int, vocabulary: int) -> list[list[TreeRow]]:
    """Rows in batches, longest first, at most `batch_tokens` tokens each with padding (one row at least)."""
    batches: list[list[TreeRow]] = []
    width = predicted = 0
    for row in sorted(rows, key=lambda row: -row.length):
        predicted += row.predicted
        full = bool(batches) and ((len(batches[-1]) + 1) * width > batch_tokens or predicted * vocabulary > MAX_LOGITS)
        if not batches or full:
            batches.append([])
            width, predicted = _aligned(row.length), row.predicted
        batches[-1].append(row)
    return batches


def collate(rows: Sequence[TreeRow], eos: int, pad: int, device: torch.device | str) -> TreeBatch:
    """Rows as one batch on `device`."""
    width = _aligned(max(row.length for row in rows))
    tokens, positions, branches, sources = [], [], [], []
    where, target, leaf_number, end = [], [], [], []
    for index, row in enumerate(rows):
        token, position, branch = list(row.prompt), list(range(len(row.prompt))), [0] * len(row.prompt)
        root = len(sources)
        sources.append(index * width + len(row.prompt) - 1)
        for offset, leaf in enumerate(row.leaves):
            first = len(sources)
            sources.extend(index * width + len(token) + step for step in range(len(leaf)))
            where.extend([root, *range(first, first + len(leaf))])
            target.extend([*leaf, eos])
            leaf_number.extend([row.first_leaf + offset] * (len(leaf) + 1))
            end.extend([False] * len(leaf) + [True])
            token.extend(leaf)
            position.extend(range(len(row.prompt), len(row.prompt) + len(leaf)))
            branch.extend([offset + 1] * len(leaf))
        rest = width - len(token)
        tokens.append(token + [pad] * rest)
        positions.append(position + [0] * rest)
        branches.append(branch + [-1] * rest)

    def tensor(values: list[Any], dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype).to(device)

    return TreeBatch(
        tuple(row.ref for row in rows),
        tensor(tokens),
        tensor(positions),
        tensor(branches, torch.int32),
        tensor(sources),
        tensor(where),
        tensor(target),
        tensor(leaf_number),
        tensor(end, torch.bool),
        tuple(rows),
    )


def tree_mask(branch_BT: torch.Tensor) -> torch.Tensor:
    """bool [B, 1, T, T], True where the query (second last axis) sees the key: earlier or itself, and of the
    prompt or of its own leaf. Padding sees itself only, so that no row of the mask is empty."""
    steps = torch.arange(branch_BT.shape[1], device=branch_BT.device)
    query, key = branch_BT[:, :, None], branch_BT[:, None, :]
    causal = steps[:, None] >= steps[None, :]
    seen = causal & ((key == 0) & (query >= 0) | (key == query) & (query > 0))
    return (seen | torch.eye(len(steps), dtype=torch.bool, device=branch_BT.device))[:, None]


@torch.no_grad()
def score_batch(model: Any, batch: TreeBatch, into: LeafScores) -> None:
    """Add the batch's predictions to `into`, without waiting for the device."""
    mask = tree_mask(batch.branch_BT)
    if model.config._attn_implementation == "eager":  # eager attention adds its mask
        lowest = torch.finfo(model.dtype).min
        mask = torch.zeros(mask.shape, dtype=model.dtype, device=mask.device).masked_fill_(~mask, lowest)
    with logits_only_at(model, batch.source_U):
        logits_UV = model(
            input_ids=batch.token_BT, position_ids=batch.position_BT, attention_mask=mask, use_cache=False
        ).logits[0]
    logprob_P, hit_P = _log_probabilities(logits_UV, batch.where_P, batch.target_P)
    zero = torch.zeros((), dtype=torch.float64, device=logprob_P.device)
    into.sum_L.index_add_(0, batch.leaf_P, torch.where(batch.end_P, zero, logprob_P))
    into.end_L.index_add_(0, batch.leaf_P, torch.where(batch.end_P, logprob_P, zero))
    into.missed_L.index_add_(0, batch.leaf_P, (~hit_P).double())


def _log_probabilities(
    logits_UV: torch.Tensor, where_P: torch.Tensor, target_P: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """log softmax in fp32 at the targets (as float64), and whether each target is the argmax."""
    step = max(1, FLOAT_LOGITS // logits_UV.shape[1])
    total = torch.cat([part.float().logsumexp(-1) for part in logits_UV.split(step)])
    best_U = logits_UV.argmax(-1)
    chosen_P = logits_UV[where_P, target_P].float()
    return (chosen_P - total[where_P]).double(), best_U[where_P] == target_P


@contextmanager
def logits_only_at(model: Any, source_U: torch.Tensor) -> Iterator[None]:
    """Within it the model's output head sees only the positions `source_U` of the flattened batch: logits
    [1, U, V]."""

    def narrow(_: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden_BTD = arguments[0]
        return (hidden_BTD.flatten(0, 1)[source_U][None], *arguments[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(narrow)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def scoring_attention(model: Any, longest: int) -> Iterator[None]:
    """Evaluation mode, and an attention that takes a 4-D mask: flash attention is swapped for sdpa meanwhile.
    DataError (DATA-004) if a sliding window is shorter than the `longest` sequence, which the mask would not
    know."""
    window = getattr(model.config, "sliding_window", None)
    if window and getattr(model.config, "use_sliding_window", True) and longest > window:
        raise DataError(
            f"items of {longest} tokens, sliding window of {window}: not supported; drop the long items",
            code="DATA-004",
        )
    implementation, training = model.config._attn_implementation, model.training
    swap = implementation not in {"sdpa", "eager"}
    model.eval()
    if swap:
        model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        if swap:
            model.set_attn_implementation(implementation)
        model.train(training)


def _aligned(length: int) -> int:
    return -(-length // ROW_MULTIPLE) * ROW_MULTIPLE
