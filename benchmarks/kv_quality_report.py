"""Statistics, Markdown tables and the picture of kv_quality.py. All three come from its JSON alone.

Intervals are paired bootstrap intervals over windows or samples (evaluation/intervals.py). "At equal bytes" compares a
method with a rival family on the line through that family's own points (log KL linear in bits), at the method's bits;
outside the family's range with its nearest point, and says so. Below 1 the method is better.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any
from xml.sax.saxutils import escape

import numpy as np
from quietgoose.evaluation.intervals import Interval, interval, macro, mean_draws, paired_difference, resamples

TIMES = 2000
RIVALS = {"KIVI": ("KIVI-4 R32", "KIVI-2 R32", "KIVI K4V2 R32", "KIVI-4 R128", "KIVI-4 R256"),
          "HF quanto": ("HF quanto-4", "HF quanto-2"), "HF hqq": ("HF hqq-4", "HF hqq-2")}  # fmt: skip
COLOURS = {"zipcache": "#7aa6d8", "preset": "#0b4f9e", "control": "#9a9a9a", "kivi R32": "#c2410c", "kivi R128": "#f59e0b",
           "HF quanto": "#15803d", "HF hqq": "#65a30d", "HF fp8": "#4d7c0f", "h2o": "#7e22ce", "mikv": "#be185d"}  # fmt: skip
LOWEST_KL = 1e-7


def values(result: dict[str, Any], *path: str) -> np.ndarray | None:
    """Per-item numbers of a method [N], averaged over seeds; None if that stage did not run."""
    found: Any = result
    for name in path[:-1]:
        found = found.get(name) if isinstance(found, dict) else None
        if not found:
            return None
    runs = found if isinstance(found, list) else [found]
    return np.mean([run[path[-1]] for run in runs], 0)


def bits_of(result: dict[str, Any]) -> float:
    return float(np.mean([run["bits"] for run in result["text"]]))


def statistics(data: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Method -> means with intervals; `at_equal_bytes` maps a rival to the ratio of KLs and where it was taken."""
    methods = {name: result for name, result in data["methods"].items() if result.get("text")}
    if not methods:
        return {}
    count = len(next(iter(methods.values()))["text"][0]["kl"])
    draws = resamples(count, TIMES, 0, "windows")
    kl = {name: values(result, "text", "kl") for name, result in methods.items()}
    out: dict[str, dict[str, Any]] = {}
    for name, result in methods.items():
        top1 = values(result, "text", "top1")
        out[name] = {
            "bits": bits_of(result), "kl": vars(interval(kl[name].mean(), mean_draws(kl[name], draws))),
            "top1": vars(interval(top1.mean(), mean_draws(top1, draws))), "seeds": len(result["text"]),
            "kl_of_seeds": [float(np.mean(run["kl"])) for run in result["text"]],
            "at_equal_bytes": {}, "kl_median": float(np.median(kl[name])),
        }  # fmt: skip
    for name in methods:
        for rival, members in RIVALS.items():
            points = sorted((out[m]["bits"], m) for m in members if m in out)
            if points and name not in members:
                out[name]["at_equal_bytes"][rival] = _against(kl, name, out[name]["bits"], points, draws)
    for control in ("zip 60 % random",):
        for name in (n for n in methods if control in methods and n.startswith("zip 60 %") and n != control):
            out[name]["kl_minus_random"] = vars(paired_difference(kl[name], kl[control], draws))
    return out


def _against(
    kl: dict[str, Any], name: str, bits: float, points: list[tuple[float, str]], draws: np.ndarray
) -> dict[str, Any]:
    """KL of a method over the rival family's KL at the same bits."""
    below = [point for point in points if point[0] <= bits]
    above = [point for point in points if point[0] > bits]
    if below and above:
        (low, first), (high, second), where = below[-1], above[0], "between"
        share = (bits - low) / (high - low)
    else:
        (_, first), share = (below[-1] if below else above[0]), 0.0
        second, where = first, "rival uses fewer bits" if below else "rival uses more bits"

    def line(mean: Any) -> Any:
        one, two = np.maximum(mean(kl[first]), LOWEST_KL), np.maximum(mean(kl[second]), LOWEST_KL)
        return np.exp((1 - share) * np.log(one) + share * np.log(two))

    ratio = kl[name].mean() / line(np.mean)
    found = interval(float(ratio), mean_draws(kl[name], draws) / line(lambda x: mean_draws(x, draws)))
    return {**vars(found), "where": where, "rivals": [first, second]}


