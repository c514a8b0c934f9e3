"""`model.generate(..., thoughts=...)` for a Hugging Face causal LM that has learned to think.

    attach_thoughts(model, ThoughtState(parameters, config))       # quietgoose.load does it for an export with thoughts
    model.generate(**inputs, thoughts=True)                        # T as trained, greedy thoughts, before every new token;
                                                                   # inputs of another device move to the model's
    model.generate(**inputs, thoughts=ThoughtGeneration(think_at="entropy>1.5", return_thoughts=True))

Prompt handling, logits processors, stopping criteria, eos, streamers, left padding and caches are those of transformers:
what is ours is the decoding method (its `custom_generate` argument), which asks thinking.py for each next token. A thought
costs T + 1 forwards and leaves no entry in the cache. START and END are no vocabulary rows: nothing can emit them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from transformers.generation import GenerateDecoderOnlyOutput, GenerationMode

from ..base.errors import RecipeError
from ..base.settings import known_settings
from .attention import check_rotary, restore
from .branch import language_head
from .cached_text import CachedText
from .config import ThoughtConfig
from .gate import Gate, ThinkAt
from .parameters import ThoughtParameters, ThoughtTensors
from .stopping import named_options, with_stop_criterion
from .thinking import Pending, StepThoughts, Thinker

TEXT_INPUTS = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "cache_position"}


@dataclass(frozen=True)
class ThoughtState:
    """What a model has learned for thinking: `model.thought_state`. No submodule of the model."""

    parameters: ThoughtParameters
    config: ThoughtConfig

    def tensors(self, device: torch.device) -> ThoughtTensors:
        """The parameters' values there, wherever the model has gone since `attach_thoughts`."""
        found = self.parameters.tensors()
        return found.with_flat([tensor.to(device) for tensor in found.flat()])

    def check(self) -> None:
        """RecipeError CFG-097 if these parameters are as they were initialised: the run was a control without thoughts."""
        if not self.config.thinks:
            raise RecipeError(
                "this model cannot think: its run was a control without thoughts (thoughts.control: no_thoughts or "
                "same_compute), so START, END and the mixing head learned nothing; leave the thoughts out",
                code="CFG-097",
            )


