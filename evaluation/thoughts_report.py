"""thoughts.html: what a model thought before every token, and whether it helped.

Text coloured by log-likelihood gain (base minus mixed negative log-likelihood of the true token); pointing at a token, or
moving there by keyboard, shows its sampled thoughts with reward, log-probability and mixing weight. Only data come in, no
model: `launch/generate.py --thoughts-html FILE` and the training's evaluation fill them. How a page is made safe stands in
page.py.

    write_thoughts_report(Path("thoughts.html"), title, [ThoughtTrace(tokens, base_nll, mixed_nll, weight, thoughts)])
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..base.errors import DataError
from ..base.files import write_atomic
from .page import render

FRAGMENT = Path(__file__).with_name("thoughts_report.html")
MAX_BYTES = 6_000_000
SMALLEST_LIMIT = 0.05  # nats: a page of nothing but noise is not blown up to full colour


@dataclass(frozen=True)
class SampledThought:
    """One thought. reward: nats it saved over the scored lookahead; logprob: log-probability of its tokens, summed;
    weight: its mixing weight. NaN where not known."""

    text: str
    reward: float
    logprob: float
    weight: float = math.nan


@dataclass(frozen=True)
class ThoughtTrace:
    """One text, token by token; entry t of every list is about predicting tokens[t], entry t of `thoughts` thought before it.

    base_nll, mixed_nll   nats without and with the thought; NaN or None: not scored (the first token, padding)
    weight                mixing weight; NaN or None: nothing was thought
    new_from              index of the first generated token; None if the text was given
    label                 a heading; by default the text's number
    counted_from          index of the first token the summary counts: the answer's, where only answers are thought about in training
    """

    tokens: Sequence[str]
    base_nll: Sequence[float | None]
    mixed_nll: Sequence[float | None]
    weight: Sequence[float | None]
    thoughts: Sequence[Sequence[SampledThought]]
    new_from: int | None = None
    label: str = ""
    counted_from: int = 0


@dataclass(frozen=True)
class Summary:
    """Means over the scored tokens of all traces; NaN where there is none. Gains and NLL in nats a token."""

    scored: int
    gain: float
    helped: float
    hurt: float
    weight: float
    base_nll: float
    mixed_nll: float


def write_thoughts_report(
    path: Path,
    title: str,
    traces: Sequence[ThoughtTrace],
    *,
    facts: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
) -> Path:
    """Write the page, at most 6 MB: thoughts of the tokens they changed least are left out first, which a note says.

    Raises DataError (DATA-005) for a trace whose lists differ in length or whose `new_from` is no token.
    """
    for number, trace in enumerate(traces, start=1):
        _check(trace, number)
    shown = [_shown(trace) for trace in traces]
    page = {
        "title": title,
        "facts": [[str(key), str(value)] for key, value in (facts or {}).items()],
        "notes": list(notes),
        "summary": vars(summarise(traces)),
        "answers": any(trace.counted_from for trace in traces),
        "limit": colour_limit(traces),
        "traces": shown,
    }
    text = render(FRAGMENT, page)
    order = _least_changed(traces)
    left_out = 0
    while len(text.encode()) > MAX_BYTES and left_out < len(order):
        share = max(1, len(order) // 8)
        for trace, token in order[left_out : left_out + share]:
            shown[trace]["thoughts"][token] = None
        left_out = min(left_out + share, len(order))
        page["notes"] = [
            *notes,
            f"Left out to keep this page small: the thoughts of the {left_out} tokens they changed least.",
        ]
        text = render(FRAGMENT, page)
    write_atomic(path, text)
    return path


def summarise(traces: Sequence[ThoughtTrace]) -> Summary:
    """The summary row: a token counts where it was scored with and without a thought, from its trace's `counted_from` on."""
    counted = np.array([at >= trace.counted_from for trace in traces for at in range(len(trace.tokens))], dtype=bool)
    gain, base, mixed = (
        gains(traces)[counted],
        _joined(traces, "base_nll")[counted],
        _joined(traces, "mixed_nll")[counted],
    )
    scored, weight = np.isfinite(gain), _joined(traces, "weight")[counted]

    def mean(values: np.ndarray) -> float:
        return float(values.mean()) if values.size else math.nan

    return Summary(
        scored=int(scored.sum()),
        gain=mean(gain[scored]),
        helped=mean(gain[scored] > 0),
        hurt=mean(gain[scored] < 0),
        weight=mean(weight[np.isfinite(weight)]),
        base_nll=mean(base[scored]),
        mixed_nll=mean(mixed[scored]),
    )


def gains(traces: Sequence[ThoughtTrace]) -> np.ndarray:
    """float64 [tokens of all traces]: base minus mixed NLL, NaN where a token was not scored."""
    return _joined(traces, "base_nll") - _joined(traces, "mixed_nll")


def colour_limit(traces: Sequence[ThoughtTrace]) -> float:
    """The gain of full colour: the 98th percentile of all sizes, rounded up to 1, 2 or 5 times a power of ten."""
    sizes = np.abs(gains(traces))
    sizes = sizes[np.isfinite(sizes)]
    size = max(float(np.percentile(sizes, 98)) if sizes.size else 0.0, SMALLEST_LIMIT)
    power = 10.0 ** math.floor(math.log10(size))
    return next(round(factor * power, 6) for factor in (1, 2, 5, 10) if factor * power >= size * (1 - 1e-9))


def _joined(traces: Sequence[ThoughtTrace], name: str) -> np.ndarray:
    values = [value for trace in traces for value in getattr(trace, name)]
    return np.array([math.nan if value is None else value for value in values], dtype=np.float64)


def _least_changed(traces: Sequence[ThoughtTrace]) -> list[tuple[int, int]]:
    """(trace, token) of all tokens with thoughts, the smallest change of likelihood first, unscored ones before them."""
    size = np.nan_to_num(np.abs(gains(traces)), nan=-1.0)
    places = [(number, token) for number, trace in enumerate(traces) for token in range(len(trace.tokens))]
    order = [places[index] for index in np.argsort(size, kind="stable").tolist()]
    return [(number, token) for number, token in order if traces[number].thoughts[token]]


def _check(trace: ThoughtTrace, number: int) -> None:
    length = len(trace.tokens)
    for name in ("base_nll", "mixed_nll", "weight", "thoughts"):
        found = len(getattr(trace, name))
        if found != length:
            raise DataError(f"trace {number}: {found} entries in {name}, {length} tokens", code="DATA-005")
    if trace.new_from is not None and not 0 <= trace.new_from <= length:
        raise DataError(f"trace {number}: new_from is {trace.new_from}; allowed are 0 to {length}", code="DATA-005")


def _shown(trace: ThoughtTrace) -> dict[str, Any]:
    """A trace as the page reads it; numbers rounded to what it shows."""

    def column(values: Sequence[float | None]) -> list[float | None]:
        return [_rounded(value) for value in values]

    return {
        "label": trace.label,
        "new_from": trace.new_from,
        "tokens": list(trace.tokens),
        "base": column(trace.base_nll),
        "mixed": column(trace.mixed_nll),
        "weight": column(trace.weight),
        "thoughts": [
            [[t.text, _rounded(t.reward), _rounded(t.logprob), _rounded(t.weight)] for t in sampled]
            for sampled in trace.thoughts
        ],
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else round(float(value), 4)
