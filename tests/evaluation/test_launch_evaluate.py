"""launch/evaluate.py on a real export of a tiny model: the table, its arms, errors before anything is loaded."""

from __future__ import annotations

import gzip
import json

import pytest
import torch
from quietgoose.launch.evaluate import main
from quietgoose.routing.expert import Expert, ExpertCard, SiteAdapter
from quietgoose.routing.library import ExpertLibrary
from quietgoose.routing.sites import find_sites
from quietgoose.train import mlflow_sink
from quietgoose.train.base_models import load_base
from quietgoose.train.export import Provenance, export_model
from quietgoose.train.recipe import BaseSettings, RouterSettings

from .conftest import KNOWN, UNKNOWN


def some_expert(name: str, seed: int, sites) -> Expert:
    random = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random)

    adapters = {s.name: SiteAdapter(draw(2, s.in_features), 0.05 * draw(s.out_features, 2), 1.0) for s in sites}
    targets = tuple(sorted({site.name.rsplit(".", 1)[-1] for site in sites}))
    card = ExpertCard(name, 2, 2.0, targets)
    return Expert(card, adapters).with_gates({site.name: draw(site.in_features) for site in sites})


@pytest.fixture(scope="module")
def export(taught, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    base = folder / "base_model"
    taught.save_pretrained(base)
    tokenizer.save_pretrained(base)
    loaded = load_base(BaseSettings(model=str(base)))
    sites = find_sites(loaded.model, ["all-linear"])
    library = ExpertLibrary([some_expert("texts", 0, sites), some_expert("other", 1, sites)])
    export_model(folder / "out", loaded, library, RouterSettings("phatgoose", 2), Provenance({}, {}), base)
    return folder / "out"


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    root = tmp_path_factory.mktemp("tasks")
    rows = [{"prompt": p, "completion": c} for p, c in KNOWN + UNKNOWN]
    choices = [{**row, "choices": [row["completion"], " falsch"], "answer": 0} for row in rows]
    for name, some in (("texts", rows), ("choices", choices)):
        (root / name).mkdir()
        with gzip.open(root / name / "test.jsonl.gz", "wt") as handle:
            handle.write("\n".join(map(json.dumps, some)))
    return root


def test_table_of_an_export(export, tasks, tmp_path, capsys):
    out = tmp_path / "table.json"
    arguments = [
        "--model",
        export,
        "--tasks",
        tasks,
        "--out",
        out,
        "--arms",
        "[base,oracle,merged,phatgoose]",
    ]
    assert main([*map(str, arguments), "--device", "cpu", "--bootstrap", "50"]) == 0
    value = json.loads(out.read_text())
    assert (value["facts"]["k"], value["notes"]) == (2, [])
    cells = {(cell["task"], cell["arm"]): cell for cell in value["cells"]}
    assert cells["texts", "base"]["accuracy"][0] == len(KNOWN) / len(KNOWN + UNKNOWN)
    assert cells["texts", "base"]["metric"] == "exact match, generated"
    assert {arm for task, arm in cells if task == "choices"} == {"base", "merged", "phatgoose"}
    nats = {arm: cells["texts", arm]["nats"][0] for arm in value["arms"]}
    assert len(set(nats.values())) == 4
    assert value["facts"]["model"] == "out"
    assert "| phatgoose |" in out.with_suffix(".md").read_text()
    assert out.with_suffix(".csv").is_file()
    assert "| phatgoose |" in capsys.readouterr().out


def test_limit_include_and_forced(export, tasks, tmp_path):
    out = tmp_path / "table.json"
    arguments = ["--model", export, "--tasks", tasks, "--out", out, "--include", "[texts]", "--limit", "3"]
    assert main([*map(str, arguments), "--device", "cpu", "--generate", "never", "--router", "arrow"]) == 0
    value = json.loads(out.read_text())
    assert value["arms"] == ["base", "arrow"]
    assert [(cell["items"], cell["metric"]) for cell in value["cells"]] == [(3, "exact match, teacher-forced")] * 2


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"--tasks": "/nowhere"}, 2, "QG-DATA-002 /nowhere: no such folder"),
        ({"--out": "table.md"}, 2, "must end in .json"),
        ({"--include": "[text]"}, 2, "Did you mean 'texts'"),
        ({"--arms": "[base,phatgose]"}, 2, "Did you mean 'phatgoose'"),
        ({"--arms": "[base,average_activation]"}, 2, "has no mean activations"),
        ({"--baseline": "merged", "--arms": "[base]"}, 2, "baseline 'merged' is not among base"),
    ],
)
def test_errors_are_clear(export, tasks, tmp_path, capsys, changes, code, words):
    arguments = {
        "--model": export,
        "--tasks": tasks,
        "--out": tmp_path / "t.json",
        "--device": "cpu",
        **changes,
    }
    assert main([str(part) for pair in arguments.items() for part in pair]) == code
    assert words in capsys.readouterr().err
    assert not (tmp_path / "t.json").exists()


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--k=0", "--k 0: at least 1"),
        ("--k=-1", "--k -1: at least 1"),
        ("--k=99", "QG-CFG-009 k=99: there are 2 experts, so a whole number from 1 to 2"),
        ("--batch-tokens=0", "--batch-tokens 0: at least 1"),
        ("--max_new_tokens=0", "--max-new-tokens 0: at least 1"),
        ("--bootstrap=0", "--bootstrap 0: at least 1"),
        ("--limit=0", "--limit 0: at least 1"),
        ("--router=phatgose", "Did you mean 'phatgoose'"),
        ("--device=cuda:77", "QG-CFG-082 --device cuda:77"),
        ("--device=gpu", "allowed are auto, cpu, cuda"),
    ],
)
def test_numbers_and_devices_that_cannot_be_are_refused_at_the_start(
    export, tasks, tmp_path, capsys, monkeypatch, option, words
):
    from quietgoose.train import export as exports

    monkeypatch.setattr(exports, "load_base", lambda *a, **k: pytest.fail("refused before the base is opened"))
    out = tmp_path / "t.json"
    assert main(["--model", str(export), "--tasks", str(tasks), "--out", str(out), option]) == 2
    assert words in capsys.readouterr().err
    assert not out.exists()


