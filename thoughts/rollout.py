"""Sampling thoughts: T steps of one new token for every branch, without gradients, over a prefix stored once.

A step is the model's ordinary forward over [B, A * S] tokens; keys and values of the thoughts live in static buffers
and the step's number is a tensor on the device, so on a GPU one step is captured in a CUDA graph and replayed. The
same code runs uncaptured elsewhere. What is drawn depends on the generator's next number, the anchor's key, the sample
and the step, not on the layout (base/randomness.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..base.devices import addresses
from ..base.errors import QuietGooseError, RecipeError
from ..base.randomness import draw_seed, uniform
from ..kernels.linear_loss import scores
from .attention import BranchState, switch
from .branch import first_position, head_pieces, language_head, run_branches
from .calibration import calibrate
from .config import ThoughtConfig
from .graphs import GraphPool, Kept, own_stream
from .policy import Policy, PolicyTensors
from .storage import ThoughtStore
from .types import PAUSE, Anchors, Prefix, Rows, Thoughts

WARM_STEPS = 2  # real steps before the capture: library handles, autotuning
KEPT_GRAPHS = 2  # shapes in use at a time: training, and scoring beside it
KEPT_ROLLOUTS = 32  # a shape that was not used for so many rollouts gives its buffers back


class RolloutGraphs:
    """Captured steps by shape, kept from one rollout to the next. One object for one policy; CUDA only, else idle.

    Parameters that are leaves are read where they lie, and a step is captured again when they have moved; everything else
    a step reads is copied into static buffers. A shape keeps its thought store and a copy of the prefix on the device.
    Not for ZeRO-3 (parameters come and go) nor for a model that waits for the device in its forward (THT-005).
    """

    def __init__(self, pool: GraphPool | None = None) -> None:
        """`pool`: what else is captured and never runs at the same time may work in it, too."""
        self.pool = GraphPool() if pool is None else pool
        self._steppers: Kept[_Stepper] = Kept(KEPT_GRAPHS, KEPT_ROLLOUTS)

    def get(self, key: Hashable, make: Callable[[], _Stepper]) -> _Stepper:
        """The captured step of this shape. The shapes used longest ago make room before a new one takes any."""
        return self._steppers.get(key, make)


@torch.no_grad()
def rollout(
    policy: Policy,
    tensors: PolicyTensors,
    prefix: Prefix,
    rows: Rows,
    anchors: Anchors,
    config: ThoughtConfig,
    generator: torch.Generator | None = None,
    *,
    greedy: bool = False,
    at_once: int | None = None,
    graphs: RolloutGraphs | None = None,
) -> Thoughts:
    """S thoughts of T tokens for every anchor; tokens and log pi_old, under temperature and without banned tokens.

    at_once  anchors of a row that are sampled together (None: all); bounds memory, changes nothing that is drawn
    greedy   the most likely token instead of a draw (its log-probability is that of the distribution)
    graphs   reuse captured steps; None: no capture
    Raises RecipeError CFG-100 for banned tokens that the vocabulary does not have, QuietGooseError THT-005 for a model
    whose forward cannot be captured.
    """
    switch(policy.model)
    device = rows.tokens_BT.device
    shape = (*anchors.index_BA.shape, config.samples, config.tokens)
    seed = draw_seed(generator, device)
    if config.control == "pause":
        tokens = torch.full(shape, PAUSE, dtype=torch.int64, device=device)
        return Thoughts(tokens, torch.zeros(shape, device=device), anchors)
    if config.control == "random_thoughts":
        return _random_thoughts(policy.model, anchors, config, seed)
    size = min(at_once or anchors.count, anchors.count)
    stepper = _stepper(policy, tensors, prefix, anchors, config, greedy, size, graphs)
    stepper.load(tensors, prefix, seed)
    found = [
        stepper.run(_padded(anchors.part(first, first + size), size), rows) for first in range(0, anchors.count, size)
    ]
    tokens, logprob = (torch.cat(parts, dim=1)[:, : anchors.count] for parts in zip(*found))
    return Thoughts(tokens, logprob, anchors)


def draw(
    head: Any, hidden_TD: Tensor, uniform_T: Tensor, temperature: float, banned: Tensor | None, greedy: bool
) -> tuple[Tensor, Tensor]:
    """(token int64 [T], its log-probability fp32 [T]) from softmax(head(h) / temperature) without banned tokens.

    Drawn by the inverse of the cumulative distribution: one uniform number a token. Probabilities are resolved to
    about 1e-7. No synchronisation with the host.
    """
    pieces = head_pieces(hidden_TD.shape[0], head)
    found = []
    for hidden, u in zip(hidden_TD.tensor_split(pieces), uniform_T.tensor_split(pieces)):
        logprob_TV = scores(head(hidden), temperature, banned).log_softmax(-1)
        token_T = logprob_TV.argmax(-1)
        if not greedy:
            token_T = _inverse(logprob_TV.exp(), u, token_T)
        found.append((token_T, logprob_TV.gather(1, token_T[:, None]).squeeze(1)))
    tokens, logprobs = zip(*found)
    return torch.cat(tokens), torch.cat(logprobs)


def _inverse(p_TV: Tensor, uniform_T: Tensor, likeliest_T: Tensor) -> Tensor:
    total_TV = p_TV.cumsum(-1)
    target_T1 = uniform_T[:, None].to(p_TV.dtype) * total_TV[:, -1:]
    token_T = torch.searchsorted(total_TV, target_T1, right=True).squeeze(1).clamp_max(p_TV.shape[1] - 1)
    # a sum that rounding made uneven may point at a token of probability 0
    possible_T = p_TV.gather(1, token_T[:, None]).squeeze(1) > 0
    return torch.where(possible_T, token_T, likeliest_T)


class _Stepper:
    """The buffers of one chunk of anchors and the step over them."""

    def __init__(
        self,
        policy: Policy,
        prefix: Prefix,
        anchors: Anchors,
        config: ThoughtConfig,
        greedy: bool,
        capture: bool,
        pool: GraphPool | None = None,
    ) -> None:
        """`anchors` gives shapes and the promise `consecutive_from`; their numbers come with `run`."""
        self.policy, self.config, self.greedy, self.capture = policy, config, greedy, capture
        self.pool = GraphPool() if pool is None else pool
        self.graph: torch.cuda.CUDAGraph | None = None
        self.warm = 0
        self.places: tuple[int, ...] = ()
        self.tensors: PolicyTensors | None = None
        self.prefix: Prefix | None = None
        device, key = anchors.index_BA.device, prefix.keys[0]
        rows, count = anchors.index_BA.shape
        branches = (rows, count, config.samples)
        self.anchors = Anchors(
            *(torch.zeros_like(x) for x in (anchors.index_BA, anchors.start_BA, anchors.valid_BA, anchors.key_BA)),
            consecutive_from=anchors.consecutive_from,
        )
        self.position_BA = torch.zeros_like(anchors.index_BA)
        self.seed = torch.zeros(1, dtype=torch.int64, device=device)
        self.step = torch.zeros(1, dtype=torch.int64, device=device)
        self.last_BAS = torch.full(branches, PAUSE, dtype=torch.int64, device=device)
        self.tokens_BAST = torch.zeros(*branches, config.tokens, dtype=torch.int64, device=device)
        self.logprob_BAST = torch.zeros(
            *branches, config.tokens, device=device, dtype=torch.promote_types(key.dtype, torch.float32)
        )
        self.samples_S = torch.arange(config.samples, device=device)
        self.banned = banned_tokens(config, language_head(policy.model), device)
        self.store = ThoughtStore.over(prefix, config, count)

    def load(self, tensors: PolicyTensors, prefix: Prefix, seed: Tensor) -> None:
        """What one rollout reads: by reference, or copied to where the captured step reads."""
        self.seed.copy_(seed)
        prefix = prefix.detach()
        calibrate(self.store, self.policy, tensors, prefix.keys[0].shape[2], self.seed.device)
        if not self.capture:
            self.tensors, self.prefix = tensors, prefix
            return
        if self.tensors is None or self.prefix is None:
            self.tensors = tensors.with_flat([_static(t) for t in tensors.flat()])
            self.prefix = prefix.with_flat([t.clone() for t in prefix.flat()])
            self.places = addresses(self.policy.model)
            return
        pairs = [*zip(self.tensors.flat(), tensors.flat()), *zip(self.prefix.flat(), prefix.flat())]
        for mine, new in pairs:
            if mine is not new:
                mine.copy_(new.detach())
        if (
            places := addresses(self.policy.model)
        ) != self.places:  # what was captured reads memory that is no longer theirs
            self.places, self.graph, self.warm = places, None, 0

    def run(self, anchors: Anchors, rows: Rows) -> tuple[Tensor, Tensor]:
        """All T steps: tokens and log-probabilities [B, A, S, T]."""
        for name in ("index_BA", "start_BA", "valid_BA", "key_BA"):
            getattr(self.anchors, name).copy_(getattr(anchors, name))
        self.position_BA.copy_(first_position(rows, anchors))
        self.step.zero_()
        self.last_BAS.fill_(PAUSE)
        for _ in range(self.config.tokens):
            self._advance()
        return self.tokens_BAST.clone(), self.logprob_BAST.clone()

    def _advance(self) -> None:
        if self.graph is not None:
            self.graph.replay()
        elif not self.capture or self.warm < WARM_STEPS:
            self.warm += 1
            self._one_step()
        else:
            self.graph = self._captured()
            self.graph.replay()

    def _captured(self) -> torch.cuda.CUDAGraph:
        """One step as a graph; capturing runs nothing."""
        try:
            return self.pool.capture(self._one_step, own_stream(self.step.device))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise QuietGooseError(
                f"a step of {type(self.policy.model).__name__} cannot be captured in a CUDA graph ({error}); its forward "
                "probably waits for the device. Sample without captured steps: thoughts.capture: never in a recipe, graphs=None in "
                "a call",
                code="THT-005",
            ) from error

    def _one_step(self) -> None:
        """What is captured: the last token enters the branch, the next one is drawn."""
        assert self.tensors is not None
        assert self.prefix is not None
        model, config = self.policy.model, self.config
        state = BranchState.over(self.prefix, self.anchors, config.samples, store=self.store, step=self.step)
        with self.policy.bind(self.tensors):
            hidden_BAS1D = run_branches(
                model, self.tensors.thought, state, self.last_BAS.unsqueeze(-1), self.position_BA + self.step
            )
        random_BAS = uniform(self.seed, self.anchors.key_BA.unsqueeze(-1), self.samples_S, self.step)
        head = language_head(model)
        token, logprob = draw(
            head, hidden_BAS1D.flatten(0, 3), random_BAS.flatten(), config.temperature, self.banned, self.greedy
        )
        self.last_BAS.copy_(token.view_as(self.last_BAS))
        self.tokens_BAST.index_copy_(3, self.step, self.last_BAS.unsqueeze(-1))
        self.logprob_BAST.index_copy_(3, self.step, logprob.view_as(self.last_BAS).unsqueeze(-1))
        self.step.add_(1)


def _stepper(
    policy: Policy,
    tensors: PolicyTensors,
    prefix: Prefix,
    anchors: Anchors,
    config: ThoughtConfig,
    greedy: bool,
    size: int,
    graphs: RolloutGraphs | None,
) -> _Stepper:
    like = _padded(anchors.part(0, size), size)
    capture = graphs is not None and like.index_BA.is_cuda
    if size < anchors.count or capture:  # a stepper keeps one promise, chunks and micro-batches have several
        like = Anchors(like.index_BA, like.start_BA, like.valid_BA, like.key_BA)
    if graphs is None or not capture:
        return _Stepper(policy, prefix, like, config, greedy, capture=False)
    return graphs.get(
        graph_key(tensors, prefix, like, config, greedy),
        lambda: _Stepper(policy, prefix, like, config, greedy, capture=True, pool=graphs.pool),
    )


def graph_key(
    tensors: PolicyTensors, prefix: Prefix, anchors: Anchors, config: ThoughtConfig, greedy: bool
) -> Hashable:
    """What a captured step is good for: all sizes and settings, and the parameters that it reads in place."""
    shapes = tuple((tuple(t.shape), t.dtype) for t in (*prefix.flat(), *tensors.flat(), anchors.index_BA))
    return config, greedy, shapes, tuple(id(t) for t in tensors.flat() if _read_in_place(t))


def _static(tensor: Tensor) -> Tensor:
    """A parameter as it lies; a copy of anything else."""
    return tensor if _read_in_place(tensor) else tensor.detach().clone()


def _read_in_place(tensor: Tensor) -> bool:
    return tensor.is_leaf and tensor.requires_grad


def _padded(anchors: Anchors, size: int) -> Anchors:
    """Anchors filled up to `size` a row with padding."""
    short = size - anchors.count
    if short <= 0:
        return anchors
    index, start, valid, key = (
        functional.pad(x, (0, short), value=fill)
        for x, fill in (
            (anchors.index_BA, -1), (anchors.start_BA, 0), (anchors.valid_BA, False), (anchors.key_BA, 0)
        )
    )  # fmt: skip
    return Anchors(index, start, valid, key)


def banned_tokens(config: ThoughtConfig, head: Any, device: torch.device) -> Tensor | None:
    """int64 ids that no thought may hold, ascending; None: there are none. RecipeError CFG-100 for an id that is no row of
    the vocabulary, and where no token is left."""
    if not config.banned:
        return None
    banned, vocabulary = sorted(set(config.banned)), head.out_features
    if banned[0] < 0 or banned[-1] >= vocabulary:
        raise RecipeError(f"thoughts.banned is {banned}; the vocabulary has ids 0 to {vocabulary - 1}", code="CFG-100")
    if len(banned) == vocabulary:
        raise RecipeError("thoughts.banned holds every token of the vocabulary", code="CFG-100")
    return torch.tensor(banned, dtype=torch.int64, device=device)


def random_tokens(head: Any, config: ThoughtConfig, uniform_X: Tensor) -> tuple[Tensor, Tensor]:
    """(token int64 [X], its log-probability fp32 [X]) of control random_thoughts, from uniform numbers of any shape: every
    token that is not banned is equally likely. No synchronisation with the host."""
    banned = banned_tokens(config, head, torch.device("cpu"))
    skipped = [] if banned is None else banned.tolist()
    count = head.out_features - len(skipped)
    token_X = (uniform_X * count).long().clamp_max(count - 1)
    for token in skipped:  # ascending: each one makes room for itself
        token_X = token_X + (token_X >= token)
    return token_X, torch.full_like(uniform_X, -math.log(count))


def _random_thoughts(model: Any, anchors: Anchors, config: ThoughtConfig, seed: Tensor) -> Thoughts:
    """Control random_thoughts."""
    device = anchors.index_BA.device
    samples_S1 = torch.arange(config.samples, device=device)[:, None]
    u_BAST = uniform(seed, anchors.key_BA[..., None, None], samples_S1, torch.arange(config.tokens, device=device))
    return Thoughts(*random_tokens(language_head(model), config, u_BAST), anchors)
