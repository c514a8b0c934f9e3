"""One thinking step over a KV cache: the same branch as in training (types.py), one position after another.

    [x, START]   the text's last token, which gives the ordinary hidden state h0, and START
    t_1 .. t_T-1 one forward each
    [t_T, END]   the hidden state of END, mixed with h0, predicts the next token        (Quiet-STaR, section 4.3)

T + 1 forwards; then START, the thought and END are taken back from the cache. All rows go through the forwards of a step
in which any row thinks; those that do not keep the ordinary prediction. Caller: generation.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..base.randomness import draw_seed, uniform
from ..kernels.linear_loss import scores
from .anchors import anchor_key
from .branch import END, START, embed, language_head
from .cached_text import CachedText
from .config import ThoughtConfig
from .gate import Gate
from .parameters import ThoughtTensors, mix
from .rollout import banned_tokens, draw, random_tokens
from .types import PAUSE


@dataclass(frozen=True)
class Pending:
    """Columns that the cache does not hold yet: ids_Bn int64; seen_Bn, 0 at padding, position_Bn, None as in CachedText."""

    ids_Bn: Tensor
    seen_Bn: Tensor | None = None
    position_Bn: Tensor | None = None

    def split_last(self) -> tuple[Pending, Pending]:
        """(all columns but the last, the last)."""
        parts = []
        for part in (slice(None, -1), slice(-1, None)):
            tensors = (self.ids_Bn, self.seen_Bn, self.position_Bn)
            parts.append(Pending(*(None if x is None else x[:, part] for x in tensors)))  # type: ignore[arg-type]
        return parts[0], parts[1]

    def repeat(self, times: int) -> Pending:
        tensors = (self.ids_Bn, self.seen_Bn, self.position_Bn)
        return Pending(*(None if x is None else x.repeat_interleave(times, dim=0) for x in tensors))  # type: ignore[arg-type]


@dataclass(frozen=True)
class StepThoughts:
    """What was thought before one token. tokens_BST int64, logprob_BST fp32 under the sampling temperature, weight_BS
    fp32; numbers of rows outside thought_B mean nothing."""

    tokens_BST: Tensor
    logprob_BST: Tensor
    weight_BS: Tensor
    thought_B: Tensor


class Thinker:
    """The next-token prediction of a model that thinks: T tokens a thought, S thoughts whose predictions are averaged."""

    def __init__(
        self, model: Any, tensors: ThoughtTensors, config: ThoughtConfig, gate: Gate, *, greedy: bool,
        generator: torch.Generator | None,
    ) -> None:  # fmt: skip
        """`config`: tokens, samples, temperature, banned and control of the thoughts; greedy ignores the draw only."""
        self.model, self.head = model, language_head(model)
        self.tensors, self.config, self.gate, self.greedy, self.generator = tensors, config, gate, greedy, generator
        self.tokens, self.samples = config.tokens, config.samples
        device = tensors.meta_2D.device
        self.banned = banned_tokens(config, self.head, device)
        self.seed: Tensor | None = None  # drawn at the first thought: without thoughts no random number is used up
        self.expanded = False

    def next_logits(
        self, text: CachedText, pending: Pending, ids_BL: Tensor, active_B: Tensor
    ) -> tuple[Tensor, StepThoughts | None]:
        """(logits of the token after ids_BL, fp32 [B, V]; what was thought, None: nothing in any row).

        `pending` are the last columns of ids_BL; active_B bool, False for rows that are finished.
        """
        wants_B = self.gate.wants(ids_BL)
        if wants_B is not None:
            wants_B = wants_B & active_B
            if not bool(wants_B.any()):
                return self._plain(text, pending), None
        base_XD, hidden_XD = self._start(text, pending)
        base_XV = scores(self.head(base_XD))
        if self.gate.threshold is not None:
            entropy_B = torch.special.entr(base_XV[:: self.samples].softmax(-1)).sum(-1)
            wants_B = (entropy_B > self.gate.threshold) & active_B
            if not bool(wants_B.any()):
                text.take_back(text.mark(), 1)
                return base_XV[:: self.samples], None
        wants_B = active_B if wants_B is None else wants_B
        marked = text.mark()
        tokens_XT, logprob_XT, hidden_XD = self._think(text, hidden_XD)
        text.take_back(marked, self.tokens + 2)
        mixed_XD, weight_X1 = mix(self.tensors, base_XD, hidden_XD)
        logits_BV = self._average(scores(self.head(mixed_XD)))
        shape = (-1, self.samples)
        thought = StepThoughts(
            tokens_XT.unflatten(0, shape), logprob_XT.unflatten(0, shape), weight_X1[:, 0].unflatten(0, shape), wants_B
        )
        return torch.where(wants_B[:, None], logits_BV, base_XV[:: self.samples]), thought

    def _plain(self, text: CachedText, pending: Pending) -> Tensor:
        """The ordinary prediction, from one forward."""
        times = self.samples if self.expanded else 1
        hidden_XnD = self._read(text, pending.repeat(times) if times > 1 else pending)
        return scores(self.head(hidden_XnD[::times, -1]))

    def _start(self, text: CachedText, pending: Pending) -> tuple[Tensor, Tensor]:
        """(h0, hidden state of START) [X, D], X = B * S, after a forward over [x, START]."""
        if pending.ids_Bn.shape[1] > 1:
            before, pending = pending.split_last()
            self._read(text, before)
        if self.samples > 1:
            if not self.expanded:
                text.repeat(self.samples)
                self.expanded = True
            pending = pending.repeat(self.samples)
        text.reserve(self.tokens + 3)
        seen, position = pending.seen_Bn, pending.position_Bn
        hidden_X2D = text.forward(
            self._embed(torch.cat([pending.ids_Bn, torch.full_like(pending.ids_Bn, START)], dim=1)),
            None if seen is None else torch.cat([seen, torch.ones_like(seen)], dim=1),
            None if position is None else torch.cat([position, position + 1], dim=1),
        )
        return hidden_X2D[:, 0], hidden_X2D[:, 1]

    def _think(self, text: CachedText, hidden_XD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(thought tokens [X, T], their log-probabilities [X, T], hidden state of END [X, D]) from that of START."""
        random_XT = self._random(text.position_B1[:, 0] - 2)
        tokens, logprobs = [], []
        for step in range(self.tokens):
            token_X, logprob_X = self._draw(hidden_XD, random_XT[:, step])
            tokens.append(token_X)
            logprobs.append(logprob_X)
            ids_Xn = token_X[:, None]
            if step == self.tokens - 1:
                ids_Xn = torch.cat([ids_Xn, torch.full_like(ids_Xn, END)], dim=1)
            hidden_XD = text.forward(self._embed(ids_Xn))[:, -1]
        return torch.stack(tokens, dim=1), torch.stack(logprobs, dim=1), hidden_XD

    def _random(self, position_X: Tensor) -> Tensor:
        """Uniform numbers [X, T] by row, position in the text, sample and step: those of a rollout whose rows are numbered
        0, 1, ... (base/randomness.py), whatever the padding."""
        if self.seed is None:
            self.seed = draw_seed(self.generator, position_X.device)
        number_X = torch.arange(position_X.shape[0], device=position_X.device)
        key_X = anchor_key(number_X // self.samples, position_X)
        steps_T = torch.arange(self.tokens, device=position_X.device)
        return uniform(self.seed, key_X[:, None], (number_X % self.samples)[:, None], steps_T)

    def _draw(self, hidden_XD: Tensor, random_X: Tensor) -> tuple[Tensor, Tensor]:
        """(thought token [X], its log-probability [X]), filled as the model was trained (config.control)."""
        if self.config.control == "pause":
            return torch.full(random_X.shape, PAUSE, device=random_X.device), torch.zeros_like(random_X)
        if self.config.control == "random_thoughts":
            return random_tokens(self.head, self.config, random_X)
        return draw(self.head, hidden_XD, random_X, self.config.temperature, self.banned, self.greedy)

    def _embed(self, ids_Xn: Tensor) -> Tensor:
        return embed(self.model, self.tensors, ids_Xn)

    def _average(self, logits_XV: Tensor) -> Tensor:
        """The mean of the S predicted distributions, as log-probabilities [B, V]; with S = 1 the logits themselves."""
        if self.samples == 1:
            return logits_XV
        logprob_BSV = logits_XV.log_softmax(-1).unflatten(0, (-1, self.samples))
        return logprob_BSV.logsumexp(1) - math.log(self.samples)

    def _read(self, text: CachedText, pending: Pending) -> Tensor:
        return text.forward(self._embed(pending.ids_Bn), pending.seen_Bn, pending.position_Bn)
