"""quietgoose.json of a language model: every opened file is named in it with its hash, damage is one plain error, options that the
export does not have are refused before the base is opened."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from quietgoose.base.errors import ArtifactError, RecipeError, SecurityError, StorageError
from quietgoose.base.files import read_json, write_json
from quietgoose.routing.expert import Expert, ExpertCard, SiteAdapter
from quietgoose.routing.library import ExpertLibrary
from quietgoose.routing.on_top import as_expert
from quietgoose.routing.sites import AdapterLayout, Site, all_sites, target_names
from quietgoose.thoughts.config import preset
from quietgoose.thoughts.parameters import ThoughtParameters
from quietgoose.train import export
from quietgoose.train.base_models import load_base
from quietgoose.train.nano import build_nano
from quietgoose.train.recipe import BaseSettings, NanoSettings, RouterSettings
from quietgoose.train.thought_model import Thinking
from safetensors.torch import load_file, save_file

import quietgoose

SMALL = NanoSettings(layers=1, width=32, heads=2, kv_heads=1, mlp_width=48, context=64)


def some_expert(name: str, sites: tuple[Site, ...], random: torch.Generator) -> Expert:
    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random)

    names = [site.name for site in sites]
    pairs = {s.name: SiteAdapter(draw(2, s.in_features), draw(s.out_features, 2), 1.0) for s in sites}
    gates = {s.name: draw(s.in_features) for s in sites}
    return Expert(ExpertCard(name, 2, 2.0, target_names(names, names)), pairs, gates)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two experts and thoughts with a LoRA of their own over a tiny base that is part of the export."""
    root = tmp_path_factory.mktemp("made")
    model, tokenizer = build_nano(SMALL, 0)
    model.save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    base = load_base(BaseSettings(model=str(root / "base")))
    sites, random = all_sites(base.model), torch.Generator().manual_seed(5)
    library = ExpertLibrary([some_expert(name, sites, random) for name in ("ant", "bee")])
    config = preset("default", tokens=2)
    layout = AdapterLayout.uniform(sites, 2)
    targets = target_names([site.name for site in sites], [site.name for site in sites])
    lora = as_expert(ExpertCard("thoughts", 2, 2.0, targets), layout, torch.randn(layout.numel, generator=random))
    parameters = ThoughtParameters(torch.zeros(32), torch.zeros(32), config, 1)
    thinking = Thinking("routed", config, parameters, lora, "lora")
    (root / "export").mkdir()
    export.export_model(
        root / "export", base, library, RouterSettings(k=2), export.Provenance({}, {}), root / "base", thinking
    )
    return root / "export"


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "export")
    return tmp_path / "export"


def edit(folder: Path, change) -> None:
    manifest = read_json(folder / "quietgoose.json")
    change(manifest)
    write_json(folder / "quietgoose.json", manifest)


def test_the_export_as_it_is_opens(made: Path) -> None:
    assert hasattr(quietgoose.load(made, device="cpu"), "thought_state")
    assert quietgoose.load_tokenizer(made)("a")["input_ids"] == [97]


@pytest.mark.parametrize(
    "file",
    [
        "gates.safetensors", "experts/bee/adapter_config.json", "experts/ant/adapter_model.safetensors",
        "thinking/thoughts/thoughts.json", "thinking/thoughts/thoughts.safetensors",
        "thinking/adapter/adapter_config.json", "thinking/adapter/adapter_model.safetensors", "base/config.json",
        "base/model.safetensors", "base/tokenizer.json",
    ],
)  # fmt: skip
def test_a_file_that_is_opened_must_be_named(copy: Path, file: str) -> None:
    edit(copy, lambda manifest: manifest["files"].pop(file))
    with pytest.raises(ArtifactError, match=rf"EXP-004 .*{file}: would be opened, but quietgoose.json names no sha256"):
        quietgoose.load(copy, device="cpu")


def test_gates_that_were_turned_round_are_not_let_in_by_leaving_their_line_out(copy: Path) -> None:
    gates = load_file(copy / "gates.safetensors")
    save_file({name: -gate for name, gate in gates.items()}, copy / "gates.safetensors")
    for change in (lambda m: m["files"].pop("gates.safetensors"), lambda m: m.update(files={})):
        edit(copy, change)
        for opening in (quietgoose.load, lambda folder: quietgoose.merge(folder, copy.parent / "out")):
            with pytest.raises(ArtifactError, match="EXP-004"):
                opening(copy)


@pytest.mark.parametrize("file", ["added_tokens.json", "chat_template.jinja", "config.json", "base/generation.json"])
def test_a_file_put_beside_those_a_library_reads_is_refused(copy: Path, file: str) -> None:
    (copy / file).write_text("{}")
    with pytest.raises(ArtifactError, match=f"EXP-004 .*{file}"):
        quietgoose.load_tokenizer(copy)


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_the_tokenizer_s_own_files_must_be_named(copy: Path, file: str) -> None:
    edit(copy, lambda manifest: manifest["files"].pop(file))
    with pytest.raises(ArtifactError, match=f"EXP-004 .*{file}"):
        quietgoose.load_tokenizer(copy)


def test_what_nobody_reads_may_lie_there(copy: Path) -> None:
    for name in ("results.json", "notes.txt", "base/.DS_Store", "experts/ant/README.md"):
        (copy / name).write_text("x")
    quietgoose.load(copy, device="cpu")
    quietgoose.load_tokenizer(copy)


def put(field: str, value: Any):
    def change(manifest: dict[str, Any]) -> None:
        *path, last = field.split(".")
        for part in path:
            manifest = manifest[part]
        manifest[last] = value

    return change


