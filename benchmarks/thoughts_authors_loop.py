"""The authors' training step, written anew as a loop over an unmodified causal LM: the peer of thoughts/ for speed and memory.

    python benchmarks/thoughts_authors_loop.py          # the gate: losses and all gradients are those of thoughts/

From the description of their program (quiet-star: Zelikman et al. 2024, sections 4.2-4.4): one forward for every branch
position m, in which each position i of the text carries its branch's next token, so that M + 1 forwards run over [B * S, L]
tokens and every one of them keeps its graph:

    rows         repeated S times, prefix pass included; every position is an anchor
    keys         the cache grows by L entries a step through concatenation; the group's heads are expanded for attention
                 and each step's expanded keys and values are retained for the backward pass
    mask         dense, [L, L * (m + 2)]: causal over the text, then a diagonal a step
    steps        START, T sampled tokens, END, J - 1 true tokens: their n_ahead = T + 3 counts START, END and the prefix pass
    logits       of the whole vocabulary at every step, twice: of the branch's hidden state and of the mixed one; those that
                 a loss needs are retained
    embeddings   of a sampled token: its one-hot row times the whole table
    backward     one, through everything

Numbers are kept better than theirs (fp32 losses and rewards, counts by mask, trained START and END): the comparison is of
time and memory. `Fixes` takes single habits away, for benchmarks/thoughts_memory.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from measure import worst
from quietgoose.kernels.linear_loss import token_nll
from quietgoose.kernels.testing import relative_rmse
from quietgoose.thoughts import objective
from quietgoose.thoughts.attention import restore
from quietgoose.thoughts.branch import trains
from quietgoose.thoughts.captured_pass import PassGraphs
from quietgoose.thoughts.captured_prefix import PrefixGraphs
from quietgoose.thoughts.config import ThoughtConfig
from quietgoose.thoughts.gradient import Stream, thought_loss
from quietgoose.thoughts.parameters import ThoughtParameters, ThoughtTensors, mix
from quietgoose.thoughts.policy import ModelPolicy
from quietgoose.thoughts.rollout import RolloutGraphs
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM


@dataclass(frozen=True)
class Fixes:
    """Habits of the loop that are taken away; none is the authors' loop.

    lookup       a sampled token's embedding is looked up
    one_head     logits only where a sample or a loss needs them
    fused_loss   losses in pieces that are computed again in the backward pass: no logits are retained
    """

    lookup: bool = False
    one_head: bool = False
    fused_loss: bool = False


@dataclass(frozen=True)
class Text:
    """Rows of one document each, as thoughts/ takes them."""

    tokens_BT: Tensor

    @property
    def labels_BT(self) -> Tensor:
        return functional.pad(self.tokens_BT[:, 1:], (0, 1), value=-100)

    @property
    def position_BT(self) -> Tensor:
        return torch.arange(self.tokens_BT.shape[1], device=self.tokens_BT.device).expand_as(self.tokens_BT)

    @property
    def segment_BT(self) -> Tensor:
        return torch.ones_like(self.tokens_BT)


@dataclass(frozen=True)
class LoopLoss:
    """Sums of the terms base, mixed, policy with their graph, and the thoughts [B, L, S, T]."""

    sums: Tensor
    tokens_BAST: Tensor


class AuthorsLoop:
    """One training step over rows [B, L] of one document each."""

    def __init__(
        self, model: Any, parameters: ThoughtParameters, config: ThoughtConfig, fixes: Fixes | None = None
    ) -> None:
        self.model, self.parameters, self.config, self.fixes = model, parameters, config, fixes or Fixes()
        self.head, self.table = model.get_output_embeddings(), model.get_input_embeddings()

    def __call__(self, tokens_BL: Tensor, forced_BAST: Tensor | None = None) -> LoopLoss:
        """Thoughts are drawn from torch's own generator, or `forced` on the loop for a comparison."""
        restore(self.model)
        config, S = self.config, self.config.samples
        thought = self.parameters.tensors()
        ids_RL = tokens_BL.repeat_interleave(S, dim=0)
        cache: Any = DynamicCache(config=self.model.config)
        base_RLD = self._forward(self.table(ids_RL), cache, 0)
        base_RL = self._nll(base_RLD[:, :-1], ids_RL[:, 1:])
        steps_RL: list[Tensor] = [] if forced_BAST is None else [
            x.flatten(0, 1) for x in forced_BAST.permute(3, 0, 2, 1)
        ]  # fmt: skip
        logprobs, mixed = [], []
        for m in range(config.branch_length):
            hidden_RLD = self._forward(self._inputs(thought, ids_RL, steps_RL, m), cache, m + 1)
            ahead = max(0, m - config.tokens - 1)
            mixed_RLD = mix(thought, base_RLD.roll(-ahead, dims=1), hidden_RLD)[0].to(hidden_RLD.dtype)
            if m < config.tokens:
                if forced_BAST is None:
                    steps_RL.append(self._sample(hidden_RLD))
                logprobs.append(-self._nll(hidden_RLD, steps_RL[m], config.policy_temperature))
                self._unused_logits(mixed_RLD)
            elif m > config.tokens:
                end = max(0, ids_RL.shape[1] - 1 - ahead)
                nll_RL = self._nll(mixed_RLD[:, :end], ids_RL[:, 1 + ahead :])
                mixed.append(functional.pad(nll_RL, (0, ids_RL.shape[1] - end)))
                self._unused_logits(hidden_RLD)
            else:
                self._unused_logits(hidden_RLD)
                self._unused_logits(mixed_RLD)
        return self._losses(base_RL, torch.stack(mixed, -1), torch.stack(logprobs, -1), torch.stack(steps_RL, -1))

    def _forward(self, embedded_RLD: Tensor, cache: Any, step: int) -> Tensor:
        """Hidden states of all positions at branch step `step` (0: the text itself)."""
        length, device = embedded_RLD.shape[1], embedded_RLD.device
        seen = torch.ones(length, length, dtype=torch.bool, device=device).tril()
        diagonal = torch.eye(length, dtype=torch.bool, device=device)
        seen = torch.cat([seen, *[diagonal] * step], dim=1)
        mask = torch.zeros(seen.shape, dtype=embedded_RLD.dtype, device=device).masked_fill_(~seen, -torch.inf)
        position_1L = torch.arange(length, device=device).unsqueeze(0) + step
        out = self.model.base_model(
            inputs_embeds=embedded_RLD, attention_mask=mask[None, None], position_ids=position_1L,
            past_key_values=cache, use_cache=True,
        )  # fmt: skip
        return out.last_hidden_state

    def _inputs(self, thought: ThoughtTensors, ids_RL: Tensor, steps_RL: list[Tensor], m: int) -> Tensor:
        """Embeddings of branch position m at every text position: START, a sampled token, END, then true tokens."""
        tokens = self.config.tokens
        if m in (0, tokens + 1):
            meta_D = thought.meta_2D[0 if m == 0 else 1].to(self.table.weight.dtype)
            return meta_D.expand(*ids_RL.shape, -1)
        if m > tokens + 1:
            return self.table(ids_RL.roll(-(m - tokens - 1), dims=1))
        if self.fixes.lookup:
            return self.table(steps_RL[m - 1])
        table_VD = self.table.weight
        chosen = torch.zeros(*ids_RL.shape, table_VD.shape[0], dtype=table_VD.dtype, device=ids_RL.device)
        return chosen.scatter_(-1, steps_RL[m - 1].unsqueeze(-1), 1.0) @ table_VD

    @torch.no_grad()
    def _sample(self, hidden_RLD: Tensor) -> Tensor:
        logits = self.head(hidden_RLD).float() / self.config.temperature
        noise = torch.empty_like(logits).exponential_()  # Gumbel: argmax of p / e
        return (logits.softmax(-1) / noise).argmax(-1)

    def _nll(self, hidden_RLD: Tensor, labels_RL: Tensor, temperature: float = 1.0) -> Tensor:
        """-log p of the labels, fp32; the logits are retained unless `fused_loss`."""
        if self.fixes.fused_loss:
            nll, _ = token_nll(
                self.head, hidden_RLD.flatten(0, 1), labels_RL.flatten(), temperature=temperature,
                recompute=trains(self.head), entropy=False,
            )  # fmt: skip
            return nll.view(labels_RL.shape)
        logits = self.head(hidden_RLD).float() / temperature
        return functional.cross_entropy(logits.flatten(0, 1), labels_RL.flatten(), reduction="none").view(
            labels_RL.shape
        )

    def _unused_logits(self, hidden_RLD: Tensor) -> None:
        """The head's second application, which nothing reads."""
        if not self.fixes.one_head:
            self.head(hidden_RLD)

    def _losses(self, base_RL: Tensor, mixed_RLJ: Tensor, logprob_RLT: Tensor, steps_RLT: Tensor) -> LoopLoss:
        """Sums over valid entries; an anchor without any label is not valid."""
        config, S, length = self.config, self.config.samples, mixed_RLJ.shape[1]
        device = base_RL.device

        def by_anchor(x: Tensor) -> Tensor:
            return x.unflatten(0, (-1, S)).transpose(1, 2)

        places_LJ = torch.arange(length, device=device)[:, None] + torch.arange(config.lookahead, device=device)
        valid_LJ = places_LJ < length - 1
        base_RLJ = functional.pad(base_RL.detach(), (0, 1))[:, places_LJ.clamp_max(length - 1)]
        gain_RL = (base_RLJ - mixed_RLJ.detach()).masked_fill(~valid_LJ, 0.0).sum(-1)
        advantage_BAS = objective.advantages(by_anchor(gain_RL), config.advantage)
        loss_BAST = objective.reinforce(by_anchor(logprob_RLT), advantage_BAS)
        policy = loss_BAST.masked_fill(~valid_LJ.any(-1)[:, None, None], 0.0).sum()
        mixed = mixed_RLJ.masked_fill(~valid_LJ, 0.0).sum()
        return LoopLoss(torch.stack([base_RL.sum() / S, mixed, policy]), by_anchor(steps_RLT))