@dataclass(frozen=True)
class ThoughtGeneration:
    """How to think while generating.

    tokens           T; None: as trained
    think_at         before which new tokens (gate.py)
    samples          S thoughts at once, whose predicted distributions are averaged; more than 1 needs a temperature.
                     The cache holds S copies of every row
    temperature      of the thoughts; 0 is greedy
    return_thoughts  return a ThoughtOutput, which holds them; otherwise nobody sees them
    generator        draws the thoughts; None: torch's own. The text is drawn by torch's own, as transformers does it
    """

    tokens: int | None = None
    think_at: ThinkAt = "every"
    samples: int = 1
    temperature: float = 0.0
    return_thoughts: bool = False
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        for name, value in (("tokens", self.tokens), ("samples", self.samples)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise RecipeError(f"thoughts: {name} is {value!r}; allowed is a whole number from 1", code="CFG-092")
        if not 0.0 <= self.temperature <= 100.0:
            raise RecipeError(
                f"thoughts: temperature is {self.temperature}; allowed are 0 (greedy) to 100", code="CFG-092"
            )
        if self.samples > 1 and self.temperature == 0:
            raise RecipeError(
                f"thoughts: {self.samples} samples at temperature 0 are all the same; set a temperature, for example 1.0",
                code="CFG-092",
            )
        Gate(self.think_at)

    def applied_to(self, config: ThoughtConfig) -> ThoughtConfig:
        """What was trained, with these sizes; greedy thoughts keep its temperature for their log-probabilities. Thoughts are kept
        as the text's cache keeps them, however a training rollout kept its own: who samples these again gets the same ones."""
        temperature = self.temperature or config.temperature
        return replace(
            config, tokens=self.tokens or config.tokens, samples=self.samples, temperature=temperature,
            policy_temperature=temperature, rollout_cache="exact",
        )  # fmt: skip


@dataclass(frozen=True)
class GeneratedThoughts:
    """The thoughts before N new tokens.

    tokens_BNST   int64, 0 where nothing was thought
    logprob_BNST  fp32, of each token under the temperature (greedy: that of training); NaN where nothing was thought
    weight_BNS    fp32, the mixing weight; NaN where nothing was thought
    thought_BN    bool, whether the row thought before that token
    """

    tokens_BNST: Tensor
    logprob_BNST: Tensor
    weight_BNS: Tensor
    thought_BN: Tensor


@dataclass
class ThoughtOutput(GenerateDecoderOnlyOutput):
    """What transformers' `generate` returns with return_dict_in_generate, and the thoughts."""

    thoughts: GeneratedThoughts | None = None


def attach_thoughts(model: Any, state: ThoughtState) -> Any:
    """Give this model `thought_state` and a `generate` that takes `thoughts`; returns it. Its weights and its class stay.

    The parameters move to the model's device. RecipeError for a model that cannot think (check_model).
    """
    check_model(model)
    state.parameters.to(model.device)
    model.thought_state = state
    model.generate = MethodType(_generate, model)
    return model


def check_model(model: Any) -> None:
    """RecipeError CFG-093 (or that of language_head) unless logits are a linear head over the last hidden state, CFG-105 for
    positions that depend on the length of the sequence."""
    config = getattr(model, "config", None)
    if config is None or getattr(config, "is_encoder_decoder", False) or getattr(model, "base_model", model) is model:
        raise RecipeError(
            f"{type(model).__name__}: thoughts need a decoder-only causal language model of transformers",
            code="CFG-093",
        )
    language_head(model)
    check_rotary(model)


def thought_settings(thoughts: ThoughtGeneration | Mapping[str, Any] | bool | None) -> ThoughtGeneration | None:
    """The settings of `generate(thoughts=...)`: True for the defaults, None or False for plain generation."""
    if thoughts is None or thoughts is False:
        return None
    if thoughts is True:
        return ThoughtGeneration()
    if isinstance(thoughts, ThoughtGeneration):
        return thoughts
    if isinstance(thoughts, Mapping):
        return known_settings(ThoughtGeneration, thoughts, "thoughts", code="CFG-092")
    raise RecipeError(
        f"thoughts is {thoughts!r}; allowed: True, a ThoughtGeneration, a mapping of its settings, or None",
        code="CFG-092",
    )


def _generate(self: Any, *inputs: Any, thoughts: Any = None, **options: Any) -> Any:
    """`generate` of transformers, and `thoughts`: True or a ThoughtGeneration lets the model think (generation.py)."""
    plain = type(self).generate
    settings = thought_settings(thoughts)
    if settings is None:
        return plain(self, *inputs, **options)
    inputs, options = named_options(plain, inputs, options)
    for name in ("assistant_model", "custom_generate", "synced_gpus"):
        if options.get(name):
            raise RecipeError(f"generate(thoughts=...) does not go with {name}; leave it out", code="CFG-094")
    state: ThoughtState = self.thought_state
    state.check()
    inputs = tuple(_there(value, self.device) for value in inputs)
    options = {name: _there(value, self.device) for name, value in with_stop_criterion(self, options).items()}
    restore(self)  # a training pass or scoring may have left its attention there, which a ZipCache does not know
    # transformers hands a decoding method neither the streamer nor what it was not asked for by name
    decode = partial(_decode, state=state, settings=settings, streamer=options.get("streamer"))
    return plain(self, *inputs, custom_generate=decode, **options)


def _there(value: Any, device: torch.device) -> Any:
    """A tensor on the model's device, as a tokenizer's output rarely is: transformers moves inputs in its own loop only."""
    return value.to(device) if isinstance(value, Tensor) else value


def _decode(
    model: Any,
    input_ids: Tensor,
    *,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    state: ThoughtState,
    settings: ThoughtGeneration,
    streamer: Any = None,
    **model_kwargs: Any,
) -> Any:
    """The decoding loop: what transformers' own does, with the logits of a Thinker. input_ids int64 [B, L]."""
    _check_call(generation_config, model_kwargs)
    gate = Gate(settings.think_at)
    gate.check(input_ids.shape[0], generation_config.max_length - 1)
    thinker = Thinker(
        model, state.tensors(model.device), settings.applied_to(state.config), gate, greedy=settings.temperature == 0,
        generator=settings.generator,
    )  # fmt: skip
    text, pending = _start(model, input_ids, generation_config, model_kwargs)
    pad, has_eos = generation_config._pad_token_tensor, any(hasattr(c, "eos_token_id") for c in stopping_criteria)
    active_B = torch.ones(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
    kept: dict[str, list[Any]] = {"scores": [], "logits": [], "thoughts": []}
    returned = _returned(generation_config, settings)
    while True:
        logits_BV, thought = thinker.next_logits(text, pending, input_ids, active_B)
        logits_BV = logits_BV.to(copy=True, dtype=torch.float32, device=input_ids.device)
        scores_BV = logits_processor(input_ids, logits_BV)
        for name, value in (("scores", scores_BV), ("logits", logits_BV), ("thoughts", thought)):
            kept[name] += [value] if name in returned else []
        if generation_config.do_sample:
            next_B = torch.multinomial(scores_BV.softmax(-1), 1)[:, 0]
        else:
            next_B = scores_BV.argmax(-1)
        if has_eos:
            next_B = torch.where(active_B, next_B, pad)
        input_ids = torch.cat([input_ids, next_B[:, None]], dim=1)
        if streamer is not None:
            streamer.put(next_B.cpu())
        active_B = active_B & ~stopping_criteria(input_ids, tuple(kept["scores"]) or None).bool()
        if not bool(active_B.any()):
            break
        pending = Pending(next_B[:, None])
    if streamer is not None:
        streamer.end()
    if thinker.expanded:
        text.keep_each(settings.samples)
    return _output(input_ids, text, kept, thinker, generation_config, settings)


def _start(
    model: Any, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any]
) -> tuple[CachedText, Pending]:
    """The cache as it was given, and the columns of the prompt that it does not hold."""
    cache = model_kwargs["past_key_values"]
    past, mask_BL, position_BL = (
        cache.get_seq_length(),
        model_kwargs.get("attention_mask"),
        model_kwargs.get("position_ids"),
    )
    whole = mask_BL.shape[1] if mask_BL is not None else getattr(generation_config, "_mask_length", input_ids.shape[1])
    new = input_ids if past and whole != input_ids.shape[1] else input_ids[:, past:]  # only new tokens may be given
    count = new.shape[1]
    if position_BL is None:  # of a model that takes none
        position_BL = torch.arange(past, past + count, device=input_ids.device).expand(new.shape)
    position_Bn = position_BL[:, -count:].expand(new.shape[0], -1)
    seen_Bn = None if mask_BL is None else mask_BL[:, -count:]
    text = CachedText(model, cache, None if mask_BL is None else mask_BL[:, :past], position_Bn[:, :1])
    return text, Pending(new, seen_Bn, position_Bn)


def _check_call(generation_config: Any, model_kwargs: dict[str, Any]) -> None:
    """RecipeError CFG-094 for what a thinking decoder does not do."""
    mode = generation_config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise RecipeError(
            f"generate(thoughts=...) decodes greedily or by sampling, not by {mode.value}; set num_beams=1",
            code="CFG-094",
        )
    foreign = sorted(name for name, value in model_kwargs.items() if name not in TEXT_INPUTS and value is not None)
    if foreign:
        raise RecipeError(
            f"generate(thoughts=...) takes token ids and attention_mask and returns no states; leave out {', '.join(foreign)}",
            code="CFG-094",
        )
    if model_kwargs.get("past_key_values") is None:
        raise RecipeError("generate(thoughts=...) needs a cache: leave use_cache at True", code="CFG-094")


def _returned(config: Any, settings: ThoughtGeneration) -> set[str]:
    """What of every step is kept for the caller; empty where only the sequences are returned. Criteria see the scores only
    where they are returned, as in transformers' own loop."""
    if not (config.return_dict_in_generate or settings.return_thoughts):
        return set()
    return {"thoughts", *(name for name in ("scores", "logits") if getattr(config, f"output_{name}"))}


def _output(
    sequences: Tensor, text: CachedText, kept: dict[str, list[Any]], thinker: Thinker, config: Any, settings: ThoughtGeneration
) -> Any:  # fmt: skip
    if not _returned(config, settings):
        return sequences
    common = {
        "sequences": sequences,
        "scores": tuple(kept["scores"]) or None,
        "logits": tuple(kept["logits"]) or None,
        "past_key_values": text.cache,
    }
    if not settings.return_thoughts:
        return GenerateDecoderOnlyOutput(**common)
    return ThoughtOutput(**common, thoughts=_stacked(kept["thoughts"], sequences.shape[0], thinker, sequences.device))


def _stacked(steps: list[StepThoughts | None], rows: int, thinker: Thinker, device: torch.device) -> GeneratedThoughts:
    """All steps as tensors; what was not thought is 0 or NaN."""
    shape = (rows, thinker.samples)
    nothing = StepThoughts(
        torch.zeros(*shape, thinker.tokens, dtype=torch.int64, device=device),
        torch.full((*shape, thinker.tokens), torch.nan, device=device),
        torch.full(shape, torch.nan, device=device),
        torch.zeros(rows, dtype=torch.bool, device=device),
    )
    known = [nothing if step is None else _masked(step, nothing) for step in steps]
    columns = zip(*((s.tokens_BST, s.logprob_BST, s.weight_BS, s.thought_B) for s in known))
    return GeneratedThoughts(*(torch.stack(column, dim=1) for column in columns))


def _masked(step: StepThoughts, nothing: StepThoughts) -> StepThoughts:
    where_B = step.thought_B
    pairs = (
        (step.tokens_BST, nothing.tokens_BST),
        (step.logprob_BST, nothing.logprob_BST),
        (step.weight_BS, nothing.weight_BS),
    )
    merged = [torch.where(where_B.view(-1, *[1] * (new.dim() - 1)), new, old) for new, old in pairs]
    return replace(step, tokens_BST=merged[0], logprob_BST=merged[1], weight_BS=merged[2])