def markdown(data: dict[str, Any]) -> str:
    """Tables: text, equal bytes, retrieval, drift, and what failed."""
    found = statistics(data)
    lines = [f"# Quality of KV caches, {data['meta']['model']}", "", _about(data["meta"]), ""]
    if found:
        lines += [
            "| method | bits | KL to 16 bit | median KL | top-1 | ÷ KIVI | ÷ quanto | ÷ hqq |",
            "|-|-|-|-|-|-|-|-|",
        ]
        for name, row in sorted(found.items(), key=lambda item: item[1]["bits"]):
            ratios = [_ratio(row["at_equal_bytes"].get(rival)) for rival in RIVALS]
            figures = [_span(row["kl"], 4), f"{row['kl_median']:.4f}", _span(row["top1"], 3)]
            cells = [name, f"{row['bits']:.2f}", *figures, *ratios]
            lines.append("| " + " | ".join(cells) + " |")
        lines += [
            "",
            "÷: KL over the rival's at equal bytes, below 1 is better; < the rival uses fewer bits there, > more.",
        ]
        gaps = [(name, row["kl_minus_random"]) for name, row in found.items() if "kl_minus_random" in row]
        lines += ["", *(f"KL of {name} minus random's: {_span(gap, 4)}" for name, gap in gaps)]
    lines += _retrieval(data) + _drift(data)
    errors = [(name, error) for name, result in data["methods"].items() for error in result.get("errors", [])]
    if errors:
        lines += ["", "## Not measured", "", *(f"- {name}: {error}" for name, error in errors)]
    return "\n".join(lines) + "\n"


def _about(meta: dict[str, Any]) -> str:
    return (
        f"{meta['windows']} windows of {meta['prefix']} + {meta['continuation']} tokens, {meta['samples']} samples a retrieval "
        f"cell; {meta['dtype']} on {meta['device']}, torch {meta['torch']}, transformers {meta['transformers']}. {meta['note']} "
        "Bits are all bytes (codes, parameters, index, scores, 16-bit tokens) for each cached number, averaged over the "
        "continuation. Brackets are 95 % intervals."
    )


def _retrieval(data: dict[str, Any]) -> list[str]:
    cells = sorted({cell for result in data["methods"].values() for cell in result.get("retrieval", {})})
    cells.sort(key=lambda cell: data["meta"]["cells"].index(cell))
    if not cells:
        return []
    lines = [
        "",
        "## Retrieval: exact match / digits right, bits",
        "",
        "| method | all short | " + " | ".join(cells) + " |",
    ]
    lines.append("|-" * (len(cells) + 2) + "|")
    base = data["methods"].get("16 bit", {})
    for name, result in data["methods"].items():
        row = [_all_short(result, base, cells)]
        for cell in cells:
            exact, digit = values(result, "retrieval", cell, "exact"), values(result, "retrieval", cell, "digit")
            if exact is None or digit is None:
                row.append("")
                continue
            text = f"{exact.mean():.2f} / {digit.mean():.2f}, {np.mean([r['bits'] for r in result['retrieval'][cell]]):.1f} b"
            plain = values(base, "retrieval", cell, "digit")
            if plain is not None and name != "16 bit" and len(plain) == len(digit):
                gap = paired_difference(digit, plain, resamples(len(digit), TIMES, 0, cell))
                text += f" ({100 * gap.value:+.1f} [{100 * gap.low:+.1f}, {100 * gap.high:+.1f}])"
            row.append(text)
        if any(row):
            lines.append(f"| {name} | " + " | ".join(row) + " |")
    about = "In parentheses: digits right minus 16 bit's, in points. All short: exact match minus 16 bit's, codes and lines."
    return [*lines, "", about]


def _all_short(result: dict[str, Any], base: dict[str, Any], cells: list[str]) -> str:
    """Mean over the short cells of exact match minus 16 bit's; cells are resampled one by one."""
    gaps, draws = [], []
    for cell in cells:
        mine, plain = values(result, "retrieval", cell, "exact"), values(base, "retrieval", cell, "exact")
        if not cell.startswith("passkey") and mine is not None and plain is not None and len(mine) == len(plain):
            gaps.append(100 * float((mine - plain).mean()))
            draws.append(100 * mean_draws(mine - plain, resamples(len(mine), TIMES, 0, cell)))
    return _span(macro(gaps, draws), 1) if gaps and result is not base else ""


def _drift(data: dict[str, Any]) -> list[str]:
    rows = [(name, result["drift"]) for name, result in data["methods"].items() if result.get("drift")]
    if not rows:
        return []
    lines = [
        "",
        "## Drift along greedy rollouts of the 16-bit model: KL by quarter",
        "",
        "| method | 1 | 2 | 3 | 4 | 4th ÷ 1st |",
    ]
    lines.append("|-|-|-|-|-|-|")
    for name, runs in rows:
        quarters = [part.mean() for part in np.array_split(np.mean([run["kl_by_chunk"] for run in runs], 0), 4)]
        growth = f"{quarters[3] / quarters[0]:.2f}" if quarters[0] > LOWEST_KL else ""
        lines.append(f"| {name} | " + " | ".join(f"{quarter:.5f}" for quarter in quarters) + f" | {growth} |")
    return lines


def _span(found: dict[str, float] | Interval, digits: int) -> str:
    row = vars(found) if isinstance(found, Interval) else found
    return f"{row['value']:.{digits}f} [{row['low']:.{digits}f}, {row['high']:.{digits}f}]"


