"""The pilot that chose the mixing weight of the preset `default`, on the real code path (thoughts/): how fast a tiny model whose
worked texts hold the skill learns to think, by initial mixing weight, head, START and seed.

    python benchmarks/thoughts_pilot.py --out results/thoughts_pilot.json      # paper head, random START: about 15 minutes on a core
    python benchmarks/thoughts_pilot.py --seeds 0 1 2 --weights 0 .1 .3 .5 --heads paper bounded --starts random near \
        --budget-seconds 3600 --out results/thoughts_pilot.json                # everything; goes on where the file ends
    python benchmarks/thoughts_pilot.py --tiny                                 # seconds; the numbers mean nothing

Text: "x p1 .. p5 = y", the state y after five of six fixed permutations of eight states (chance .125); worked: the five states on
the way between STEP and "=". A base of 0.1 M parameters reads both kinds, then all its weights and the thoughts train on direct text:
one anchor ("="), T = 5, S = 4. START and END begin as noise of an embedding's size (random), or START as STEP's embedding and as much
noise, END as that of "=" (near). An arm ends when 99 % of 1,000 other questions are right after a greedy thought, or after --steps.

The committed table of docs/log.md (2026-11-26) came from an earlier script that was not kept: this one follows its description,
so single numbers may differ. It draws every base, START and question from the seed alone.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measure import START as BEGUN
from measure import about, say, write
from quietgoose.thoughts import stats
from quietgoose.thoughts.anchors import choose_anchors, term_counts
from quietgoose.thoughts.branch import language_head, look_ahead
from quietgoose.thoughts.config import ThoughtConfig, preset
from quietgoose.thoughts.gradient import Stream, thought_loss
from quietgoose.thoughts.parameters import ThoughtParameters
from quietgoose.thoughts.policy import ModelPolicy
from quietgoose.thoughts.prefix import run_prefix
from quietgoose.thoughts.rollout import rollout
from quietgoose.train.types import Batch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

STATES, NAMES, K = 8, 6, 5
BEGIN, EQUALS, STEP, VOCABULARY = STATES + NAMES, STATES + NAMES + 1, STATES + NAMES + 2, STATES + NAMES + 3
ROWS, TESTED, RIGHT = 64, 1000, 0.99
WARMUP = 50


@dataclass(frozen=True)
class Sizes:
    """How much is done: of the base's reading, of an arm at most, between two looks."""

    base_steps: int = 1500
    steps: int = 300
    look_every: int = 25


@dataclass(frozen=True)
class Arm:
    """One cell of the table."""

    seed: int
    head: str
    start: str
    weight: float

    @property
    def name(self) -> str:
        return f"seed {self.seed}, {self.head} head, {self.start} START, w0 = {self.weight:g}"