def small_model(layers: int = 2) -> LlamaForCausalLM:
    """A LLaMA with grouped heads for checks on a CPU, fp32."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=61, max_position_embeddings=256, initializer_range=0.2, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def parameters_of(model: Any, config: ThoughtConfig) -> ThoughtParameters:
    """START and END from two rows of the table; the head's last layer is not zero, so that w depends on the states."""
    rows = model.get_input_embeddings().weight
    parameters = ThoughtParameters(rows[5].float(), rows[9].float(), config, seed=0)
    if parameters.kind != "thought":
        torch.nn.init.normal_(parameters.get_parameter("head_4"), std=0.05)
    return parameters.to(rows.device)


def gate(
    model: Any, tokens_BL: Tensor, config: ThoughtConfig, fixes: Fixes | None = None, **options: Any
) -> dict[str, float]:
    """Relative difference of losses and of all gradients between the loop and thoughts/ for the same thoughts. `options` of
    thought_loss."""
    parameters = parameters_of(model, config)
    trained = [*parameters.parameters(), *(p for p in model.parameters() if p.requires_grad)]
    weights = torch.tensor([0.3, 0.2, 0.7, 0.0], device=tokens_BL.device) / tokens_BL.numel()
    ours = thought_loss(
        ModelPolicy(model, parameters), Text(tokens_BL), config, weights, Stream(0, 0), chunk=5, **options
    )
    want = torch.autograd.grad(ours.total, trained, allow_unused=True)
    assert ours.thoughts is not None
    loop = AuthorsLoop(model, parameters, config, fixes)(tokens_BL, ours.thoughts.tokens_BAST)
    total = (weights[:3] * loop.sums).sum()  # the fourth term, distil, the loop has not
    got = torch.autograd.grad(total, trained, allow_unused=True)
    found = {
        name: relative_rmse(loop.sums[i], ours.sums[i]) for i, name in enumerate(("base", "mixed", "policy"))
    } | {"total": relative_rmse(total, ours.total)}  # fmt: skip
    pairs = [(g, w) for g, w in zip(got, want) if g is not None and w is not None]
    found["gradients"] = worst(relative_rmse(g, w) for g, w in pairs)
    found["compared"] = len(pairs)
    return found


