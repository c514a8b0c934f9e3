"""Scores one cache method: KL on text, retrieval, drift along a rollout. All teacher-forced, all through the cache.

A prefix enters the cache in one forward, which attends exactly and then compresses; what follows enters in chunks of at
most 16 tokens that read the compressed prefix, as decoding would, without a forward per token. A chunk's logits are
compared with those of the 16-bit cache on the same chunks. Logits are computed in float32 from the last hidden state, so
that rounding of bf16 logits is no part of the difference.
Greedy decoding answers exactly right if and only if every answer token is the argmax after the right ones before it, so
exact match needs no generation; the digit score is teacher-forced and for this reason a little milder than a free run's.
Called by kv_quality.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from kv_peers import Peer, make_peer
from kv_quality_methods import SIXTEEN, Method
from kv_tasks import Cell, Windows
from torch import Tensor

STEP = 16  # tokens a decode-side chunk holds at most
TOKENS_PER_BATCH = 40_000
BYTES_READ_EVERY = 4  # chunks


@dataclass(frozen=True)
class Reference:
    """Last hidden states [N, T, hidden] of the 16-bit run, on the CPU, and its attention outputs on the first batch."""

    hidden: Tensor
    attention: list[list[Tensor]]  # [chunk][layer]


class Scorer:
    """One model; every call makes fresh caches of the method it is given."""

    def __init__(self, model: Any, rows_per_batch: int = 16, tokens_per_batch: int = TOKENS_PER_BATCH) -> None:
        self.model, self.rows_per_batch, self.tokens_per_batch = model, rows_per_batch, tokens_per_batch
        self.device = next(model.parameters()).device
        self.head = model.lm_head.weight.detach().float()

    def batches(self, count: int, length: int) -> Iterator[slice]:
        rows = max(1, min(self.rows_per_batch, self.tokens_per_batch // length))
        for start in range(0, count, rows):
            yield slice(start, min(start + rows, count))

    def short_batches(self, count: int, length: int) -> Iterator[slice]:
        rows = max(1, self.tokens_per_batch // length)
        for start in range(0, count, rows):
            yield slice(start, min(start + rows, count))

    def peer(self, method: Method) -> Peer:
        self.model.set_attn_implementation("sdpa")  # a peer before may have left its own, which ZipCache refuses
        peer = make_peer(method.peer, self.model.config, **method.settings)
        self.model.set_attn_implementation(peer.attention)
        return peer

    @torch.inference_mode()
    def forward(self, tokens: Tensor, peer: Peer) -> Tensor:
        return self.model.model(tokens.to(self.device), past_key_values=peer.cache, use_cache=True).last_hidden_state

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden.to(self.device).float() @ self.head.T

    def run(self, tokens: Tensor, prefix: int, method: Method, seen: Callable[[int, Tensor, Peer], None]) -> None:
        """Prefix at once, the rest by chunks; `seen(first column of the chunk, hidden, peer)` after each chunk."""
        peer = self.peer(method)
        self.forward(tokens[:, :prefix], peer)
        for start in range(prefix, tokens.shape[1], STEP):
            seen(start - prefix, self.forward(tokens[:, start : start + STEP], peer), peer)

    def reference(self, windows: Windows) -> Reference:
        """The 16-bit run the others are compared with."""
        hidden: list[Tensor] = []
        attention: list[list[Tensor]] = []
        for index, part in enumerate(self.batches(len(windows.tokens), windows.tokens.shape[1])):
            chunks: list[Tensor] = []
            with self.attention_outputs(index == 0) as outputs:
                self.run(windows.tokens[part], windows.prefix, SIXTEEN, lambda _s, h, _p, to=chunks: to.append(h.cpu()))
            if index == 0:
                attention = per_chunk(outputs, len(chunks))
            hidden.append(torch.cat(chunks, 1))
        whole = torch.cat(hidden)
        if not whole.isfinite().all():
            raise ValueError("the 16-bit run has numbers that are not finite; take another --dtype")
        return Reference(whole, attention)

    def windows(self, windows: Windows, method: Method, reference: Reference) -> dict[str, Any]:
        """kl, top1 and nll [N] of every window, kl by chunk, bits for each KV element, attention error by layer."""
        kl, top1, nll, bits, errors = [], [], [], [], []
        for index, part in enumerate(self.batches(len(windows.tokens), windows.tokens.shape[1])):
            tokens = windows.tokens[part]
            found: list[tuple[Tensor, Tensor, Tensor]] = []

            def seen(start: int, hidden: Tensor, peer: Peer, part=part, tokens=tokens, found=found) -> None:
                exact = reference.hidden[part, start : start + hidden.shape[1]]
                target = tokens[:, windows.prefix + start + 1 : windows.prefix + start + 1 + hidden.shape[1]]
                found.append(self.compare(hidden, exact, target))
                if start // STEP % BYTES_READ_EVERY == 0:
                    bits.append(peer.bits_per_element(len(tokens)))

            with self.attention_outputs(index == 0) as outputs:
                self.run(tokens, windows.prefix, method, seen)
            if index == 0:
                errors = attention_error(per_chunk(outputs, len(found)), reference.attention)
            for total, column in ((kl, 0), (top1, 1), (nll, 2)):
                total.append(torch.cat([row[column] for row in found], 1).cpu())
        kl_NT = torch.cat(kl)
        by_chunk = [part.mean().item() for part in kl_NT.split(STEP, 1)]
        return {
            "kl": kl_NT.mean(1).tolist(), "top1": torch.cat(top1).float().mean(1).tolist(),
            "nll": torch.cat(nll).nanmean(1).tolist(), "kl_by_chunk": by_chunk, "bits": sum(bits) / len(bits),
            "attention_error": errors,
        }  # fmt: skip

    def compare(self, hidden: Tensor, exact: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """KL(exact || method), equality of the argmax, nats of the target (NaN past the end); all [rows, T]."""
        log_q = self.logits(hidden).log_softmax(-1)
        log_p = self.logits(exact).log_softmax(-1)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)
        nats = torch.full_like(kl, torch.nan)
        known = target.shape[1]
        nats[:, :known] = -log_q[:, :known].gather(-1, target.to(self.device)[..., None])[..., 0]
        return kl, log_p.argmax(-1) == log_q.argmax(-1), nats

    def retrieval(self, cell: Cell, method: Method, *, inside: bool) -> dict[str, Any]:
        """exact [N] and digit [N]; `inside` compresses the question too and scores from the second answer token on."""
        exact, digit, bits = [], [], []
        context, question, answer = cell.context, cell.question, cell.answer
        if inside:  # the first answer token comes from the exact prefill
            context, question, answer = torch.cat([context, question], 1), answer[:, :1], answer[:, 1:]
        rest = torch.cat([question, answer], 1)
        for part in self.short_batches(len(context), context.shape[1] + rest.shape[1]):
            right: list[Tensor] = []

            def seen(start: int, hidden: Tensor, peer: Peer, part=part, right=right) -> None:
                first = question.shape[1] - 1  # column of the rest that predicts the first scored token
                columns = [c for c in range(start, start + hidden.shape[1]) if first <= c < rest.shape[1] - 1]
                if columns:
                    guess = self.logits(hidden[:, columns[0] - start : columns[-1] - start + 1]).argmax(-1).cpu()
                    right.append(guess == rest[part, columns[0] + 1 : columns[-1] + 2])
                bits.append(peer.bits_per_element(len(hidden)))

            self.run(torch.cat([context, rest], 1)[part], context.shape[1], method, seen)
            hits = torch.cat(right, 1)
            exact += hits.all(1).float().tolist()
            digit += hits.float().mean(1).tolist()
        return {"exact": exact, "digit": digit, "bits": sum(bits) / len(bits)}

    @torch.inference_mode()
    def rollout(self, prompts: Tensor, count: int) -> Tensor:
        """Greedy continuation of the 16-bit model: [N, prompt + count]."""
        self.peer(SIXTEEN)
        peer = make_peer("dynamic", self.model.config)
        return self.model.generate(
            prompts.to(self.device), past_key_values=peer.cache, do_sample=False, max_new_tokens=count,
            min_new_tokens=count, pad_token_id=0, attention_mask=torch.ones_like(prompts).to(self.device),
        ).cpu()  # fmt: skip

    @contextmanager
    def attention_outputs(self, wanted: bool) -> Iterator[list[Tensor]]:
        """Collects what enters every attention layer's output projection: one tensor per layer and forward."""
        outputs: list[Tensor] = []
        hooks = []
        if wanted:
            for layer in self.model.model.layers:
                keep = lambda _module, inputs: outputs.append(inputs[0].detach().float().cpu())  # noqa: E731
                hooks.append(layer.self_attn.o_proj.register_forward_pre_hook(keep))
        try:
            yield outputs
        finally:
            for hook in hooks:
                hook.remove()


def per_chunk(outputs: list[Tensor], chunks: int) -> list[list[Tensor]]:
    """Split a flat list into forwards, the prefix's forward left out (it attends exactly)."""
    layers = len(outputs) // (chunks + 1)
    return [outputs[layers * (i + 1) : layers * (i + 2)] for i in range(chunks)]


def attention_error(found: list[list[Tensor]], exact: list[list[Tensor]]) -> list[float]:
    """Relative root mean square error of every layer's attention output along the run, errors of lower layers included."""
    errors = []
    for layer in range(len(exact[0])):
        gap = sum((f[layer] - e[layer]).square().sum().item() for f, e in zip(found, exact))
        errors.append((gap / sum(e[layer].square().sum().item() for e in exact)) ** 0.5)
    return errors
