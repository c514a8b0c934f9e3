"""launch/generate.py with a tiny model saved to a folder, and with an export: caches agree, errors are plain."""

from __future__ import annotations

import json

import pytest
import torch
from quietgoose.launch.generate import main
from quietgoose.routing.expert import Expert, ExpertCard, SiteAdapter
from quietgoose.routing.library import ExpertLibrary
from quietgoose.routing.sites import find_sites
from quietgoose.thoughts.config import ThoughtConfig
from quietgoose.thoughts.parameters import ThoughtParameters
from quietgoose.train.base_models import load_base
from quietgoose.train.export import Provenance, export_model, load
from quietgoose.train.nano import nano_tokenizer
from quietgoose.train.recipe import BaseSettings, RouterSettings
from quietgoose.train.thought_model import Thinking
from transformers import LlamaConfig, LlamaForCausalLM


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=64, vocab_size=258, max_position_embeddings=512, initializer_range=0.2, eos_token_id=257,
        bos_token_id=257, pad_token_id=256,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    nano_tokenizer(512).save_pretrained(path)
    return path


def answers(capsys, *arguments: object) -> list[dict]:
    assert main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)["answers"]


def test_layers_left_at_16_bits_are_counted(folder, capsys):
    common = (
        "--model",
        folder,
        "--prompt",
        "Once upon a time, " * 4,
        "--max-new-tokens",
        "4",
        "--device",
        "cpu",
        "--kv-policy",
        "small",
    )
    sizes = [answers(capsys, *common, *more)[0]["cache_bytes"] for more in ((), ("--kv-sixteen-bit-layers", "[1]"))]
    assert 1.2 * sizes[0] < sizes[1]


# options of the cache -> the cache that is taken
CACHES = {
    "nothing said": ([], "dynamic"),
    "by name": (["--kv-cache", "zipcache"], "zipcache"),
    "a policy": (["--kv-policy", "quality"], "zipcache"),
    "layers": (["--kv-sixteen-bit-layers", "[1]"], "zipcache"),
    "both": (["--kv-policy", "small", "--kv_sixteen_bit_layers=[0]"], "zipcache"),
    "static": (["--kv-cache", "static"], "static"),
}


@pytest.mark.parametrize("case", CACHES)
def test_nothing_is_quantised_unless_an_option_says_so(folder, capsys, case):
    given, cache = CACHES[case]
    common = ("--model", folder, "--prompt", "x" * 200, "--max-new-tokens", "2", "--device", "cpu")
    found = answers(capsys, *common, *given)[0]
    assert found["cache"] == cache
    exact = 2 * 2 * 2 * 64 * 4 * found["cache_tokens"]  # layers, keys and values, heads, their width, bytes of fp32
    assert (found["cache_bytes"] < exact) == (cache == "zipcache")


def test_the_ordinary_cache_gives_the_models_own_text(folder, capsys):
    prompt = "Once upon a time, " * 8
    text = answers(capsys, "--model", folder, "--prompt", prompt, "--max-new-tokens", "24", "--device", "cpu")[0]
    model, tokenizer = LlamaForCausalLM.from_pretrained(folder), nano_tokenizer(512)
    ids = tokenizer(prompt, return_tensors="pt")
    made = model.generate(**ids, max_new_tokens=24, do_sample=False, pad_token_id=256)
    assert text["texts"] == tokenizer.batch_decode(made[:, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def test_a_zipcache_by_itself_has_the_policy_quality(folder, capsys):
    common = ("--model", folder, "--prompt", "y" * 300, "--max-new-tokens", "2", "--device", "cpu")
    alone, quality, small = (
        answers(capsys, *common, *more)[0]["cache_bytes"]
        for more in (("--kv-cache", "zipcache"), ("--kv-policy", "quality"), ("--kv-policy", "small"))
    )
    assert alone == quality != small


def test_all_caches_give_the_same_greedy_text(folder, capsys):
    common = ("--model", folder, "--prompt", "Once upon a time, " * 4, "--max-new-tokens", "20", "--device", "cpu")
    found = {
        given[-1]: answers(capsys, *common, *given)[0]
        for given in (("--kv-policy", "lossless"), ("--kv-cache", "dynamic"), ("--kv-cache", "static"))
    }
    assert len({tuple(answer["texts"]) for answer in found.values()}) == 1
    for answer in found.values():
        assert 0 < answer["new_tokens"] <= 20
        assert answer["tokens_per_second"] > 0
        assert answer["cache_bytes"] > 0


def test_the_quantised_cache_is_smaller(folder, capsys):
    common = ("--model", folder, "--prompt", "x" * 400, "--max-new-tokens", "2", "--device", "cpu")
    sizes = [
        answers(capsys, *common, *given)[0]["cache_bytes"]
        for given in (("--kv-cache", "zipcache", "--kv-policy", "small"), ("--kv-cache", "dynamic"))
    ]
    assert sizes[0] < sizes[1] / 3


def test_text_streams_and_facts_go_to_stderr(folder, capsys):
    assert main(["--model", str(folder), "--prompt", "Hi", "--max_new_tokens=5", "--device=cpu"]) == 0
    out, err = capsys.readouterr()
    assert out.strip()
    assert "tokens/s" in err
    assert "dynamic cache:" in err
    assert "bytes" in err


@pytest.mark.parametrize("cache", ["zipcache", "dynamic"])
def test_several_sequences_differ_and_repeat_with_the_seed(folder, capsys, cache):
    common = ("--model", folder, "--prompt", "A long enough prompt, truly.", "--kv-cache", cache, "--device", "cpu")
    wanted = ("--temperature", "1.5", "--num-return-sequences", "3", "--max-new-tokens", "8", "--seed", "5")
    first, second = (answers(capsys, *common, *wanted)[0]["texts"] for _ in range(2))
    assert first == second
    assert len(first) == 3
    assert len(set(first)) == 3
    assert main([*map(str, (*common, *wanted))]) == 0
    assert "--- 3" in capsys.readouterr().out


def test_prompts_from_a_file(folder, tmp_path, capsys):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "one"}\n\n{"prompt": "two two"}\n')
    found = answers(capsys, "--model", folder, "--prompts", file, "--max-new-tokens", "4", "--device", "cpu")
    assert [answer["prompt"] for answer in found] == ["one", "two two"]


def export_to(path, folder, thinking=None):
    """Two random experts with gates over the model in `folder`; the base as it was loaded."""
    loaded = load_base(BaseSettings(model=str(folder)))
    sites = find_sites(loaded.model, ["all-linear"])
    random = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random)

    adapters = {s.name: SiteAdapter(draw(2, s.in_features), 0.05 * draw(s.out_features, 2), 1.0) for s in sites}
    targets = tuple(sorted({site.name.rsplit(".", 1)[-1] for site in sites}))
    experts = [
        Expert(ExpertCard(name, 2, 2.0, targets), adapters).with_gates({s.name: draw(s.in_features) for s in sites})
        for name in ("a", "b")
    ]
    settings = RouterSettings("phatgoose", 2)
    export_model(path, loaded, ExpertLibrary(experts), settings, Provenance({}, {}), folder, thinking)


