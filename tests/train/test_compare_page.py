"""The comparison's report: tables, a curve for every arm, a grid for every arm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from quietgoose.train.compare import compare
from quietgoose.train.compare_page import write_comparison_report


def entry(shift: float) -> dict[str, Any]:
    points = [
        {
            "step": step,
            "weights": "average",
            "sampler": name,
            "count": 50,
            "scores": {"jfd": jfd + shift, "class_accuracy": 0.5},
        }
        for step, jfd in ((10, 3.0), (20, 2.0))
        for name in (("ode",) if step == 10 else ("ode", "a_guided"))
    ]
    cost = {
        "seconds": 0.5, "once_seconds": 0.0, "teacher_seconds": 0.0, "fill_seconds": 0.0, "pflop": None, "once_pflop": None,
        "images_per_second": 1.0, "features": "", "token_cosine": 0.5,
    }  # fmt: skip
    floors = {"50": {"train": {"jfd": 0.4}, "test": {"jfd": 0.5}}}
    return {
        "judge": {"digest": "j", "accuracy": 0.9, "task": "classes"}, "floors": floors, "points": points,
        "samplers": {"ode": {}, "a_guided": {}}, "steps": 20, "cost": cost,
    }  # fmt: skip


def test_the_page_has_tables_curves_and_grids(tmp_path: Path) -> None:
    found = {"A-0": entry(0.0), "A-1": entry(0.2), "D-0": entry(-1.0), "D-1": entry(-0.8)}
    comparison = compare(found, "D", ["A"])
    comparison["samplers"] = dict(sorted(comparison["samplers"].items()))  # as JSON files bring it
    runs = {run: tmp_path / run for run in found}
    for run, output in runs.items():
        samples = output / "stages" / "evaluate" / "result" / "samples"
        samples.mkdir(parents=True)
        (samples / "00000020_average_ode.png").write_bytes(run.encode())
    page = write_comparison_report(tmp_path, "arms & <more>", comparison, runs, {"hardware": "x"}).read_text()
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    assert [table["title"] for table in data["tables"]] == ["Scores at equal steps", "Differences", "Cost"]
    assert data["tables"][0]["lead"].startswith("D is better than every control")
    assert [row[0] for row in data["tables"][0]["rows"]] == ["floor: train", "floor: test", "A", "D"]
    curve = next(chart for chart in data["scores"] if chart["title"].startswith("JFD, 50 samples"))
    assert curve["lines"][0] == {"name": "A", "steps": [10, 20], "values": [3.1, 2.1]}
    assert curve["lines"][1]["values"] == [2.1, 1.1]
    assert [value for _, value in curve["floors"]] == [0.4, 0.5]
    assert [picture["caption"] for picture in data["pictures"]] == ["A, seed 0, step 20", "D, seed 0, step 20"]
    assert "<more>" not in page
