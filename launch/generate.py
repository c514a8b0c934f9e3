"""Generate text from an exported model or any Hugging Face folder, with the KV cache of your choice:

    python launch/generate.py --model runs/nano_demo/export --prompt "Once"
    python launch/generate.py --model FOLDER --prompts prompts.jsonl --kv-cache zipcache --kv-policy small --json
    python launch/generate.py --model runs/nano_demo/export --prompt "Once" --thoughts --thoughts-html thoughts.html

A line of prompts.jsonl is {"prompt": "..."}. Text streams as it is made; tokens a second and the bytes of the cache
follow on stderr. An export with a `thoughts` stage can think before each token (generate_thoughts.py). Only safetensors
are read and no code that comes with a model is run.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from quietgoose.base.errors import DataError, RecipeError
from quietgoose.base.files import check_writable, storing
from quietgoose.launch.command import quiet_bars, run_command
from quietgoose.launch.generate_thoughts import (
    Thinking,
    add_traces,
    check_thinks,
    print_thoughts,
    thinking_of,
    told,
    write_page,
)

KVCache = Literal["zipcache", "dynamic", "static"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
PRESET = "quality"
BARE = {"json": "true", "show_thoughts": "true", "thoughts": "trained"}  # what an option without a value stands for
SEEDS = (-(2**63), 2**64 - 1)  # what torch takes


@dataclass(frozen=True)
class Request:
    """What one prompt is to become."""

    kv_cache: str
    policy: str | dict[str, Any]
    max_new_tokens: int
    temperature: float
    sequences: int
    thinking: Thinking | None


@dataclass(frozen=True)
class Answer:
    """What one prompt became; `cache_bytes` are those in use at the end, all rows together."""

    prompt: str
    texts: list[str]
    new_tokens: int
    seconds: float
    cache_bytes: int
    cache_tokens: int
    cache: str
    thoughts: list[list[dict[str, Any]]] | None = None

    def to_dict(self) -> dict[str, Any]:
        speed = {"tokens_per_second": self.new_tokens / self.seconds if self.seconds else 0.0}
        return {name: value for name, value in vars(self).items() if name != "thoughts" or value is not None} | speed


def generate(
    model: str,
    prompt: str | None = None,
    prompts: str | None = None,
    kv_cache: KVCache | None = None,
    kv_policy: str | None = None,
    kv_sixteen_bit_layers: list[int] | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    num_return_sequences: int = 1,
    seed: int = 0,
    device: str = "auto",
    dtype: Dtype = "auto",
    json: bool = False,
    thoughts: str = "off",
    think_at: str | None = None,
    thought_samples: int = 1,
    thought_temperature: float = 0.0,
    show_thoughts: bool = False,
    thoughts_html: str | None = None,
) -> None:
    """Generate text.

    Args:
        model: an exported folder (quietgoose.json stands in it), or a folder in Hugging Face format
        prompt: the text to continue
        prompts: a JSONL file with a prompt in every line, instead of --prompt
        kv_cache: dynamic (in the dtype of the weights, grows; the default), static (the same, allocated at once) or zipcache
            (quantised: smaller, and not exact). The two options below choose zipcache by themselves
        kv_policy: preset of zipcache: default, paper, quality (what --kv-cache zipcache alone takes), small or lossless
        kv_sixteen_bit_layers: layers of zipcache left at 16 bits, for example "[7,18]" (quietgoose.sensitive_layers finds them)
        max_new_tokens: new tokens of a continuation at most
        temperature: 0 is greedy
        num_return_sequences: continuations of every prompt; more than one needs a temperature
        seed: of the sampling
        device: auto, cpu, cuda, cuda:1, ...
        dtype: of the weights; auto is what an export says, otherwise bfloat16 on a GPU and float32 on a CPU
        json: print one JSON object for all prompts instead of text
        thoughts: think before the new tokens, T thought tokens each; as many as were trained if T is left out. Each of the
            options below switches thinking on too
        think_at: every, never, or entropy>x: only where the ordinary prediction has more than x nats of entropy
        thought_samples: thoughts before a token, whose predictions are averaged
        thought_temperature: of the thoughts; 0 is greedy
        show_thoughts: print the thoughts after the text, or put them into the JSON
        thoughts_html: write prompts and continuations here, coloured by what thoughts change, with all thoughts
    """
    thinking = thinking_of(
        thoughts, think_at, thought_samples, thought_temperature, show_thoughts, thoughts_html, seed
    )  # fmt: skip
    cache, policy = _cache_of(kv_cache, kv_policy, kv_sixteen_bit_layers)
    wanted = _checked(cache, policy, max_new_tokens, temperature, num_return_sequences, thinking)
    if not SEEDS[0] <= seed <= SEEDS[1]:
        raise RecipeError(f"--seed {seed}: {SEEDS[0]} to {SEEDS[1]}", code="CFG-080")
    texts = _read_prompts(prompt, prompts)
    if thinking is not None and thinking.page is not None:
        check_writable(thinking.page, f"--thoughts-html {thoughts_html}")
    from quietgoose.base.devices import usable_device

    where = str(usable_device(device, "--device"))
    loaded, tokenizer = _load(model, where, dtype, thinks=thinking is not None)
    if thinking is not None:
        check_thinks(loaded, model)
    import torch

    torch.manual_seed(seed)
    answers = []
    for number, text in enumerate(texts, 1):
        answer = _continue(loaded, tokenizer, text, wanted, f"Prompt {number}", stream=not json)
        answers.append(answer)
        if not json:
            print_thoughts(answer.thoughts or [])
            _print_facts(answer)
    if thinking is not None and thinking.page is not None:
        with storing(f"--thoughts-html {thoughts_html}"):
            write_page(thinking, loaded, model)
        print(f"{thinking.page}: open it in a browser", file=sys.stderr)
    if json:
        print(_json({"model": model, "device": where, "seed": seed, "answers": [a.to_dict() for a in answers]}))


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, or that of the error, whose text goes to stderr."""
    return run_command(generate, argv, BARE)


