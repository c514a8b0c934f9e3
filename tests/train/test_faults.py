"""Faults: whatever dies or lies, the newest intact checkpoint continues bit for bit (reliability.md section 2).

Row numbers in names and comments are those of the fault matrix. Ranks are real processes over gloo with real ZeRO.
"""

from __future__ import annotations

import os
import re
import runpy
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from quietgoose.base.errors import SecurityError
from quietgoose.base.files import read_json
from quietgoose.train.checkpoint import FILES, MANIFEST, STATE, verify
from quietgoose.train.stop import read_outcome, request_stop

pytestmark = pytest.mark.distributed
STEPS = 8


def case(run: str, strategy: str = "zero2", **more) -> dict:
    return {"run": run, "strategy": strategy, "steps": STEPS, **more}


def fault(point: str, rank: int, step: int, action: str = "kill", **more) -> dict:
    return {"point": point, "rank": rank, "step": step, "action": action, **more}


@pytest.fixture(scope="module")
def whole(fork_server, tmp_path_factory) -> dict:
    """The uninterrupted runs that all others must equal."""
    helpers = runpy.run_path(str(Path(__file__).with_name("conftest.py")))
    out = tmp_path_factory.mktemp("whole")
    processes = helpers["start_ranks"](fork_server, [case(s, s) for s in ("zero0", "zero1", "zero2", "zero3")], 2, out)
    assert [helpers["_join"](p) for p in processes] == [0, 0]
    return {path.stem: SimpleNamespace(**read_json(path)) for path in out.glob("*.json")}


def continues(whole, result) -> None:
    """The continued run's losses and tensors are the uninterrupted run's, bit for bit."""
    assert result.losses == whole.losses[result.start :]
    assert result.norms == whole.norms[result.start :]
    assert result.sha256 == whole.sha256


def names(out: Path, run: str = "run") -> list[str]:
    return sorted(path.name for path in (out / run / "checkpoints").iterdir())


def test_r1_resume_once_twice_thrice_is_bitwise(ranks, whole) -> None:
    cases = []
    for strategy in ("zero0", "zero1", "zero2", "zero3"):
        cases += [
            case(strategy, strategy, steps=stop, every=100, name=f"{strategy}-{stop}") for stop in (2, 3, 6, STEPS)
        ]
    done = ranks(cases)
    assert done.codes == [0, 0]
    for strategy in ("zero0", "zero1", "zero2", "zero3"):
        assert [done.results[f"{strategy}-{stop}"].start for stop in (2, 3, 6, STEPS)] == [0, 2, 3, 6]
        continues(whole[strategy], done.results[f"{strategy}-{STEPS}"])


KILLS = [
    ("zero2", fault("micro", 1, 4), (3,)),
    ("zero3", fault("micro", 0, 5), (3,)),
    ("zero1", fault("save.before", 1, 6), (3,)),
    ("zero2", fault("save.gathered", 1, 6), (3, 6)),  # rank 0 has all it needs and may be faster
    ("zero3", fault("save.writing", 0, 6), (3,)),
    ("zero2", fault("save.manifest", 0, 6), (3,)),
    ("zero0", fault("save.rename", 0, 6), (3,)),
    ("zero3", fault("save.after", 0, 6), (6,)),
]


def test_r2_r5_r6_kill_and_continue(ranks, whole, tmp_path) -> None:
    """kill -9 inside accumulation and at every point of a save, then the same command again."""
    for index, (strategy, plan, _) in enumerate(KILLS):
        killed = ranks([case(f"run{index}", strategy, plan=[plan])])
        assert killed.codes[plan["rank"]] == -signal.SIGKILL
        assert killed.codes[1 - plan["rank"]] == 7
        assert read_outcome(tmp_path / f"run{index}") == 7
    again = ranks([case(f"run{index}", strategy) for index, (strategy, _, _) in enumerate(KILLS)])
    assert again.codes == [0, 0]
    for index, (strategy, _, starts) in enumerate(KILLS):
        result = again.results[f"run{index}"]
        assert result.start in starts, index
        continues(whole[strategy], result)
        assert names(tmp_path, f"run{index}") == ["step_00000006", "step_00000008"]
        assert read_outcome(tmp_path / f"run{index}") == 0


