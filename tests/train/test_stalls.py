"""Who is slow, who hangs: the parts that need no second process."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import pytest
from quietgoose.base.distributed import World
from quietgoose.train import stalls
from quietgoose.train.stalls import HangWitness, SlowRanks, place, verdict, waits

HUNG = {"section": "data of step 4", "seconds": 31.2, "waits": False, "where": "loader.py:7 step"}
WAITS = {"section": "step 4", "seconds": 30.0, "waits": True, "where": "engine.py:9 _agree"}


@pytest.mark.parametrize(
    ("records", "size", "wanted"),
    [
        (
            {0: WAITS, 1: HUNG},
            2,
            "rank 1: no progress for 31 s in: data of step 4 (loader.py:7 step); waiting for it: rank 0 in step 4 "
            "(engine.py:9 _agree)",
        ),
        ({0: WAITS}, 2, "rank 1: gives no sign of life; waiting for it: rank 0 in step 4 (engine.py:9 _agree)"),
        ({0: HUNG}, 1, "rank 0: no progress for 31 s in: data of step 4 (loader.py:7 step)"),
        (
            {0: WAITS, 1: WAITS},
            2,
            "all ranks wait for each other, no progress for 30 s: rank 0 in step 4 (engine.py:9 _agree); rank 1 in step 4 "
            "(engine.py:9 _agree)",
        ),
    ],
)
def test_verdict(records, size: int, wanted: str) -> None:
    assert verdict(records, size) == wanted


def test_alone_a_process_names_itself_and_leaves_nothing_to_the_next_start(tmp_path: Path) -> None:
    witness = HangWitness(tmp_path)
    assert not witness.called()
    said: list[str] = []
    thread = threading.Thread(
        target=lambda: said.append(witness.testify("step 3", 12.0))
    )  # as the watching thread does
    thread.start()
    thread.join()
    assert said[0].startswith("rank 0: no progress for 12 s in: step 3 (test_stalls.py:")
    assert witness.called()
    assert not HangWitness(tmp_path).called()
    assert not witness.folder.exists()


def test_a_disk_that_takes_nothing_does_not_keep_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    witness = HangWitness(tmp_path / "file")
    assert witness.testify("save at step 3", 12.0).startswith("rank 0: no progress for 12 s in: save at step 3")


def test_where_a_thread_waits_for_the_others() -> None:
    """Inside torch.distributed, or where the engine reads what the ranks agree on; not in anything else."""
    here = sys._getframe()
    assert not waits(here)
    assert not waits(None)
    assert place(here).startswith("test_stalls.py:")
    found: dict[str, bool] = {}
    for name, file, function in (
        ("distributed", "/x/torch/distributed/c10d.py", "all_reduce"),
        ("engine", f"{stalls.ROOT}train/engine.py", "_agree"),
        ("backward", f"{stalls.ROOT}train/engine.py", "_backward"),
    ):
        space = {"note": lambda name=name: found.update({name: waits(sys._getframe())})}
        exec(compile(f"def {function}():\n    note()\n{function}()", file, "exec"), space)
    assert found == {"distributed": True, "engine": True, "backward": False}
    assert threading.current_thread() is threading.main_thread()


def feed(slow: SlowRanks, data: list[float], forward: list[float], step: float = 1.0) -> list[str]:
    found = []
    for _ in range(stalls.WINDOW):
        found += slow.look([*data, *forward], step)
    return [f"{one.rank} {one.section}" for one in found]


def test_a_slow_rank_is_named_once_and_again_after_it_recovered() -> None:
    slow = SlowRanks(World(0, 3, 0))
    even = [0.02, 0.02, 0.02]
    assert feed(slow, even, even) == []
    assert feed(slow, even, [0.1, 0.9, 0.1]) == ["1 forward"]
    assert feed(slow, even, [0.1, 0.9, 0.1]) == []
    assert feed(slow, [0.0, 0.0, 0.5], [0.1, 0.9, 0.1]) == ["2 data"]
    assert feed(slow, even, even) == []
    assert feed(slow, even, [0.1, 0.9, 0.1]) == ["1 forward"]


@pytest.mark.parametrize(
    ("data", "step", "why"),
    [([0.01, 0.01, 0.04], 1.0, "four times"), ([0.001, 0.001, 0.05], 1.0, "a twentieth of the step")],
)
def test_what_is_not_worth_a_word(data: list[float], step: float, why: str) -> None:
    assert feed(SlowRanks(World(0, 3, 0)), data, [0.0] * 3, step) == [], why


def test_one_bad_step_makes_no_slow_rank_and_one_rank_is_never_slow() -> None:
    slow = SlowRanks(World(0, 2, 0))
    assert slow.look([0.0, 9.0, 0.0, 0.0], 10.0) == []
    assert feed(slow, [0.1, 0.1], [0.0, 0.0]) == []
    assert feed(SlowRanks(World(0, 1, 0)), [0.9], [0.9]) == []


def test_a_share_holds_own_seconds_only() -> None:
    assert SlowRanks(World(1, 2, 1)).share(0.3, 0.7) == [0.0, 0.3, 0.0, 0.7]