class Questions:
    """Questions of a seed's permutations."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        draw = torch.Generator().manual_seed(1234 + seed)
        self.images_PX = torch.stack([torch.randperm(STATES, generator=draw) for _ in range(NAMES)])

    def drawn(self, count: int, number: int) -> tuple[Tensor, Tensor]:
        """(prompt up to and with "=", int64 [count, K + 3]; the states on the way [count, K])."""
        draw = torch.Generator().manual_seed(7919 * number + self.seed)
        state_B = torch.randint(0, STATES, (count,), generator=draw)
        names_BK = torch.randint(0, NAMES, (count, K), generator=draw)
        prompt = [
            torch.full_like(state_B, BEGIN),
            state_B,
            *(names_BK + STATES).unbind(1),
            torch.full_like(state_B, EQUALS),
        ]
        on_the_way = []
        for name_B in names_BK.unbind(1):
            state_B = self.images_PX[name_B, state_B]
            on_the_way.append(state_B)
        return torch.stack(prompt, 1), torch.stack(on_the_way, 1)

    def rows(self, count: int, number: int) -> Batch:
        """Direct text; the answer has the only label."""
        prompt_BL, states_BK = self.drawn(count, number)
        tokens = torch.cat([prompt_BL, states_BK[:, -1:]], 1)
        labels = torch.full_like(tokens, -100)
        labels[:, -2] = tokens[:, -1]
        position = torch.arange(tokens.shape[1]).expand_as(tokens).clone()
        segment, ids = torch.ones_like(tokens, dtype=torch.int32), torch.arange(count) + count * number
        return Batch(tokens, labels, position, segment, torch.zeros(count, dtype=torch.int64), row_B=ids)


def base_model(questions: Questions, steps: int) -> LlamaForCausalLM:
    """A model that has read direct and worked texts."""
    torch.manual_seed(questions.seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=64, initializer_range=0.05, tie_word_embeddings=True, pad_token_id=0,
        bos_token_id=BEGIN, eos_token_id=EQUALS,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    for step in range(steps):
        share = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps))
        _set_rate(optimizer, 2e-3 * min(1.0, (step + 1) / 200) * share)
        prompt_BL, states_BK = questions.drawn(ROWS, step)
        mark = torch.tensor([[STEP], [EQUALS]]).expand(2, ROWS)[..., None]
        answer = states_BK[:, -1:]
        worked = torch.cat([prompt_BL, mark[0], states_BK, mark[1], answer], 1)
        loss = _loss(model, torch.cat([prompt_BL, answer], 1), prompt_BL.shape[1])
        _step(model, optimizer, loss + _loss(model, worked, prompt_BL.shape[1] + 1))
    return model.eval()


def _loss(model: Any, tokens_BL: Tensor, first: int) -> Tensor:
    """Mean -log p of the tokens from `first` on."""
    logits = model(tokens_BL[:, :-1]).logits[:, first - 1 :]
    return functional.cross_entropy(logits.flatten(0, 1), tokens_BL[:, first:].flatten())


def _step(model: Any, optimizer: torch.optim.Optimizer, loss: Tensor, more: Any = ()) -> None:
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_([*model.parameters(), *more], 1.0)
    optimizer.step()


def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("factor", 1.0)


def parameters_of(model: LlamaForCausalLM, config: ThoughtConfig, arm: Arm) -> ThoughtParameters:
    """START and END as the arm has them begin."""
    table = model.get_input_embeddings().weight.detach()
    draw = torch.Generator().manual_seed(99 + arm.seed)
    noise_2D = torch.randn(2, table.shape[1], generator=draw) * table.std()
    if arm.start == "random":
        return ThoughtParameters(noise_2D[0], noise_2D[1], config, arm.seed)
    noise_D = noise_2D[0] * table[STEP].norm() / noise_2D[0].norm()
    return ThoughtParameters(table[STEP] + noise_D, table[EQUALS], config, arm.seed)


@torch.no_grad()
def look(policy: ModelPolicy, questions: Questions, config: ThoughtConfig, tested: int) -> dict[str, float]:
    """Shares that are right with a greedy thought and without, and of thought tokens that are the states on the way."""
    rows, (_, states_BK) = questions.rows(tested, 10**6), questions.drawn(tested, 10**6)
    tensors, prefix = policy.tensors(), run_prefix(policy.model, rows)
    anchors = choose_anchors(config, rows, seed=0, step=0)
    thoughts = rollout(policy, tensors, prefix, rows, anchors, config, greedy=True).first_sample()
    ahead = look_ahead(policy.model, tensors.thought, prefix, rows, thoughts, 1)
    head = language_head(policy.model)
    mixed, base = (head(h).argmax(-1) for h in (ahead.mixed_BASJD[:, 0, 0, 0], ahead.base_BAJD[:, 0, 0]))
    found = {
        "right": mixed == states_BK[:, -1],
        "without": base == states_BK[:, -1],
        "steps": thoughts.tokens_BAST[:, 0, 0] == states_BK,
    }
    return {name: round(value.float().mean().item(), 4) for name, value in found.items()}


def train(arm: Arm, base: LlamaForCausalLM, questions: Questions, sizes: Sizes, tested: int) -> dict[str, Any]:
    """One arm: its looks, and the first step with RIGHT of them right (None: never)."""
    config = preset(
        "default", tokens=K, lookahead=1, samples=4, limit=1, head=arm.head, initial_weight=arm.weight, banned=(BEGIN,)
    )
    model = LlamaForCausalLM(base.config).eval()
    model.load_state_dict(base.state_dict())
    policy = ModelPolicy(model, parameters_of(model, config, arm))
    meta, head = [policy.parameters.meta_2D], [p for n, p in policy.parameters.named_parameters() if n != "meta_2D"]
    groups = [{"params": [*model.parameters(), *meta]}, {"params": head, "factor": 3.0}]
    optimizer = torch.optim.AdamW(groups, lr=3e-4, weight_decay=0.0)
    looks = [{"step": 0, **look(policy, questions, config, tested)}]
    for step in range(sizes.steps):
        _set_rate(optimizer, 3e-4 * min(1.0, (step + 1) / WARMUP))
        rows = questions.rows(ROWS, 10**4 + step)
        counts = term_counts(config, rows, seed=arm.seed, step=step, row_ids=rows.row_B)
        weights_M = (torch.tensor(config.coefficients()) / counts.clamp_min(1)).float()
        loss = thought_loss(policy, rows, config, weights_M, Stream(arm.seed, step, rows.row_B))
        _step(model, optimizer, loss.total, policy.parameters.parameters())
        if (step + 1) % sizes.look_every == 0:
            weight = stats.summarise(loss.stats)["mixing_weight"]
            looks.append({"step": step + 1, **look(policy, questions, config, tested), "weight": round(weight, 4)})
            if looks[-1]["right"] >= RIGHT:
                break
    reached = looks[-1]["step"] if looks[-1]["right"] >= RIGHT else None
    return {**vars(arm), "reached": reached, "looks": looks}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: the step of 99 % for every seed, by head, START and weight."""
    weights = sorted({row["weight"] for row in rows})
    lines = ["| head, START | " + " | ".join(f"{w:g}" for w in weights) + " |", "|---" * (len(weights) + 1) + "|"]
    for head, start in dict.fromkeys((row["head"], row["start"]) for row in rows):
        cells = []
        for weight in weights:
            own = [row for row in rows if (row["head"], row["start"], row["weight"]) == (head, start, weight)]
            own.sort(key=lambda row: row["seed"])
            cells.append(" / ".join("-" if row["reached"] is None else str(row["reached"]) for row in own))
        lines.append(f"| {head}, {start} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def arms_of(options: argparse.Namespace) -> list[Arm]:
    """All arms, seed by seed, so that a spent budget leaves whole seeds."""
    return [
        Arm(seed, head, start, weight)
        for seed in options.seeds
        for start in options.starts
        for head in options.heads
        for weight in options.weights
        if head != "bounded" or 0 < weight < 1
    ]


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--weights", type=float, nargs="+", default=[0.0, 0.1, 0.3, 0.5])
    parser.add_argument("--heads", nargs="+", choices=["paper", "bounded"], default=["paper"])
    parser.add_argument("--starts", nargs="+", choices=["random", "near"], default=["random"])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--budget-seconds", type=float, default=1800.0, help="no arm begins after so long")
    parser.add_argument("--tiny", action="store_true", help="a few steps of everything: does it run")
    parser.add_argument("--out", type=Path, default=Path("thoughts_pilot.json"))
    options = parser.parse_args()
    sizes = Sizes(6, 4, 2) if options.tiny else Sizes(steps=options.steps)
    torch.set_num_threads(1)
    report: dict[str, Any] = {**about(torch.device("cpu")), "sizes": vars(sizes), "rows": []}
    if options.out.is_file():
        before = json.loads(options.out.read_text())
        report["rows"] = before["rows"] if before.get("sizes") == vars(sizes) else []
    done = {(r["seed"], r["head"], r["start"], r["weight"]) for r in report["rows"]}
    base: tuple[int, LlamaForCausalLM] | None = None
    for arm in arms_of(options):
        if (arm.seed, arm.head, arm.start, arm.weight) in done:
            continue
        if time.perf_counter() - BEGUN > options.budget_seconds:
            say(f"the budget is spent before {arm.name}")
            break
        questions = Questions(arm.seed)
        if base is None or base[0] != arm.seed:
            base = (arm.seed, base_model(questions, sizes.base_steps))
            say(f"base {arm.seed}: {base[1].num_parameters():,} parameters")
        found = train(arm, base[1], questions, sizes, 50 if options.tiny else TESTED)
        report["rows"].append(found)
        write(report, options.out)
        say(f"{arm.name}: {found['reached'] or 'not reached'}; {found['looks'][-1]}")
    print(table(report["rows"]) if report["rows"] else "nothing ran")


if __name__ == "__main__":
    main()