def damage(folder: Path, kind: str) -> None:
    target = folder / STATE
    if kind.startswith("flip "):
        target = folder / kind.removeprefix("flip ")
        data = bytearray(target.read_bytes())
        data[len(data) * 2 // 3] ^= 0x01
        target.write_bytes(bytes(data))
    elif kind == "truncate":
        os.truncate(target, target.stat().st_size - 7)
    elif kind == "empty":
        os.truncate(target, 0)
    elif kind == "missing":
        target.unlink()
    elif kind == "extra":
        (folder / "stray.bin").write_bytes(b"x")
    elif kind == "link":
        target.rename(folder.parent / "elsewhere")
        target.symlink_to(folder.parent / "elsewhere")


DAMAGES = [*(f"flip {name}" for name in (*FILES, MANIFEST)), "truncate", "empty", "missing", "extra", "link"]


@pytest.fixture
def trained(ranks, tmp_path) -> Path:
    assert ranks([case("run", "zero2")], world=1).codes == [0]
    return tmp_path / "run" / "checkpoints"


def test_r8_r9_damage_is_found_and_the_older_one_continues(ranks, trained, tmp_path) -> None:
    cases = []
    for index, kind in enumerate(DAMAGES):
        shutil.copytree(trained.parent, tmp_path / f"run{index}")
        damage(tmp_path / f"run{index}" / "checkpoints" / "step_00000008", kind)
        cases.append(case(f"run{index}"))
    (tmp_path / "run0" / "checkpoints" / "latest").write_text("step_00000008")
    done = ranks(cases, world=1)
    assert done.codes == [0]
    for index, kind in enumerate(DAMAGES):
        result = done.results[f"run{index}"]
        assert result.start == 6, kind
        event = next(e for e in result.events if e["kind"] == "checkpoint_corrupt")
        assert event["code"] == ("QG-CKPT-003" if kind.startswith("flip") and MANIFEST not in kind else event["code"])
        assert event["code"] in ("QG-CKPT-003", "QG-CKPT-004")
        assert "step_00000008.corrupt" in names(tmp_path, f"run{index}")


def test_r8_explicit_step_and_required_refuse(ranks, trained, tmp_path) -> None:
    damage(trained / "step_00000008", "flip " + STATE)
    done = ranks([case("run", resume_step=8)], world=1)
    assert done.codes == [4]
    assert "QG-CKPT-003" in read_json(tmp_path / "run" / "outcome.json")["message"]
    assert ranks([case("fresh", resume="required")], world=1).codes == [4]
    assert "QG-CKPT-002" in read_json(tmp_path / "fresh" / "outcome.json")["message"]


def test_s1_a_pickle_is_refused_before_anything_is_read(trained, ranks) -> None:
    import pickle

    class Canary:
        def __reduce__(self):
            return (os.system, (f"touch {trained / 'canary'}",))

    (trained / "step_00000008" / STATE).write_bytes(pickle.dumps(Canary()))
    with pytest.raises(SecurityError, match="QG-SEC-001"):
        verify(trained / "step_00000008")
    assert ranks([case("run")], world=1).codes == [4]
    assert not (trained / "canary").exists()


def test_changed_identity_is_refused_unless_allowed(ranks, trained, tmp_path) -> None:
    assert ranks([case("run", recipe="other", steps=9)], world=1).codes == [4]
    assert "recipe was 'r', is 'other'" in read_json(tmp_path / "run" / "outcome.json")["message"]
    allowed = ranks([case("run", recipe="other", steps=9, allow=["recipe"])], world=1)
    assert allowed.codes == [0]
    assert allowed.results["run"].start == 8


def test_state_of_another_model_is_refused(ranks, trained, tmp_path) -> None:
    assert ranks([case("run", steps=9, model="plain")], world=1).codes == [4]
    assert "QG-CKPT-004" in read_json(tmp_path / "run" / "outcome.json")["message"]


def test_retention_and_never(ranks, tmp_path) -> None:
    """The newest `keep` stay; `never` starts anew and moves the old ones away without deleting them."""
    first, second = (
        case("run", every=2, keep=3, name="first"),
        case("run", every=4, resume="never", steps=4, name="second"),
    )
    assert ranks([first], world=1).codes == [0]
    assert names(tmp_path) == ["step_00000004", "step_00000006", "step_00000008"]
    (tmp_path / "run" / "checkpoints" / "step_00000010.tmp-1-2").mkdir()
    done = ranks([second], world=1)
    assert done.results["second"].start == 0
    assert names(tmp_path) == ["step_00000004"]
    (old,) = (tmp_path / "run").glob("checkpoints.old-*")
    assert sorted(path.name for path in old.iterdir()) == ["step_00000004", "step_00000006", "step_00000008"]


def test_r10_a_full_disk_costs_a_save_and_three_end_the_run(ranks, whole, tmp_path) -> None:
    once = [fault("save.writing", 0, 3, "oserror")]
    done = ranks([case("run", plan=once), case("full", file_limit=2000, every=1)])
    assert done.results["run"].code == 0
    assert done.results["run"].sha256 == whole["zero2"].sha256
    assert [e["kind"] for e in done.results["run"].events].count("checkpoint_abandoned") == 1
    assert names(tmp_path) == ["step_00000006", "step_00000008"]
    assert done.codes == [6, 6]
    assert len(done.results["full"].losses) == 3
    assert names(tmp_path, "full") == []


@pytest.mark.parametrize(("first", "second", "world"), [("zero2", "zero3", 1), ("zero3", "zero2", 2)])
def test_r11_other_world_size_and_stage(ranks, whole, first: str, second: str, world: int) -> None:
    assert ranks([case("run", first, steps=4)], world=3 - world).codes == [0] * (3 - world)
    done = ranks([case("run", second)], world=world)
    result = done.results["run"]
    assert result.start == 4
    wanted = [float.fromhex(loss) for _, loss, _ in whole["zero2"].losses[4:]]
    assert [float.fromhex(loss) for _, loss, _ in result.losses] == pytest.approx(wanted, rel=1e-5)


def test_r12_nan_is_skipped_by_all_and_three_in_a_row_end_the_run(ranks, tmp_path) -> None:
    strategies = ("zero0", "zero2", "zero3", "zero2_offload", "zero3_offload")
    once = [fault("loss", 1, 3, "nan")]
    always = [fault("loss", 1, step, "nan") for step in (4, 5, 6)]
    cases = [case(f"once-{s}", s, plan=once) for s in strategies]
    cases += [case(f"always-{s}", s, plan=always) for s in strategies]
    done = ranks(cases)
    assert done.codes == [5, 5]
    for strategy in strategies:
        result = done.results[f"once-{strategy}"]
        assert (result.code, result.applied, result.skipped) == (0, STEPS - 1, 1)
        assert [skipped for _, _, skipped in result.losses] == [step == 3 for step in range(STEPS)]
        reason = next(e["reason"] for e in result.events if e["kind"] == "step_skipped")
        assert reason.startswith("step 3: not finite: rank 1: loss of a")
        stopped = done.results[f"always-{strategy}"]
        assert (stopped.code, stopped.skipped) == (5, 3)
        assert "QG-NUM-001" in read_json(tmp_path / f"always-{strategy}" / "outcome.json")["message"]
    curves = [[float.fromhex(v) for _, v, s in done.results[f"once-{s}"].losses if not s] for s in strategies]
    for curve in curves[1:]:
        assert curve == pytest.approx(curves[0], rel=1e-5)


def test_after_bad_steps_in_a_row_the_newest_checkpoint_continues(ranks, whole, tmp_path) -> None:
    """The run that stopped left its last checkpoint as it was; without the fault it ends as if nothing had been."""
    always = [fault("loss", 1, step, "nan") for step in (4, 5, 6)]
    for _ in range(2):  # the same rows are bad again: it stops again, from the same place
        stopped = ranks([case("run", every=4, plan=always)])
        assert stopped.codes == [5, 5]
        message = read_json(tmp_path / "run" / "outcome.json")["message"]
        assert message.startswith("QG-NUM-001 step 6: not finite: rank 1: loss of a")
        assert "3 bad steps in a row" in message
        assert "The last checkpoint is untouched" in message
        assert names(tmp_path) == ["step_00000004"]
        verify(tmp_path / "run" / "checkpoints" / "step_00000004")
    again = ranks([case("run", every=4)])
    assert again.codes == [0, 0]
    assert again.results["run"].start == 4
    continues(whole["zero2"], again.results["run"])


def test_r16_a_step_without_a_label_is_skipped_by_all(ranks, tmp_path) -> None:
    """It leaves everything as a step that was skipped for another reason does; ten in a row are too many."""
    strategies = ("zero0", "zero2", "zero3")
    cases = [case(f"empty-{s}", s, empty_steps=[3]) for s in strategies]
    cases += [case(f"bad-{s}", s, plan=[fault("loss", 0, 3, "nan")]) for s in strategies]
    cases.append(case("always", empty_steps=list(range(2, 20))) | {"steps": 20, "every": 100})
    done = ranks(cases)
    assert done.codes == [2, 2]
    for strategy in strategies:
        result, wanted = done.results[f"empty-{strategy}"], done.results[f"bad-{strategy}"]
        assert (result.code, result.applied, result.skipped) == (0, STEPS - 1, 1)
        assert [skipped for _, _, skipped in result.losses] == [step == 3 for step in range(STEPS)]
        assert (result.losses[4:], result.sha256) == (wanted.losses[4:], wanted.sha256)
        skipped = next(e for e in result.events if e["kind"] == "step_skipped")
        assert (skipped["code"], skipped["reason"]) == (
            "QG-DATA-004", "step 3: no row of any rank has a label token",
        )  # fmt: skip
    assert len(done.results["always"].losses) == 12
    assert "10 steps in a row; check loss_on" in read_json(tmp_path / "always" / "outcome.json")["message"]


@pytest.mark.parametrize(
    ("strategy", "point", "section"), [("zero2", "micro", "step 4"), ("zero3", "step", "data of step 4")]
)
def test_r14_a_hang_ends_with_7_and_names_the_rank(ranks, tmp_path, strategy: str, point: str, section: str) -> None:
    hung = ranks([case("run", strategy, hang_seconds=2, plan=[fault(point, 1, 4, "hang")])])
    assert hung.codes == [7, 7]
    assert read_outcome(tmp_path / "run") == 7
    message = read_json(tmp_path / "run" / "outcome.json")["message"]
    assert re.match(rf"QG-DIST-003 rank 1: no progress for [2-9] s in: {section} \(faults.py:\d+ point\);", message), (
        message
    )
    assert re.search(r"waiting for it: rank 0 in step 4 \(engine.py:\d+ \w+\)", message), message


def test_r14_a_slow_rank_is_named(ranks) -> None:
    slow = {section: {"rank": 1, "section": section, "seconds": 0.03} for section in ("data", "forward")}
    cases = [case(name, slow=given) for name, given in slow.items()] + [case("even", step_seconds=0.02)]
    done = ranks([one | {"steps": 20, "every": 100} for one in cases])
    assert done.codes == [0, 0]
    for section in slow:
        (event,) = (e for e in done.results[section].events if e["kind"] == "rank_slow")
        assert (event["code"], event["rank"], event["section"], event["step"]) == ("QG-DIST-003", 1, section, 19)
        assert event["seconds"] > max(0.03, 5 * event["others"])
        assert event["reason"].startswith("rank 1 takes 0.0")
    assert not any(e["kind"] == "rank_slow" for e in done.results["even"].events)


def test_r20_out_of_memory_on_one_rank(ranks, tmp_path) -> None:
    done = ranks([case("run", plan=[fault("step", 1, 4, "out_of_memory")])])
    assert done.codes == [7, 8]
    assert read_outcome(tmp_path / "run") == 8
    outcome = read_json(tmp_path / "run" / "outcome.json")
    assert "micro_rows" in outcome["message"]
    assert outcome["step"] == 4, "four steps were taken"


def test_r4_signals_and_stop_file(fork_server, ranks, whole, tmp_path) -> None:
    """A signal in one rank saves and stops all; a stop file too; `now` does not save."""
    plan = [fault("micro", 1, 3, "signal", signal="SIGINT")]
    done = ranks([case("run", plan=plan, every=100)])
    assert done.codes == [75, 75]
    assert names(tmp_path) == ["step_00000004"]
    outcome = read_json(tmp_path / "run" / "outcome.json")
    assert (outcome["state"], outcome["code"], outcome["step"]) == ("stopped", 75, 4)
    continues(whole["zero2"], ranks([case("run")]).results["run"])

    for now, code in ((False, 75), (True, 76)):
        helpers = runpy.run_path(str(Path(__file__).with_name("conftest.py")))
        run = f"file-{code}"
        slow = case(run, steps=5000, every=10_000, step_seconds=0.02)
        processes = helpers["start_ranks"](fork_server, [slow], 2, tmp_path)
        wait_for(lambda run=run: (tmp_path / run / "first_step").exists())
        request_stop(tmp_path / run, now=now)
        assert [helpers["_join"](p) for p in processes] == [code, code]
        assert (tmp_path / run / "checkpoints").exists() is not now


@pytest.mark.parametrize("presses", [1, 2, 3])
def test_r4_repeated_interrupts_across_ranks(fork_server, tmp_path, presses: int) -> None:
    """Ctrl-C reaches all ranks at once: the first saves, any later one stops without saving. The launcher's SIGTERM that follows
    each is no second wish."""
    helpers = runpy.run_path(str(Path(__file__).with_name("conftest.py")))
    slow = case("run", steps=5000, every=10_000, step_seconds=1.5, key_press_seconds=0.1)
    processes = helpers["start_ranks"](fork_server, [slow], 2, tmp_path)
    wait_for(lambda: (tmp_path / "run" / "first_step").exists())
    for _ in range(presses):
        for number in (signal.SIGINT, signal.SIGTERM):
            for process in processes:
                os.kill(process.pid, number)
            time.sleep(0.01)
        time.sleep(0.2)
    code = 75 if presses == 1 else 76
    assert [helpers["_join"](p) for p in processes] == [code, code]
    outcome = read_json(tmp_path / "run" / "outcome.json")
    assert (outcome["state"], outcome["code"]) == ("stopped", code)
    assert outcome["message"].startswith("QG-RUN-001 SIGINT" if presses == 1 else "QG-RUN-002 SIGINT")
    assert (tmp_path / "run" / "checkpoints").exists() is (presses == 1)


def wait_for(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)