def drop(field: str):
    return lambda manifest: manifest.pop(field)


DAMAGE = {
    "brace": ("{", "no JSON"),
    "bytes": (b"\xff\xfe{}", "no JSON"),
    "deep": ("[" * 200_000, "no JSON"),
    "list": ("[]", "format is 'list'"),
    "format only": ('{"format": 1}', "files is missing"),
    "other format": (put("format", 2), "format is 2, this version reads 1"),
    "kind": (put("kind", "sounds"), "kind is 'sounds'"),
    "files": (put("files", ["a"]), "files is .*it must be paths with their sha256"),
    "hash": (put("files", {"README.md": 7}), "files is"),
    "k": (put("router.k", "two"), "router.k is 'two'; it must be a whole number from 1"),
    "no k": (put("router.k", 0), "router.k is 0"),
    "true k": (put("router.k", True), "router.k is True"),
    "router": (drop("router"), "router.name is missing"),
    "router text": (put("router", "phatgoose"), "router.name is missing"),
    "base": (put("base", None), "base.id is missing"),
    "dtype": (put("base.dtype", "int3"), "base.dtype is 'int3'; it must be float32, bfloat16 or float16"),
    "experts": (put("experts", {}), "experts is"),
    "expert": (put("experts", [{"name": "ant"}]), "experts is .*objects with name and folder"),
    "thoughts": (put("thoughts", {"folder": 1, "over": "base"}), "thoughts is"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_manifest_is_one_plain_error(copy: Path, name: str) -> None:
    damage, words = DAMAGE[name]
    path = copy / "quietgoose.json"
    if callable(damage):
        edit(copy, damage)
    else:
        path.write_bytes(damage if isinstance(damage, bytes) else damage.encode())
    openings = (
        quietgoose.load, quietgoose.load_tokenizer, lambda folder: quietgoose.merge(folder, copy.parent / "out"),
    )  # fmt: skip
    for opening in openings:
        with pytest.raises(ArtifactError, match=f"QG-EXP-003 .*{words}") as caught:
            opening(copy)
        assert caught.value.exit_code == 4
        assert len(str(caught.value)) < 600


def test_folders_that_leave_the_export_are_refused(copy: Path) -> None:
    edit(copy, put("thoughts.folder", "../elsewhere"))
    with pytest.raises(SecurityError, match="SEC-003"):
        quietgoose.load(copy)


def test_k_must_be_there_and_is_never_bent(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "load_base", lambda *a, **k: pytest.fail("refused before the base is opened"))
    for k in (0, -1, 3, 99, True, 1.0):
        with pytest.raises(RecipeError, match=rf"CFG-009 k={k!r}: there are 2 experts, so a whole number from 1 to 2"):
            quietgoose.load(made, k=k)
    with pytest.raises(RecipeError, match="CFG-009 k=2: there are 1 experts"):
        quietgoose.load(made, k=2, experts=["bee"])
    with pytest.raises(RecipeError, match=r"CFG-030 router='phatgose'.*Did you mean 'phatgoose'"):
        quietgoose.load(made, router="phatgose")
    with pytest.raises(RecipeError, match="CFG-082 device cuda:77"):
        quietgoose.load(made, device="cuda:77")


def test_k_as_asked_for_is_what_runs(made: Path) -> None:
    for k in (1, 2):
        model = quietgoose.load(made, k=k, device="cpu")
        assert model.routing_state.k == k
    assert quietgoose.load(made, experts=["bee"], device="cpu").routing_state.library.names == ("bee",)


def test_options_of_experts_need_experts(tmp_path: Path, made: Path) -> None:
    base = load_base(BaseSettings(model=str(made / "base")))
    (tmp_path / "plain").mkdir()
    export.export_model(
        tmp_path / "plain", base, None, RouterSettings(k=2), export.Provenance({}, {}), made / "base"
    )  # fmt: skip
    for options in ({"k": 1}, {"router": "arrow"}, {"experts": ["ant"]}):
        with pytest.raises(RecipeError, match="CFG-031 this export has no experts"):
            quietgoose.load(tmp_path / "plain", **options)
    quietgoose.load(tmp_path / "plain", device="cpu")


def test_a_run_s_folder_is_told_from_its_export(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=f"EXP-002 .*folder of a run; there is an export in {copy}, give that"):
        quietgoose.load(tmp_path)
    shutil.rmtree(copy)
    with pytest.raises(ArtifactError, match=r"EXP-002 .*no quietgoose.json in it"):
        quietgoose.load(tmp_path)
    (tmp_path / "recipe.yaml").write_text("")
    with pytest.raises(ArtifactError, match=r"EXP-002 .*has no export yet"):
        quietgoose.load_tokenizer(tmp_path)
    with pytest.raises(ArtifactError, match=r"EXP-002 .*no such folder"):
        quietgoose.load(tmp_path / "nowhere")


def test_merge_tries_its_place_first(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(export, "read_manifest", lambda *a: pytest.fail("refused before anything is read"))
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(StorageError, match=r"IO-010 out='.*file"):
            quietgoose.merge(made, out)


def test_the_manifest_that_is_written_is_the_one_that_is_read(made: Path) -> None:
    """Every file of the folder is in it, and it is JSON that a person can read."""
    manifest = json.loads((made / "quietgoose.json").read_text())
    here = {str(path.relative_to(made)) for path in made.rglob("*") if path.is_file()} - {"quietgoose.json"}
    assert set(manifest["files"]) == here
