"""Adapters go both ways between PEFT and us with equal logits; anything that is not plain LoRA data is refused."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from quietgoose.base.errors import ArtifactError, NameRefused, QuietGooseError, SecurityError
from quietgoose.routing.adapter_config import RULES
from quietgoose.routing.library import ExpertLibrary
from quietgoose.routing.merge import mean_of_products
from quietgoose.routing.model import attach, detach
from quietgoose.routing.peft_format import CONFIG, WEIGHTS, load_peft, save_peft
from quietgoose.routing.sites import all_sites
from safetensors.torch import load_file, save_file

FIRST = "model.layers.0.self_attn.q_proj"

PEFT_CASES = {
    "plain": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "all_linear_rslora": {"r": 3, "lora_alpha": 5, "use_rslora": True, "target_modules": "all-linear"},
    "patterns": {
        "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"],
        "rank_pattern": {"layers.0.self_attn.q_proj": 7, "down_proj": 2}, "alpha_pattern": {"q_proj": 3},
    },
    "some_layers": {"r": 2, "lora_alpha": 2, "target_modules": ["up_proj"], "layers_to_transform": [1]},
    "rank_64": {"r": 64, "lora_alpha": 16, "target_modules": ["o_proj"], "lora_dropout": 0.1},
    "regex_free_full_name": {"r": 1, "lora_alpha": 1, "target_modules": [FIRST]},
}  # fmt: skip


def randomise(model: torch.nn.Module) -> None:
    g = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=g) * 0.2)


@pytest.fixture
def saved(model, new_expert, tmp_path) -> Path:
    save_peft(new_expert(model, "ant", targets=("q_proj", "v_proj")), tmp_path / "ant", "tiny")
    return tmp_path / "ant"


@pytest.mark.parametrize("case", PEFT_CASES)
def test_peft_adapters_load_with_equal_logits(new_model, tokens, tmp_path, case: str) -> None:
    theirs = peft.get_peft_model(new_model(), peft.LoraConfig(task_type="CAUSAL_LM", **PEFT_CASES[case])).eval()
    randomise(theirs)
    theirs.save_pretrained(tmp_path)
    model = new_model()
    expert = load_peft(str(tmp_path), "ant", all_sites(model))
    attach(model, ExpertLibrary([expert]), "expert:ant")
    torch.testing.assert_close(model(tokens).logits, theirs(tokens).logits, rtol=1e-5, atol=1e-5)
    assert not torch.equal(model(tokens).logits, detach(model)(tokens).logits)


@pytest.mark.parametrize("which", ["ant", "bee", "cat", "dog", "merged"])
def test_ours_open_in_peft_with_equal_logits(new_model, mixed, tokens, tmp_path, which: str) -> None:
    expert = mean_of_products(mixed) if which == "merged" else mixed[which]
    save_peft(expert, tmp_path, "tiny")
    theirs = peft.PeftModel.from_pretrained(new_model(), tmp_path).eval()
    ours = attach(new_model(), ExpertLibrary([expert]), f"expert:{which}")
    torch.testing.assert_close(ours(tokens).logits, theirs(tokens).logits, rtol=1e-5, atol=1e-5)
    adapted = {n for n, m in theirs.base_model.model.named_modules() if isinstance(m, peft.tuners.lora.Linear)}
    assert adapted == set(expert.sites)
    again = load_peft(tmp_path, which, all_sites(new_model()))
    assert again.tensor_hash() == expert.tensor_hash()
    assert {s: a.scale for s, a in again.adapters.items()} == {s: a.scale for s, a in expert.adapters.items()}
    save_peft(again, tmp_path / "again", "tiny")
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (tmp_path / WEIGHTS).read_bytes()


def test_peft_config_fields_are_all_known(new_model) -> None:
    """A field that a newer PEFT writes must be judged here, not met by a user."""
    unknown = set(peft.LoraConfig(target_modules=["q_proj"]).to_dict()) - set(RULES)
    assert not unknown


BAD_CONFIG = {
    "unknown key": ({"evil": 1}, "unknown field 'evil'"),
    "misspelt": ({"lora_alfa": 1}, "Did you mean 'lora_alpha'"),
    "huge rank": ({"r": 10**6}, "r is 1000000; allowed: a whole number from 1 to 1024"),
    "zero rank": ({"r": 0}, "r is 0"),
    "bool rank": ({"r": True}, "r is True"),
    "nan alpha": ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
    "regex targets": ({"target_modules": ".*q_proj|(a+)+$"}, "no regular expressions"),
    "regex in list": ({"target_modules": ["(a+)+$"]}, "no regular expressions"),
    "regex pattern": ({"rank_pattern": {"(a+)+$": 4}}, "rank_pattern"),
    "big pattern rank": ({"rank_pattern": {"q_proj": 5000}}, "rank_pattern"),
    "auto mapping": ({"auto_mapping": {"base_model_class": "X", "parent_library": "os"}}, "auto_mapping"),
    "megatron": ({"megatron_config": {"x": 1}, "megatron_core": "os"}, "megatron"),
    "megatron core": ({"megatron_core": "os.path"}, "megatron_core"),
    "dora": ({"use_dora": True}, "use_dora"),
    "bias": ({"bias": "all"}, "bias"),
    "modules to save": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "pissa changes the base": ({"init_lora_weights": "pissa"}, "init_lora_weights"),
    "other method": ({"peft_type": "IA3"}, "peft_type"),
    "other task": ({"task_type": "SEQ_CLS"}, "task_type"),
    "parameters": ({"target_parameters": ["x"]}, "target_parameters"),
}


@pytest.mark.parametrize("case", BAD_CONFIG)
def test_bad_configurations_are_refused(model, saved, case: str) -> None:
    change, text = BAD_CONFIG[case]
    values = json.loads((saved / CONFIG).read_text())
    (saved / CONFIG).write_text(json.dumps({**values, **change}))
    with pytest.raises(SecurityError, match=r"SEC-004.*" + re.escape(text)):
        load_peft(saved, "ant", all_sites(model))


@pytest.mark.parametrize(
    "text", ["[]", "{", '{"r": 1, "r": 2}', "[" * 100_000, '{"peft_type": "LORA"}', "\xff", " " * (2**20 + 1)]
)
def test_broken_json_is_refused(model, saved, text: str) -> None:
    (saved / CONFIG).write_bytes(text.encode("latin-1"))
    with pytest.raises(SecurityError, match=r"SEC-004"):
        load_peft(saved, "ant", all_sites(model))


class Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.write_text, (self.path, "executed"))


def test_pickled_weights_are_refused_before_they_run(model, saved, tmp_path) -> None:
    canary = tmp_path / "canary"
    payload = pickle.dumps(Canary(canary))
    (saved / "adapter_model.bin").write_bytes(payload)
    with pytest.raises(SecurityError, match=r"SEC-001.*adapter_model\.bin"):
        load_peft(saved, "ant", all_sites(model))
    (saved / "adapter_model.bin").rename(saved / WEIGHTS)
    with pytest.raises(SecurityError, match=r"SEC-005.*header"):
        load_peft(saved, "ant", all_sites(model))
    assert not canary.exists()


def test_names_and_links_that_leave_the_folder_are_refused(model, saved, tmp_path) -> None:
    for name in ("../../x", "a/b", "", "x" * 65, "nul", "a\x00", "аnt"):
        with pytest.raises(NameRefused, match=r"SEC-002"):
            load_peft(saved, name, all_sites(model))
    (saved / WEIGHTS).rename(tmp_path / "outside.safetensors")
    (saved / WEIGHTS).symlink_to(tmp_path / "outside.safetensors")
    with pytest.raises(SecurityError, match=r"SEC-003"):
        load_peft(saved, "ant", all_sites(model))


def first_key(tensors: dict[str, torch.Tensor], part: str = "lora_A") -> str:
    return next(key for key in tensors if part in key)


def edit_nan(t):
    t[first_key(t)][0, 0] = float("nan")


def edit_missing(t):
    t.pop(first_key(t))


def edit_extra(t):
    t["base_model.model.lm_head.weight"] = torch.zeros(2, 2)


def edit_magnitude(t):
    t[first_key(t).replace("lora_A.weight", "lora_magnitude_vector")] = torch.ones(3)


def edit_rank(t):
    key = first_key(t)
    t[key] = torch.cat([t[key], t[key]])


def edit_transpose(t):
    key = first_key(t, "lora_B")
    t[key] = t[key].t().contiguous()


def edit_dtype(t):
    key = first_key(t)
    t[key] = t[key].to(torch.int32)


def edit_empty(t):
    key = first_key(t)
    t[key] = t[key][:0]


def edit_everything(t):
    t.clear()


EDITS = {
    edit_nan: "NaN", edit_missing: "lora_A is missing", edit_extra: "unexpected name",
    edit_magnitude: "unexpected name",
    edit_rank: "shape", edit_transpose: "shape", edit_dtype: "dtype 'I32'", edit_empty: "at least one value",
    edit_everything: "no tensors",
}  # fmt: skip


@pytest.mark.parametrize("edit", EDITS, ids=lambda e: e.__name__)
def test_bad_tensors_are_refused(model, saved, edit) -> None:
    tensors = load_file(saved / WEIGHTS)
    edit(tensors)
    save_file(tensors, saved / WEIGHTS)
    with pytest.raises(SecurityError, match=r"SEC-005.*" + EDITS[edit]):
        load_peft(saved, "ant", all_sites(model))


def rewrite_header(path: Path, change) -> None:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def overlap(header) -> None:
    keys = [k for k in header if k != "__metadata__"]
    header[keys[1]] = dict(header[keys[0]])


def negative(header) -> None:
    header[next(k for k in header if k != "__metadata__")]["shape"] = [-4, -24]


def huge(header) -> None:
    header[next(k for k in header if k != "__metadata__")]["shape"] = [2**62, 2]


def no_offsets(header) -> None:
    header[next(k for k in header if k != "__metadata__")].pop("data_offsets")


@pytest.mark.parametrize("change", [overlap, negative, huge, no_offsets])
def test_dishonest_headers_are_refused(model, saved, change) -> None:
    rewrite_header(saved / WEIGHTS, change)
    with pytest.raises(SecurityError, match=r"SEC-005"):
        load_peft(saved, "ant", all_sites(model))


@pytest.mark.parametrize("cut", [0, 4, 100, -1, -500])
def test_truncated_files_and_header_bombs_are_refused(model, saved, cut: int) -> None:
    data = (saved / WEIGHTS).read_bytes()
    for bad in (data[:cut], data + b"\0", (2**40).to_bytes(8, "little") + data[8:]):
        (saved / WEIGHTS).write_bytes(bad)
        with pytest.raises(SecurityError, match=r"SEC-005"):
            load_peft(saved, "ant", all_sites(model))


def test_other_bases_and_missing_files_are_named(new_model, saved, tmp_path) -> None:
    with pytest.raises(ArtifactError, match=r"EXP-002.*another base"):
        load_peft(saved, "ant", all_sites(new_model(num_hidden_layers=1)))
    with pytest.raises(SecurityError, match=r"SEC-005.*shape"):
        load_peft(saved, "ant", all_sites(new_model(hidden_size=32)))
    with pytest.raises(ArtifactError, match=r"EXP-001"):
        load_peft(tmp_path / "nowhere", "ant", all_sites(new_model()))
    (saved / WEIGHTS).unlink()
    with pytest.raises(ArtifactError, match=r"EXP-001"):
        load_peft(saved, "ant", all_sites(new_model()))


@given(st.dictionaries(st.sampled_from(sorted(RULES)), st.none() | st.booleans() | st.integers() | st.text(max_size=5)))
def test_any_configuration_is_read_or_refused_with_a_code(tmp_path_factory, change) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    values = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (folder / CONFIG).write_text(json.dumps({**values, **change}))
    with pytest.raises(QuietGooseError, match=r"QG-(SEC-004|EXP-001)"):
        load_peft(folder, "ant", [])


@pytest.mark.parametrize(
    ("base", "name", "revision"),
    [
        ("owner/some-model@" + "0af1" * 10, "owner/some-model", "0af1" * 10),
        ("owner/some-model", "owner/some-model", None),
        ("/models/mine@home", "/models/mine@home", None),
        (None, None, None),
    ],
)
def test_peft_finds_the_base_at_its_commit(model, new_expert, tmp_path, base, name, revision) -> None:
    """AutoPeftModel asks the hub for `base_model_name_or_path` at `revision`; a hub id holds no commit."""
    from peft import PeftConfig

    save_peft(new_expert(model, "ant"), tmp_path, base)
    config = PeftConfig.from_pretrained(str(tmp_path))
    assert (config.base_model_name_or_path, config.revision) == (name, revision)
    assert load_peft(tmp_path, "ant", all_sites(model)).name == "ant"