def _ratio(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    sign = {"between": "", "rival uses fewer bits": " <", "rival uses more bits": " >"}[row["where"]]
    return _span(row, 2) + sign


def places(points: dict[str, tuple[float, float]], named: Sequence[str]) -> dict[str, tuple[float, float, str]]:
    """Where each name is written (x, y of its base line, anchor): beside its point, the first place of several that covers no other
    point and no name before it; if none does, the first."""
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in points.values()]
    found = {}
    for name in sorted(named, key=lambda name: points[name][1]):
        (x, y), wide = points[name], 5.6 * len(name)
        choices = [
            (x + 8 * side, y + 4 + shift, "start" if side > 0 else "end")
            for shift in (0, -9, 9, -17, 17)
            for side in (1, -1)
        ]
        boxes = [
            (a - wide * (anchor == "end"), b - 9, a + wide * (anchor == "start"), b + 1) for a, b, anchor in choices
        ]
        best = next((i for i, box in enumerate(boxes) if not any(_meet(box, other) for other in taken)), 0)
        found[name] = choices[best]
        taken.append(boxes[best])
    return found


def _meet(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def picture(data: dict[str, Any]) -> str:
    """SVG: KL (logarithmic) against bits for each KV number; presets named, families coloured."""
    found = {name: row for name, row in statistics(data).items() if row["kl"]["value"] > LOWEST_KL and row["bits"] < 8}
    if not found:
        return ""
    width, height, left, right, top, bottom = 860, 560, 80, 190, 30, 60
    low, high = math.floor(min(r["bits"] for r in found.values())), math.ceil(max(r["bits"] for r in found.values()))
    bottom_kl = math.floor(math.log10(min(r["kl"]["value"] for r in found.values())))
    top_kl = math.ceil(math.log10(max(r["kl"]["value"] for r in found.values())))

    def x(bits: float) -> float:
        return left + (bits - low) / max(1, high - low) * (width - left - right)

    def y(kl: float) -> float:
        share = (math.log10(max(kl, 10**bottom_kl)) - bottom_kl) / max(1, top_kl - bottom_kl)
        return height - bottom - share * (height - top - bottom)

    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">',
             f'<rect width="{width}" height="{height}" fill="white"/>']  # fmt: skip
    for bits in range(low, high + 1):
        parts.append(f'<path d="M{x(bits):.1f} {top}V{height - bottom}" stroke="#e5e5e5"/>')
        parts.append(f'<text x="{x(bits):.1f}" y="{height - bottom + 18}" text-anchor="middle">{bits}</text>')
    for power in range(bottom_kl, top_kl + 1):
        parts.append(f'<path d="M{left} {y(10**power):.1f}H{width - right}" stroke="#e5e5e5"/>')
        parts.append(f'<text x="{left - 8}" y="{y(10**power) + 4:.1f}" text-anchor="end">{10**power:g}</text>')
    parts.append(f'<text x="{(left + width - right) / 2}" y="{height - 18}" text-anchor="middle">bits for each KV number, '
                 "everything counted</text>")  # fmt: skip
    parts.append(f'<text transform="translate(20 {(top + height - bottom) / 2}) rotate(-90)" text-anchor="middle">'
                 "KL to 16 bit, nats a token</text>")  # fmt: skip
    seen: dict[str, str] = {}
    for name, row in found.items():
        family = data["methods"][name]["family"]
        colour = seen.setdefault(family, COLOURS.get(family, "#444444"))
        at = f"{x(row['bits']):.1f}"
        bar = f"M{at} {y(row['kl']['low']):.1f}V{y(row['kl']['high']):.1f}"
        parts.append(f'<path d="{bar}" stroke="{colour}" stroke-width="1.5" opacity="0.6"/>')
        size = 6 if family == "preset" else 4
        label = escape(f"{name}: {row['bits']:.2f} bits, KL {row['kl']['value']:.4f}")
        parts.append(
            f'<circle cx="{at}" cy="{y(row["kl"]["value"]):.1f}" r="{size}" fill="{colour}"><title>{label}</title></circle>'
        )
    points = {name: (x(row["bits"]), y(row["kl"]["value"])) for name, row in found.items()}
    named = [name for name in found if data["methods"][name]["family"] != "zipcache"]
    for name, (across, down, anchor) in places(points, named).items():
        parts.append(
            f'<text x="{across:.1f}" y="{down:.1f}" font-size="10" text-anchor="{anchor}">{escape(name)}</text>'
        )
    for i, (family, colour) in enumerate(seen.items()):
        at = top + 18 * i
        parts.append(f'<circle cx="{width - right + 40}" cy="{at}" r="5" fill="{colour}"/>'
                     f'<text x="{width - right + 52}" y="{at + 4}">{escape(family)}</text>')  # fmt: skip
    return "\n".join([*parts, "</svg>"]) + "\n"
