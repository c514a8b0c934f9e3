"""Losses of a language-model head without the logits of all tokens: SmolLM2 at 32k tokens would need 6.4 GB in fp32.

The head runs on pieces of the tokens. Their number depends on shapes alone, so all ranks call the head equally often
(ZeRO-3 gathers its weight in every call). Two ways back: `recompute` runs each piece again in the backward pass, which
trains the head too; otherwise the gradient of the hidden states is made in the forward pass, while the logits are there
(d loss_t / d h_t depends on token t alone), which saves a third of the products and needs a frozen head.
All sums over the vocabulary are fp32 (fp64 for fp64). The logits are the head's: an nn.Linear in bf16 rounds them, which a mean
loss over many tokens does not notice (routing/losses.py, experts and gates); who compares log-probabilities hands in a
WideHead, whose logits are fp32 from the product on (thoughts/: rewards, pi against pi_old).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .wide_head import WideHead

Head = nn.Module | WideHead

LOGITS_AT_ONCE = 2**27
"""Elements of one piece of logits: 0.5 GB in fp32."""

IGNORED = -100
"""The label of a token that is not predicted."""

PLAIN: dict[str, Any] = {"temperature": 1.0, "banned": None, "entropy": False, "entropy_gradient": False}
"""Settings of `token_nll` of a loss and nothing else."""

HEAD_EXTRAS = ("final_logit_softcapping", "logits_scaling", "logit_scale")
"""Settings of a model's config that do more to the logits than a linear head; None, 1 or absent where they do not."""


