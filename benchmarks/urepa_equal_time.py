"""A comparison at equal time, with step times measured alone: what JFD the treatment has when another arm is done.

    cd benchmarks/results
    python ../urepa_equal_time.py 2026-11-26_urepa_compare_h100.json 2026-11-26_urepa_throughput_h100.json --shared-by 1 4

A comparison's own seconds say nothing where its runs shared a machine. Here an arm without a teacher takes the plain step of
benchmarks/urepa_throughput.py and every other one the aligned step, features from a table, compiled both; what is paid once (the
teacher's training and its features) and the curves are the comparison's. A run is charged that once-only cost divided by
`--shared-by` runs. Otherwise the rule is that of the `compare` stage: linear between the points of the curve, means over seeds; beyond
the curve its last point. Compilation is left out, and so is what arms with a teacher differ by.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quietgoose.train.compare import equal_cost
from urepa_curves import POINT

PLAIN, ALIGNED = "plain U-Net, compiled", "urepa, compiled, features from a table"


def step_seconds(comparison: Mapping[str, Any], throughput: Mapping[str, Any]) -> dict[str, float]:
    """Arm -> seconds of its training step."""
    ms = {name: float(case["ms"]) for name, case in throughput["cases"].items() if "ms" in case}
    return {
        arm: ms[PLAIN if changed.get("teacher.kind") == "none" else ALIGNED] / 1000
        for arm, changed in comparison["arms"].items()
    }


def runs_of(comparison: Mapping[str, Any], seconds: Mapping[str, float], shared_by: int) -> dict[str, dict[int, Any]]:
    """Arm -> seed -> {"points", "cost"}: the curve of the comparison with the new costs, as the `compare` stage wants them."""
    runs: dict[str, dict[int, Any]] = {}
    for label, by_arm in comparison["scores"].items():
        match = POINT.fullmatch(label)
        if match is None:  # not the average's
            continue
        for arm, seeds in by_arm.items():
            cost = {
                "seconds": seconds[arm], "once_seconds": comparison["costs"][arm]["once_seconds"] / shared_by,
                "pflop": None, "once_pflop": None,
            }  # fmt: skip
            for seed, scores in seeds.items():
                run = runs.setdefault(arm, {}).setdefault(int(seed), {"points": [], "cost": cost})
                point = {"step": int(match[1]), "weights": "average", "sampler": match[2], "count": int(match[3])}
                run["points"].append({**point, "scores": scores})
    return runs


def equal_time(
    comparison: Mapping[str, Any], throughput: Mapping[str, Any], shared_by: int = 1
) -> dict[str, dict[str, float] | None]:
    """Other arm -> its seconds, its last JFD, the treatment's step and JFD at those seconds; null where the treatment's curve does
    not reach back so far."""
    treatment, steps = comparison["treatment"], comparison["steps"]
    seconds = step_seconds(comparison, throughput)
    final = POINT.fullmatch(comparison["final"])
    assert final is not None, comparison["final"]
    curve = (final[2], comparison["equal_count"])
    runs = runs_of(comparison, seconds, shared_by)
    once = comparison["costs"][treatment]["once_seconds"] / shared_by
    found: dict[str, dict[str, float] | None] = {}
    for other, entry in equal_cost(runs, treatment, curve).items():
        if entry["seconds"] is None:
            found[other] = None
            continue
        budget, theirs, mine = entry["seconds"]
        step = min(float(steps), (budget - once) / seconds[treatment])
        found[other] = {"seconds": budget, "jfd": theirs, "treatment_step": step, "treatment_jfd": mine}
    return found


def table(comparison: Mapping[str, Any], throughput: Mapping[str, Any], shared_by: Sequence[int]) -> str:
    """Markdown: an arm a row, a number of runs that share a teacher a column."""
    treatment = comparison["treatment"]
    columns = [equal_time(comparison, throughput, runs) for runs in shared_by]
    heads = [f"{treatment}'s JFD, a teacher for {'one run' if runs == 1 else f'{runs} runs'}" for runs in shared_by]
    lines = [
        f"| {treatment} at the seconds of | its JFD | " + " | ".join(heads) + " |",
        "|---" * (2 + len(heads)) + "|",
    ]
    for arm in sorted(columns[0]):
        rows = [column[arm] for column in columns]
        theirs = next((f"{row['jfd']:.1f}" for row in rows if row is not None), "")
        lines.append(f"| {arm} | {theirs} | " + " | ".join(_cell(row) for row in rows) + " |")
    return "\n".join(lines)


def _cell(row: Mapping[str, float] | None) -> str:
    if row is None:
        return "before its first point"
    return f"{row['treatment_jfd']:.1f} ({row['seconds']:.1f} s, step {row['treatment_step']:,.0f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", type=Path, help="compare.json of a finished comparison")
    parser.add_argument("throughput", type=Path, help="what urepa_throughput.py wrote")
    parser.add_argument("--shared-by", type=int, nargs="+", default=[1], help="runs that share a teacher (default 1)")
    options = parser.parse_args()
    if min(options.shared_by) < 1:
        parser.error("--shared-by: at least one run")
    comparison, throughput = (
        json.loads(p.read_text(encoding="utf-8")) for p in (options.comparison, options.throughput)
    )
    for arm, seconds in sorted(step_seconds(comparison, throughput).items()):
        once = comparison["costs"][arm]["once_seconds"]
        print(f"{arm}: {1000 * seconds:.1f} ms a step, {once:.1f} s once")
    print("\n" + table(comparison, throughput, options.shared_by))


if __name__ == "__main__":
    main()