def test_an_export(folder, tmp_path, capsys):
    export_to(tmp_path / "out", folder)
    common = ("--model", tmp_path / "out", "--prompt", "words " * 12, "--max-new-tokens", "10", "--device", "cpu")
    texts = [
        answers(capsys, *common, *given)[0]["texts"]
        for given in (("--kv-policy", "lossless"), ("--kv-cache", "dynamic"))
    ]
    assert texts[0] == texts[1]
    assert main([*map(str, common), "--thoughts"]) == 2
    assert "this export has none" in capsys.readouterr().err


def test_a_control_without_thoughts_is_asked_in_vain(folder, tmp_path, capsys):
    config = ThoughtConfig(tokens=3, control="no_thoughts")
    parameters = ThoughtParameters(torch.zeros(128), torch.zeros(128), config, 0)
    export_to(tmp_path / "out", folder, Thinking("base", config, parameters, None, "lora"))
    given = ("--model", tmp_path / "out", "--prompt", "some words", "--max-new-tokens", "2", "--device", "cpu")
    assert main([*map(str, given), "--thoughts"]) == 2
    assert "QG-CFG-097" in capsys.readouterr().err
    card = (tmp_path / "out" / "README.md").read_text()
    assert "cannot think" in card
    assert "quiet-star" not in card
    answers(capsys, *given)


@pytest.mark.parametrize("over", ["routed", "base"])
def test_an_export_that_thinks(folder, tmp_path, capsys, over):
    config = ThoughtConfig(tokens=3)
    torch.manual_seed(1)
    parameters = ThoughtParameters(torch.randn(128), torch.randn(128), config, 0)
    export_to(tmp_path / "out", folder, Thinking(over, config, parameters, None, "embeddings"))
    given = ("--model", tmp_path / "out", "--prompt", "some words", "--max-new-tokens", "6", "--device", "cpu")
    page = tmp_path / "thoughts.html"
    found = answers(capsys, *given, "--kv-cache", "dynamic", "--thoughts", "--show-thoughts", "--thoughts-html", page)[
        0
    ]
    model, tokenizer = load(tmp_path / "out", thoughts=True, device="cpu"), nano_tokenizer(512)
    out = model.generate(
        **tokenizer("some words", return_tensors="pt"), thoughts={"return_thoughts": True}, max_new_tokens=6,
        do_sample=False, pad_token_id=256,
    )  # fmt: skip
    assert found["texts"] == tokenizer.batch_decode(out.sequences[:, 10:], skip_special_tokens=True)
    said = [entry["thoughts"][0]["text"] for entry in found["thoughts"][0]]
    assert said == [tokenizer.decode(ids) for ids in out.thoughts.tokens_BNST[0, :, 0].tolist()]
    assert page.is_file()