def num_pieces(tokens: int, head: Head) -> int:
    """Into how many pieces so many tokens are cut; at least 1."""
    vocabulary = getattr(head, "out_features", 1)
    return max(1, -(-tokens * vocabulary // LOGITS_AT_ONCE))


def token_nll(
    head: Head,
    hidden_TD: Tensor,
    labels_T: Tensor,
    *,
    temperature: float = 1.0,
    banned: Tensor | None = None,
    recompute: bool = True,
    pieces: int | None = None,
    entropy: bool = True,
    entropy_gradient: bool = False,
    compiled: bool = False,
) -> tuple[Tensor, Tensor]:
    """(-log softmax(head(h) / temperature)[label], entropy of that softmax), fp32 [T] each; the entropy is detached
    unless `entropy_gradient`, and 0 where it is not asked for.

    labels_T  int64, all of them valid      banned  int64 token ids whose logit is -inf, as in sampling; None: none
    recompute False needs a head without trainable parameters; `compiled` then makes loss and gradient in two readings of the
    logits (no temperature, no banned tokens, no entropy)
    """
    settings = {
        "temperature": temperature, "banned": banned, "entropy": entropy, "entropy_gradient": entropy_gradient,
    }  # fmt: skip
    count = pieces or num_pieces(labels_T.numel(), head)
    parts = zip(hidden_TD.tensor_split(count), labels_T.tensor_split(count))
    if recompute and torch.is_grad_enabled():
        # No determinism check: it compares shapes, and under ZeRO-3 the head's weight is whole or empty as need be.
        results = [
            checkpoint(
                _nll, head, hidden, labels, use_reentrant=False, preserve_rng_state=False, determinism_check="none",
                **settings,
            )
            for hidden, labels in parts
        ]  # fmt: skip
    elif torch.is_grad_enabled() and hidden_TD.requires_grad:
        slope = _compiled_slope if compiled and settings == PLAIN else _nll_and_slope
        results = [_Fused.apply(slope, head, hidden, labels, settings) for hidden, labels in parts]
    else:
        with torch.no_grad():
            results = [_nll(head, hidden, labels, **settings) for hidden, labels in parts]
    nll, found = zip(*results)  # type: ignore[arg-type]
    return torch.cat(nll), torch.cat(found)


def token_divergence(head: Head, teacher_TD: Tensor, student_TD: Tensor, *, recompute: bool = True) -> Tensor:
    """KL(softmax(head(teacher)) || softmax(head(student))), fp32 [T]; a gradient for the student only."""
    count = num_pieces(2 * student_TD.shape[0], head)
    parts = zip(teacher_TD.detach().tensor_split(count), student_TD.tensor_split(count))
    if recompute and torch.is_grad_enabled():
        found = [
            checkpoint(_divergence, head, t, s, use_reentrant=False, preserve_rng_state=False, determinism_check="none")
            for t, s in parts
        ]
    elif torch.is_grad_enabled() and student_TD.requires_grad:
        found = [_Fused.apply(_divergence_and_slope, head, s, t, {})[0] for t, s in parts]  # type: ignore[index]
    else:
        with torch.no_grad():
            found = [_divergence(head, t, s) for t, s in parts]
    return torch.cat(found)  # type: ignore[arg-type]


def scores(logits: Tensor, temperature: float = 1.0, banned: Tensor | None = None) -> Tensor:
    """Logits as fp32 (fp64 for fp64), divided by the temperature, -inf at banned tokens."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if temperature != 1.0:
        wide = wide / temperature
    return wide if banned is None else wide.index_fill(-1, banned, -torch.inf)


def _nll(
    head: Head, hidden_TD: Tensor, labels_T: Tensor, temperature: float, banned: Tensor | None, entropy: bool,
    entropy_gradient: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    wide_TV = scores(head(hidden_TD), temperature, banned)
    nll_T = nn.functional.cross_entropy(wide_TV, labels_T, reduction="none")
    if entropy_gradient:
        logprob_TV = wide_TV.log_softmax(-1)
        return nll_T, -(logprob_TV.exp() * logprob_TV.masked_fill(logprob_TV == -torch.inf, 0.0)).sum(-1)
    return nll_T, _entropy(wide_TV.detach().softmax(-1)) if entropy else torch.zeros_like(nll_T)


def _nll_and_slope(
    logits_TV: Tensor, labels_T: Tensor, temperature: float, banned: Tensor | None, entropy: bool, entropy_gradient: bool,
    **_: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """(nll, entropy, d nll / d logits = (p - onehot) / temperature), and d entropy / d logits = -p (log p + entropy) /
    temperature if it is asked for."""
    wide_TV = scores(logits_TV, temperature, banned)
    nll_T = nn.functional.cross_entropy(wide_TV, labels_T, reduction="none")
    p_TV = wide_TV.softmax(-1)
    entropy_T = _entropy(p_TV) if entropy or entropy_gradient else torch.zeros_like(nll_T)
    more = [(torch.special.entr(p_TV) - p_TV * entropy_T[:, None]) / temperature] if entropy_gradient else []
    p_TV.scatter_add_(1, labels_T[:, None], torch.full_like(nll_T, -1.0)[:, None])
    return nll_T, entropy_T, p_TV / temperature, *more


def plain_slope(logits_TV: Tensor, labels_T: Tensor) -> tuple[Tensor, Tensor]:
    """(nll in fp32, p - onehot in the logits' dtype): what `_nll_and_slope` computes where nothing else is asked for, written
    so that a compiler needs no wide copy of the logits."""
    wide_TV = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
    total_T1 = wide_TV.logsumexp(-1, keepdim=True)
    nll_T = (total_T1 - wide_TV.gather(1, labels_T[:, None])).squeeze(1)
    chosen_TV = torch.arange(wide_TV.shape[1], device=wide_TV.device) == labels_T[:, None]
    p_TV = (wide_TV - total_T1).exp()
    return nll_T, torch.where(chosen_TV, p_TV - 1, p_TV).to(logits_TV.dtype)


@functools.cache
def _compiler() -> Callable[..., tuple[Tensor, Tensor]]:
    """One graph for any number of labels."""
    return torch.compile(plain_slope, dynamic=True, fullgraph=True)


def _compiled_slope(logits_TV: Tensor, labels_T: Tensor, **_: Any) -> tuple[Tensor, ...]:
    nll_T, slope_TV = _compiler()(logits_TV, labels_T)
    return nll_T, torch.zeros_like(nll_T), slope_TV


def _entropy(p_TV: Tensor) -> Tensor:
    return torch.special.entr(p_TV).sum(-1)


def _divergence(head: Head, teacher_TD: Tensor, student_TD: Tensor) -> Tensor:
    with torch.no_grad():
        target_TV = scores(head(teacher_TD)).log_softmax(-1)
    student_TV = scores(head(student_TD)).log_softmax(-1)
    return (target_TV.exp() * (target_TV - student_TV)).sum(-1)


def _divergence_and_slope(logits_TV: Tensor, teacher_TD: Tensor, head: Head) -> tuple[Tensor, Tensor, Tensor]:
    """(KL, nothing, d KL / d student's logits = p_student - p_teacher)."""
    target_TV, student_TV = scores(head(teacher_TD)).log_softmax(-1), scores(logits_TV).log_softmax(-1)
    target_p = target_TV.exp()
    divergence_T = (target_p * (target_TV - student_TV)).sum(-1)
    return divergence_T, torch.zeros_like(divergence_T), student_TV.exp() - target_p


class _Fused(torch.autograd.Function):
    """One piece: values [T], and the gradient of the hidden states made at once, while the logits are there. The second
    value has one only if `slope` returns a fourth tensor."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, slope: Callable[..., Any], head: Head, hidden_TD: Tensor, other: Tensor, settings: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf_TD = hidden_TD.detach().requires_grad_()
            logits_TV = head(leaf_TD)
        value_T, extra_T, *slopes = slope(logits_TV.detach(), other, head=head, **settings)
        ctx.save_for_backward(
            *(torch.autograd.grad(logits_TV, leaf_TD, s.to(logits_TV.dtype), retain_graph=True)[0] for s in slopes)
        )
        if len(slopes) == 1:
            ctx.mark_non_differentiable(extra_T)
        return value_T, extra_T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, Tensor, None, None]:  # type: ignore[override]
        slopes = ctx.saved_tensors
        grad_TD = sum(slope_TD.to(grad_T.dtype) * grad_T[:, None] for slope_TD, grad_T in zip(slopes, grads))
        return None, None, grad_TD.to(slopes[0].dtype), None, None  # type: ignore[union-attr]