def _cache_of(
    kv_cache: KVCache | None, kv_policy: str | None, sixteen_bit_layers: list[int] | None
) -> tuple[KVCache, str | dict[str, Any]]:
    """(cache, its policy): nothing is quantised unless an option says so, and one about the policy does."""
    given = {"--kv-policy": kv_policy, "--kv-sixteen-bit-layers": sixteen_bit_layers}
    named = [f"{option} {value}" for option, value in given.items() if value is not None]
    if named and kv_cache not in (None, "zipcache"):
        raise RecipeError(
            f"{named[0]} with --kv-cache {kv_cache}: only a zipcache is quantised; leave one of the two out",
            code="CFG-080",
        )
    preset = PRESET if kv_policy is None else kv_policy
    policy = {"preset": preset, "sixteen_bit_layers": sixteen_bit_layers} if sixteen_bit_layers else preset
    return kv_cache or ("zipcache" if named else "dynamic"), policy


def _checked(
    kv_cache: str,
    policy: str | dict[str, Any],
    new_tokens: int,
    temperature: float,
    sequences: int,
    thinking: Thinking | None,
) -> Request:
    if new_tokens < 1:
        raise RecipeError(f"--max-new-tokens {new_tokens}: at least 1", code="CFG-080")
    if not 0.0 <= temperature <= 100.0:
        raise RecipeError(f"--temperature {temperature}: 0 (greedy) to 100", code="CFG-080")
    if sequences < 1:
        raise RecipeError(f"--num-return-sequences {sequences}: at least 1", code="CFG-080")
    if sequences > 1 and temperature == 0.0:
        raise RecipeError(
            f"--num-return-sequences {sequences} with --temperature 0: greedy continuations are all the same; set a "
            "temperature, for example 0.8",
            code="CFG-080",
        )
    if kv_cache == "zipcache":
        from quietgoose.cache.policy import resolve_policy

        resolve_policy(policy)
    return Request(kv_cache, policy, new_tokens, temperature, sequences, thinking)


def _read_prompts(prompt: str | None, file: str | None) -> list[str]:
    if (prompt is None) == (file is None):
        raise RecipeError("give exactly one of --prompt TEXT and --prompts FILE.jsonl", code="CFG-081")
    if prompt is not None:
        return [prompt]
    path = Path(str(file))
    if not path.is_file():
        raise DataError(f"--prompts {file}: no such file", code="DATA-030")
    found = []
    for number, raw in enumerate(path.read_bytes().splitlines(), 1):
        try:
            line = raw.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(f"{file}:{number}: no UTF-8 ({error}); save the file as UTF-8", code="DATA-031") from error
        if line.strip():
            found.append(_prompt_of(line, f"{file}:{number}"))
    if not found:
        raise DataError(f"--prompts {file}: no line in it", code="DATA-030")
    return found


def _prompt_of(line: str, place: str) -> str:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{place}: no JSON ({error})", code="DATA-031") from error
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise DataError(f'{place}: a line is {{"prompt": "text"}}', code="DATA-031")
    return row["prompt"]