GATE_LIMITS = {"base": 1e-5, "mixed": 1e-5, "policy": 1e-4, "total": 1e-4, "gradients": 1e-3}


def is_green(found: dict[str, float]) -> bool:
    """All differences are within what fp32 rounding over M forwards explains."""
    return all(found[name] <= limit for name, limit in GATE_LIMITS.items()) and found["compared"] > 0


def captured_gate(device: torch.device) -> dict[str, float]:
    """The small gate with everything captured, and with layers that run again: the worse of both."""
    plain, again = (small_gate(device, **captures(), recompute=recompute) for recompute in (False, True))
    return {name: max(plain[name], again[name]) for name in plain}


def captures() -> dict[str, Any]:
    """thought_loss's options for everything captured."""
    graphs = RolloutGraphs()
    return {"graphs": graphs, "passes": PassGraphs(graphs.pool), "prefixes": PrefixGraphs()}


def small_gate(device: torch.device, **options: Any) -> dict[str, float]:
    """The gate on a small model in fp32, all parameters trained."""
    config = ThoughtConfig(tokens=3, lookahead=3, samples=2, ratio_cap=None, initial_weight=0.3)
    tokens_BL = torch.randint(61, (2, 17), generator=torch.Generator().manual_seed(1))
    return gate(small_model().to(device), tokens_BL.to(device), config, **options)


def main() -> None:
    found = small_gate(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    print({name: float(f"{value:.2e}") for name, value in found.items()}, "green" if is_green(found) else "RED")
    if not is_green(found):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
