"""The thinking side of generate.py: its options, the thoughts as text and as JSON, thoughts.html."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quietgoose.base.errors import RecipeError

if TYPE_CHECKING:
    from quietgoose.evaluation.thoughts_report import ThoughtTrace
    from quietgoose.thoughts.generation import GeneratedThoughts, ThoughtGeneration


@dataclass(frozen=True)
class Thinking:
    """What the options ask for; the same seed for every prompt, so that the page shows what was thought."""

    settings: ThoughtGeneration
    seed: int
    show: bool
    page: Path | None
    traces: list[ThoughtTrace] = field(default_factory=list)

    def fresh(self) -> ThoughtGeneration:
        """The settings with a generator at its start."""
        import torch

        return replace(self.settings, generator=torch.Generator().manual_seed(self.seed))


def thinking_of(
    thoughts: str, think_at: str | None, samples: int, temperature: float, show: bool, page: str | None, seed: int
) -> Thinking | None:
    """None if no option asks for thoughts; any of them does. RecipeError CFG-091, CFG-092 or CFG-095 for bad values."""
    if not re.fullmatch(r"off|trained|[1-9][0-9]{0,5}", thoughts):
        raise RecipeError(
            f"--thoughts {thoughts}: a number of thought tokens from 1, or nothing behind it for as many as were trained",
            code="CFG-095",
        )
    if thoughts == "off" and think_at is None and samples == 1 and temperature == 0 and not show and page is None:
        return None
    from quietgoose.thoughts.generation import ThoughtGeneration

    settings = ThoughtGeneration(
        tokens=int(thoughts) if thoughts.isdigit() else None, think_at=think_at or "every", samples=samples,
        temperature=temperature, return_thoughts=True,
    )  # fmt: skip
    return Thinking(settings, seed, show, None if page is None else Path(page))


def check_thinks(model: Any, path: str) -> None:
    """RecipeError CFG-096 for a model that has no thoughts, CFG-097 for one that was trained as a control without them."""
    state = getattr(model, "thought_state", None)
    if state is None:
        raise RecipeError(
            f"--model {path} carries no thought parameters, so it cannot think: export a run with a `thoughts` stage, or "
            "leave out the options about thoughts",
            code="CFG-096",
        )
    state.check()


def told(tokenizer: Any, new_BN: Any, thoughts: GeneratedThoughts) -> list[list[dict[str, Any]]]:
    """Per continuation and new token {"token", "thoughts": [{"text", "logprob", "weight"}]}, without padding."""
    from quietgoose.evaluation.thoughts_trace import thought_text

    rows = []
    for row, ids in enumerate(new_BN.tolist()):
        row_said = []
        for place, token in enumerate(ids):
            thought = bool(thoughts.thought_BN[row, place])
            if not thought and token == tokenizer.pad_token_id:
                continue
            found = zip(
                thoughts.tokens_BNST[row, place].tolist(),
                thoughts.logprob_BNST[row, place].sum(-1).tolist(),
                thoughts.weight_BNS[row, place].tolist(),
            )
            said = [
                {"text": thought_text(tokenizer, t), "logprob": round(p, 4), "weight": round(w, 4)} for t, p, w in found
            ]
            row_said.append({"token": tokenizer.decode([token]), "thoughts": said if thought else []})
        rows.append(row_said)
    return rows


def print_thoughts(rows: Sequence[Sequence[dict[str, Any]]]) -> None:
    """One line a thought: the token it came before, its mixing weight, what was thought."""
    for number, row in enumerate(rows, 1):
        print(f"--- thoughts{f' of {number}' if len(rows) > 1 else ''}: before which token, mixing weight, thought")
        for entry in row:
            token = _quoted(entry["token"])
            lines = [f"{t['weight']:+.2f}  {_quoted(t['text'])}" for t in entry["thoughts"]] or ["-"]
            for line in lines:
                print(f"{token:>14}  {line}")
                token = ""


def add_traces(
    thinking: Thinking, model: Any, tokenizer: Any, sequences_BL: Any, prompt_length: int, label: str
) -> None:
    """Score every continuation with its prompt, for the page."""
    from quietgoose.evaluation.thoughts_trace import thought_trace

    for row, row_L in enumerate(sequences_BL):
        new = row_L[prompt_length:].tolist()
        end = new.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in new else len(new)
        text = row_L[None, : prompt_length + end]
        heading = label if len(sequences_BL) == 1 else f"{label}, continuation {row + 1}"
        thinking.traces.append(
            thought_trace(model, tokenizer, text, thinking.fresh(), new_from=prompt_length, label=heading, row=row)
        )


def write_page(thinking: Thinking, model: Any, path: str) -> None:
    """thoughts.html of all continuations."""
    from quietgoose.evaluation.thoughts_report import write_thoughts_report

    assert thinking.page is not None
    config = thinking.settings.applied_to(model.thought_state.config)
    greedy = thinking.settings.temperature == 0
    facts = {
        "model": path, "thought tokens": config.tokens, "thoughts a token": config.samples, "lookahead": config.lookahead,
        "thoughts are": "greedy" if greedy else f"drawn at temperature {config.temperature:g}", "seed": thinking.seed,
    }  # fmt: skip
    notes = [
        "Every token is scored with a thought before it, those of the prompt and those that were generated without one too."
    ]
    write_thoughts_report(
        thinking.page, f"Thoughts of {Path(path).resolve().name}", thinking.traces, facts=facts, notes=notes
    )


def _quoted(text: str) -> str:
    """As JSON: whole on one line, and terminal controls spelt out."""
    from quietgoose.evaluation.page import visible

    return json.dumps(visible(text), ensure_ascii=False)