BAD = {
    "no folder": (["--prompt", "a", "--model", "/nowhere"], "no such folder"),
    "no prompt": ([], "exactly one"),
    "both": (["--prompt", "a", "--prompts", "b"], "exactly one"),
    "no file": (["--prompts", "/nowhere.jsonl"], "no such file"),
    "policy": (["--prompt", "a", "--kv-policy", "qualty"], "quality"),
    "layer": (["--prompt", "a", "--kv-sixteen-bit-layers", "[9]"], "names [9]; this model's layers are 0 to 1"),
    "layers of none": (["--prompt", "a", "--kv-cache", "dynamic", "--kv-sixteen-bit-layers", "[1]"], "only a zipcache"),
    "policy of none": (
        ["--prompt", "a", "--kv-cache", "static", "--kv-policy", "small"],
        "small with --kv-cache static",
    ),
    "no policy": (["--prompt", "a", "--kv-policy", ""], "cache policy is ''"),
    "tokens": (["--prompt", "a", "--max-new-tokens", "0"], "at least 1"),
    "temperature": (["--prompt", "a", "--temperature", "-1"], "greedy"),
    "greedy copies": (["--prompt", "a", "--num-return-sequences", "2"], "all the same"),
    "seed": (["--prompt", "a", "--seed", str(2**64)], "CFG-080 --seed"),
    "device": (["--prompt", "a", "--device", "gpu"], "allowed are auto"),
    "no gpu": (["--prompt", "a", "--device", "cuda:77"], "CFG-082 --device cuda:77"),
    "empty": (["--prompt", ""], "no tokens"),
}


@pytest.mark.parametrize("name", BAD)
def test_errors_are_plain(folder, capsys, name):
    arguments, words = BAD[name]
    given = arguments if "--model" in arguments else ["--model", str(folder), *arguments]
    given = given if "--device" in given else [*given, "--device", "cpu"]
    assert main(given) == 2
    err = capsys.readouterr().err
    assert words in err
    assert "QG-" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("line", ["{", "[1]", '{"text": "a"}'])
def test_bad_lines_name_their_place(folder, tmp_path, capsys, line):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "fine"}\n' + line + "\n")
    assert main(["--model", str(folder), "--prompts", str(file), "--device", "cpu"]) == 2
    assert "prompts.jsonl:2" in capsys.readouterr().err


def test_bytes_that_are_no_text_name_their_place(folder, tmp_path, capsys):
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(b'{"prompt": "fine"}\n{"prompt": "caf\xe9"}\n')
    assert main(["--model", str(folder), "--prompts", str(file), "--device", "cpu"]) == 2
    err = capsys.readouterr().err
    assert "QG-DATA-031" in err
    assert "prompts.jsonl:2: no UTF-8" in err


def test_a_mark_at_the_start_and_separators_within_a_line_are_read(folder, tmp_path, capsys):
    file = tmp_path / "prompts.jsonl"
    file.write_bytes('\ufeff{"prompt": "one\u2028two"}\r\n'.encode())
    found = answers(capsys, "--model", folder, "--prompts", file, "--max-new-tokens", "2", "--device", "cpu")
    assert [answer["prompt"] for answer in found] == ["one\u2028two"]


def test_a_page_that_cannot_be_written_is_refused_before_the_model_is_read(folder, tmp_path, capsys, monkeypatch):
    from quietgoose.launch import generate

    monkeypatch.setattr(generate, "_load", lambda *a, **k: pytest.fail("the place is tried first"))
    (tmp_path / "file").write_text("")
    given = ["--model", str(folder), "--prompt", "a", "--device", "cpu"]
    assert main([*given, "--thoughts-html", str(tmp_path / "file" / "page.html")]) == 6
    assert "QG-IO-010 --thoughts-html" in capsys.readouterr().err


def test_folders_that_are_no_language_model(folder, tmp_path, capsys):
    """A run's folder is told from its export, an export of images and a damaged one are told by name."""
    export_to(tmp_path / "export", folder)
    assert main(["--model", str(tmp_path), "--prompt", "a", "--device", "cpu"]) == 2
    assert f"there is an export in {tmp_path / 'export'}" in capsys.readouterr().err
    path = tmp_path / "export" / "quietgoose.json"
    whole = json.loads(path.read_text())
    given = ["--model", str(tmp_path / "export"), "--prompt", "a", "--device", "cpu"]
    path.write_text("{")
    assert main(given) == 4
    assert "QG-EXP-003" in capsys.readouterr().err
    images = {"kind": "images", "unet": {}, "dtype": "float32", "vae": None, "samplers": [{"name": "ode"}]}
    path.write_text(json.dumps(whole | images))
    assert main(given) == 2
    assert "draws images; use launch/sample.py" in capsys.readouterr().err


def test_pickled_weights_and_own_code_are_refused(folder, tmp_path, capsys):
    import shutil

    other = tmp_path / "other"
    shutil.copytree(folder, other)
    (other / "model.safetensors").rename(other / "pytorch_model.bin")
    assert main(["--model", str(other), "--prompt", "a", "--device", "cpu"]) != 0
    assert "safetensors" in capsys.readouterr().err
    (other / "pytorch_model.bin").rename(other / "model.safetensors")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModelForCausalLM": "x.Y"}}))
    assert main(["--model", str(other), "--prompt", "a", "--device", "cpu"]) != 0
    assert "code" in capsys.readouterr().err