def test_the_k_that_is_written_is_the_one_that_ran(export, tasks, tmp_path):
    nats = {}
    for k in (1, 2):
        out = tmp_path / f"{k}.json"
        given = ["--model", export, "--tasks", tasks, "--out", out, "--k", k, "--include", "[texts]", "--limit", "4"]
        assert (
            main([*map(str, given), "--arms=[phatgoose]", "--baseline=phatgoose", "--generate=never", "--device=cpu"])
            == 0
        )
        value = json.loads(out.read_text())
        assert value["facts"]["k"] == k
        nats[k] = value["cells"][0]["nats"][0]
    assert nats[1] != nats[2]


def test_an_arm_that_cannot_run_leaves_a_note(export, tasks, tmp_path, capsys):
    out = tmp_path / "table.json"
    given = ["--model", export, "--tasks", tasks, "--out", out, "--include", "[choices]", "--limit", "2"]
    assert main([*map(str, given), "--arms=[base,oracle,experts]", "--device=auto", "--bootstrap=10"]) == 0
    value = json.loads(out.read_text())
    assert value["arms"] == ["base", "expert:texts", "expert:other"]
    assert value["notes"] == ["oracle is left out: no task has the name of an expert"]
    for text in (out.with_suffix(".md").read_text(), capsys.readouterr().out):
        assert "- oracle is left out" in text


def test_a_place_that_cannot_be_written_is_refused_before_the_work(export, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    given = ["--model", str(export), "--tasks", "/nowhere", "--out", str(tmp_path / "file" / "t.json")]
    assert main(given) == 6
    assert "QG-IO-010 --out" in capsys.readouterr().err


def test_a_table_whose_place_vanished_is_still_shown(export, tasks, tmp_path, capsys, monkeypatch):
    from quietgoose.evaluation import tables

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tables, "write_json", full)
    given = [
        "--model",
        export,
        "--tasks",
        tasks,
        "--out",
        tmp_path / "t.json",
        "--include",
        "[choices]",
        "--limit",
        "2",
    ]
    assert main([*map(str, given), "--arms=[base]", "--device=cpu", "--bootstrap=10"]) == 6
    out, err = capsys.readouterr()
    assert "| base |" in out
    assert "QG-IO-010 --out" in err
    assert "No space left on device" in err


@pytest.mark.parametrize(
    ("manifest", "code", "words"),
    [
        (None, 4, "there is an export in"),
        ("{", 4, "QG-EXP-003"),
        (
            {"kind": "images", "unet": {}, "dtype": "float32", "vae": None, "samplers": [{"name": "a"}]},
            2,
            "draws images",
        ),
        ({"experts": []}, 2, "has no experts"),
    ],
)
def test_folders_that_cannot_be_scored_say_why(export, tmp_path, capsys, manifest, code, words):
    folder = tmp_path / "run" / "export"
    folder.mkdir(parents=True)
    whole = json.loads((export / "quietgoose.json").read_text())
    text = manifest if isinstance(manifest, str) else json.dumps(whole | (manifest or {}))
    (folder / "quietgoose.json").write_text(text)
    given = folder.parent if manifest is None else folder
    assert main(["--model", str(given), "--tasks", "/nowhere", "--out", str(tmp_path / "t.json")]) == code
    assert words in capsys.readouterr().err


def test_tables_go_to_mlflow_where_asked(export, tasks, tmp_path, capsys, monkeypatch):
    from mlflow.tracking import MlflowClient

    for name, value in mlflow_sink.ENVIRONMENT.items():  # set in this process too, and taken back after the test
        monkeypatch.setenv(name, value)
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    given = [
        "--model",
        export,
        "--tasks",
        tasks,
        "--out",
        tmp_path / "table.json",
        "--bootstrap",
        "20",
        "--device",
        "cpu",
    ]
    assert main([*map(str, given), "--tracking-uri", "file:///x"]) == 2
    assert "QG-CFG-008 --tracking-uri: file stores are gone" in capsys.readouterr().err
    assert not (tmp_path / "table.json").exists(), "before anything is scored"
    assert main([*map(str, given), "--tracking-uri", store, "--experiment", "tables"]) == 0
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith("logged to MLflow: experiment tables, run ")
    client = MlflowClient(store)
    run = client.get_run(said.rpartition(" ")[2])
    means = json.loads((tmp_path / "table.json").read_text())["means"]
    assert run.data.metrics["accuracy/phatgoose/all"] == next(
        mean["accuracy"][0] for mean in means if (mean["arm"], mean["group"]) == ("phatgoose", "all")
    )
    assert {one.path for one in client.list_artifacts(run.info.run_id)} == {"table.json", "table.md", "table.csv"}
    assert (run.info.status, run.data.params["k"]) == ("FINISHED", "2")