def _load(model: str, device: str, dtype: str, *, thinks: bool) -> tuple[Any, Any]:
    """(model in eval mode on the device, tokenizer)."""
    import torch
    from quietgoose.train.export_manifest import IMAGES, MANIFEST, kind_of, parse_manifest, run_folder_hint

    quiet_bars()
    folder = Path(model).expanduser()
    if (folder / MANIFEST).is_file():
        if kind_of(parse_manifest(folder)) == IMAGES:
            raise RecipeError(f"--model {model}: draws images; use launch/sample.py", code="CFG-083")
        from quietgoose.train.export import load, load_tokenizer

        loaded = load(folder, device=device, thoughts=True if thinks else None)
        tokenizer = load_tokenizer(folder)
        return (loaded if dtype == "auto" else loaded.to(getattr(torch, dtype))).eval(), tokenizer
    if not folder.is_dir():
        raise RecipeError(f"--model {model}: no such folder; an export or a Hugging Face folder", code="CFG-083")
    if hint := run_folder_hint(folder):
        raise RecipeError(f"--model {hint}", code="CFG-083")
    from quietgoose.train.base_models import load_base
    from quietgoose.train.recipe import BaseSettings

    chosen = dtype if dtype != "auto" else "bfloat16" if device.startswith("cuda") else "float32"
    base = load_base(BaseSettings(model=str(folder), dtype=chosen, attention="sdpa"), device)  # type: ignore[arg-type]
    return base.model, base.tokenizer


def _continue(model: Any, tokenizer: Any, prompt: str, wanted: Request, label: str, *, stream: bool) -> Answer:
    import torch
    from transformers import TextStreamer

    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    ids = inputs["input_ids"]
    if ids.shape[1] == 0:
        raise DataError("the prompt has no tokens; give at least one", code="DATA-032")
    live = stream and wanted.sequences == 1
    options: dict[str, Any] = {"max_new_tokens": wanted.max_new_tokens, "do_sample": wanted.temperature > 0}
    if wanted.temperature > 0:
        options |= {"temperature": wanted.temperature, "top_k": 0, "top_p": 1.0}
    if live:
        options["streamer"] = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    thinking = wanted.thinking
    if thinking is not None:
        options["thoughts"] = thinking.fresh()
    started = time.perf_counter()
    with torch.inference_mode():
        rows, cache = _prepare(model, ids, wanted)
        if cache is None and wanted.kv_cache == "static":
            options["cache_implementation"] = "static"
        elif cache is not None:
            options["past_key_values"] = cache
        made = model.generate(
            rows,
            attention_mask=torch.ones_like(rows),
            pad_token_id=tokenizer.pad_token_id,
            return_dict_in_generate=True,
            **options,
        )
    if ids.is_cuda:
        torch.cuda.synchronize(ids.device)
    seconds = time.perf_counter() - started
    new = made.sequences[:, ids.shape[1] :]
    texts = tokenizer.batch_decode(new, skip_special_tokens=True)
    if stream and not live:
        for number, text in enumerate(texts, 1):
            print(f"--- {number}\n{text}")
    used = _cache_bytes(made.past_key_values)
    columns = int(made.past_key_values.get_seq_length()) * rows.shape[0]
    said = told(tokenizer, new, made.thoughts) if thinking is not None and thinking.show else None
    if thinking is not None and thinking.page is not None:
        add_traces(thinking, model, tokenizer, made.sequences, ids.shape[1], label)
    return Answer(prompt, texts, new.numel(), seconds, used, columns, wanted.kv_cache, said)


def _prepare(model: Any, ids: Any, wanted: Request) -> tuple[Any, Any]:
    """(input rows, cache to pass or None). Several continuations share one packed prompt."""
    rows = ids.repeat_interleave(wanted.sequences, dim=0)
    if wanted.kv_cache == "static":
        return rows, None
    if wanted.kv_cache == "dynamic":
        from transformers import DynamicCache

        return rows, DynamicCache(config=model.config)
    from quietgoose.cache.hf import ZipCache

    cache = ZipCache(model.config, wanted.policy)
    if wanted.sequences > 1 and ids.shape[1] > 1:
        model(ids[:, :-1], past_key_values=cache, logits_to_keep=1)
        cache = cache.fork(wanted.sequences)
    return rows, cache


def _cache_bytes(cache: Any) -> int:
    from quietgoose.cache.hf import ZipCache

    if isinstance(cache, ZipCache):
        return int(cache.nbytes().total)
    kept = [x for layer in cache.layers for x in (layer.keys, layer.values) if x is not None]
    return sum(x.numel() * x.element_size() for x in kept)


def _print_facts(answer: Answer) -> None:
    each = answer.cache_bytes / answer.cache_tokens if answer.cache_tokens else 0.0
    print(
        f"{answer.new_tokens} tokens in {answer.seconds:.2f} s ({answer.new_tokens / answer.seconds:.1f} tokens/s, prompt "
        f"included); {answer.cache} cache: {answer.cache_bytes} bytes, {each:.1f} a token",
        file=sys.stderr,
        flush=True,
    )


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)


if __name__ == "__main__":
    sys.exit(main())
