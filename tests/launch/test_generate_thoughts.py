"""launch/generate.py --thoughts: what is printed, the JSON, the page, and what is refused."""

from __future__ import annotations

import json
import re

import pytest
import torch
from quietgoose.evaluation.page import visible
from quietgoose.launch import generate as command
from quietgoose.launch.generate import main
from quietgoose.thoughts.config import ThoughtConfig
from quietgoose.thoughts.generation import ThoughtState, attach_thoughts
from quietgoose.thoughts.parameters import ThoughtParameters
from quietgoose.train.nano import nano_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

T = 3
COMMON = ["--model", "runs/x/export", "--prompt", "Once upon", "--max-new-tokens", "5", "--device", "cpu"]


@pytest.fixture(autouse=True)
def thinking_model(monkeypatch):
    """Stands in for a loaded export with thoughts; test_generate.py loads a real one."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=64, vocab_size=258, max_position_embeddings=512, initializer_range=0.2, eos_token_id=257,
        bos_token_id=257, pad_token_id=256,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    wanted = ThoughtConfig(tokens=T)
    parameters = ThoughtParameters(torch.randn(128), torch.randn(128), wanted, 0)
    attach_thoughts(model, ThoughtState(parameters, wanted))
    monkeypatch.setattr(command, "_load", lambda *_, **__: (model, nano_tokenizer(512)))
    return model


def answer(capsys, *options: object) -> dict:
    assert main([*COMMON, *map(str, options), "--json"]) == 0
    return json.loads(capsys.readouterr().out)["answers"][0]


@pytest.mark.parametrize("cache", [["--kv-policy", "lossless"], ["--kv-cache", "dynamic"], []])
def test_thoughts_change_the_text_and_are_hidden(capsys, cache):
    plain = answer(capsys, *cache)
    thought = answer(capsys, *cache, "--thoughts")
    assert plain["texts"] != thought["texts"]
    assert plain.keys() == thought.keys()
    assert thought["cache_tokens"] == plain["cache_tokens"]


def test_a_number_is_the_length_of_a_thought(capsys):
    for options, tokens in ((["--thoughts"], T), (["--thoughts", "2"], 2), (["--thoughts=5"], 5)):
        said = answer(capsys, *options, "--show-thoughts")["thoughts"]
        assert [len(row) for row in said] == [5]
        for entry in said[0]:
            assert len(entry["thoughts"]) == 1
            assert len(entry["thoughts"][0]["text"].encode("utf-8", "replace")) >= tokens


def test_each_option_switches_thinking_on(capsys):
    thought = answer(capsys, "--thoughts")["texts"]
    assert answer(capsys, "--think-at", "every")["texts"] == thought
    assert answer(capsys, "--show-thoughts")["texts"] == thought
    assert answer(capsys, "--think-at", "entropy>0")["texts"] == thought
    assert answer(capsys, "--think-at", "never")["texts"] == answer(capsys)["texts"]


def test_samples_and_seed(capsys):
    options = ("--thought-samples", "3", "--thought-temperature", "1.0", "--show-thoughts")
    first, second, other = (answer(capsys, *options, "--seed", seed)["thoughts"] for seed in (1, 1, 2))
    assert first == second != other
    assert all(len(entry["thoughts"]) == 3 for entry in first[0])


def test_shown_thoughts_stand_behind_the_text(capsys):
    assert main([*COMMON, "--thoughts", "--show-thoughts"]) == 0
    out, err = capsys.readouterr()
    text, _, thoughts = out.partition("--- thoughts: before which token, mixing weight, thought\n")
    assert text.strip()
    lines = thoughts.splitlines()
    assert len(lines) == 5
    assert all(re.match(r'\s*".*"  [+-]\d+\.\d\d  ".*"$', line) for line in lines)
    assert "tokens/s" in err


def test_the_page_holds_prompt_and_continuations(capsys, tmp_path, thinking_model):
    page = tmp_path / "thoughts.html"
    options = ["--temperature", "1.0", "--num-return-sequences", "2", "--thoughts-html", str(page)]
    assert main([*COMMON, *options]) == 0
    assert str(page) in capsys.readouterr().err
    data = re.search(r'id="data">(.*?)</script>', page.read_text(encoding="utf-8"), re.S)
    assert data is not None
    value = json.loads(data[1])
    assert [trace["label"] for trace in value["traces"]] == ["Prompt 1, continuation 1", "Prompt 1, continuation 2"]
    prompt = len(nano_tokenizer(512)("Once upon")["input_ids"])
    for trace in value["traces"]:
        assert trace["new_from"] == prompt
        assert "".join(trace["tokens"][:prompt]) == "Once upon"
        assert prompt < len(trace["tokens"]) <= prompt + 5
        assert all(len(thoughts) == 1 for thoughts in trace["thoughts"][1:])
        assert None not in trace["mixed"][1:]
    assert ["thought tokens", str(T)] in value["facts"]
    assert thinking_model.config._attn_implementation != "quietgoose_thoughts"


def test_the_page_shows_the_thoughts_that_were_drawn_for_each_continuation(capsys, tmp_path):
    page = tmp_path / "thoughts.html"
    drawn = ["--thought-samples", "2", "--thought-temperature", "1.0", "--kv-cache", "dynamic", "--show-thoughts"]
    said = answer(capsys, *drawn, "--temperature", "1.0", "--num-return-sequences", "2", "--thoughts-html", page)[
        "thoughts"
    ]
    data = re.search(r'id="data">(.*?)</script>', page.read_text(encoding="utf-8"), re.S)
    assert data is not None
    traces = json.loads(data[1])["traces"]
    for row, trace in zip(said, traces, strict=True):
        shown = [[thought[0] for thought in sampled] for sampled in trace["thoughts"][trace["new_from"] :]]
        assert shown == [[visible(thought["text"]) for thought in entry["thoughts"]] for entry in row[: len(shown)]]


def test_several_prompts_one_page(capsys, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    page = tmp_path / "thoughts.html"
    given = ["--model", "x", "--prompts", str(prompts), "--max-new-tokens", "2", "--device", "cpu"]
    assert main([*given, "--thoughts-html", str(page), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["answers"]) == 2
    assert '"label":"Prompt 2"' in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--thoughts", "0"], "from 1"),
        (["--thoughts", "many"], "from 1"),
        (["--think-at", "sometimes"], "entropy>x"),
        (["--thought-samples", "2"], "all the same"),
        (["--thought-temperature", "-1"], "0 (greedy)"),
        (["--thoughts", "--kv-cache", "static"], "cannot take thoughts back"),
        (["--thoughts", "200", "--kv-cache", "zipcache"], "flush_every"),
    ],
)
def test_errors_are_plain(capsys, options, words):
    assert main([*COMMON, *options]) == 2
    err = capsys.readouterr().err
    assert words in err
    assert "QG-" in err
    assert "Traceback" not in err


def test_a_model_without_thoughts_is_refused(capsys, thinking_model):
    del thinking_model.thought_state
    assert main([*COMMON, "--thoughts"]) == 2
    assert "carries no thought parameters" in capsys.readouterr().err
