"""Where thinking generation stops, it stops as plain generation does: the text is forced, so that both must be equal."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from quietgoose.base.errors import RecipeError
from quietgoose.train.nano import nano_tokenizer
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MaxTimeCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)

from .generation_tools import GREEDY, prompts, thinking_model, thoughts

LENGTH, NEW = 5, 12
SCRIPT = [list(range(10, 10 + NEW)), list(range(30, 30 + NEW))]  # the tokens that each row is made to say


class Scripted(LogitsProcessor):
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        place = input_ids.shape[1] - LENGTH
        said = torch.tensor([[row[place]] for row in SCRIPT])
        return torch.full_like(scores, -math.inf).scatter(1, said, 0.0)


def letters(row: int, first: int, last: int) -> str:
    """What a row says from its token number `first` up to `last`; the tokenizer has a character for each token."""
    return nano_tokenizer().decode(SCRIPT[row][first:last])


def at(lengths: list[int]) -> Callable[..., Tensor]:
    """A criterion that ends each row at a length of its own."""
    return lambda input_ids, scores: torch.tensor([input_ids.shape[1] >= length for length in lengths])


@pytest.fixture
def model() -> Any:
    return thinking_model(dtype=torch.float32)


def generate(model: Any, thinking: bool, *positional: Any, **options: Any) -> Any:
    more = {"thoughts": True} if thinking else {}
    limits = {} if "generation_config" in options or positional else GREEDY | {"max_new_tokens": NEW}
    script = LogitsProcessorList([Scripted()])
    return model.generate(prompts(2, LENGTH), *positional, logits_processor=script, **(limits | more | options))


def stopped_alike(model: Any, *positional: Any, **options: Any) -> Tensor:
    """The text, which is the same with and without thoughts."""
    plain, ours = (generate(model, thinking, *positional, **options) for thinking in (False, True))
    assert torch.equal(plain, ours)
    return ours


def config(**settings: Any) -> GenerationConfig:
    return GenerationConfig(**(GREEDY | {"max_new_tokens": NEW} | settings))


# stop strings -----------------------------------------------------------------------------------------------------

BOTH = [letters(0, 2, 4), letters(1, 5, 8)]  # row 0 ends with its 4th token, row 1 with its 8th
EARLY = [letters(0, 0, 1), letters(1, 0, 1)]


@pytest.mark.parametrize(
    ("of_the_model", "positional", "options", "new"),
    [
        (None, (), {"stop_strings": BOTH}, 8),
        (None, (), {"stop_strings": letters(1, 0, 2)}, NEW),  # row 0 never ends
        (None, (), {"generation_config": config(stop_strings=BOTH)}, 8),
        (None, (config(stop_strings=BOTH),), {}, 8),
        (BOTH, (), {}, 8),
        (BOTH, (), {"eos_token_id": SCRIPT[0][1], "pad_token_id": 0}, 8),  # row 0 ends and is padded, row 1 goes on
        (BOTH, (), {"generation_config": config()}, 8),  # what a config leaves open is the model's
        (BOTH, (), {"stop_strings": EARLY}, 1),
        (BOTH, (), {"generation_config": config(stop_strings=EARLY)}, 1),
        (BOTH, (), {"stop_strings": None}, NEW),
        (BOTH, (), {"stop_strings": None, "generation_config": config(stop_strings=EARLY)}, NEW),
        (EARLY, (), {"stopping_criteria": [StopStringCriteria(nano_tokenizer(), BOTH)]}, 8),  # takes the place of EARLY
        (EARLY, (), {"stopping_criteria": [at([6, 6])]}, 1),
        (BOTH, (), {"stopping_criteria": [at([6, 9])]}, 4),
    ],
)
def test_stop_strings(model, of_the_model, positional, options, new) -> None:
    model.generation_config.stop_strings = of_the_model
    ours = stopped_alike(model, *positional, tokenizer=nano_tokenizer(), **options)
    assert ours.shape == (2, LENGTH + new)
    assert model.generation_config.stop_strings == of_the_model


def test_a_config_of_the_caller_stays_as_it_was(model) -> None:
    given = config(stop_strings=BOTH)
    generate(model, True, generation_config=given, tokenizer=nano_tokenizer())
    assert given.stop_strings == BOTH


def test_criteria_by_position(model) -> None:
    model.generation_config.stop_strings = BOTH
    given = (prompts(2, LENGTH), config(), LogitsProcessorList([Scripted()]), [at([6, 9])])
    plain, ours = (model.generate(*given, thoughts=t, tokenizer=nano_tokenizer()) for t in (None, True))
    assert torch.equal(plain, ours)
    assert ours.shape == (2, LENGTH + 4)


@pytest.mark.parametrize("of_the_model", [True, False])
def test_strings_without_a_tokenizer_say_what_is_missing(model, of_the_model) -> None:
    if of_the_model:
        model.generation_config.stop_strings = BOTH
    options = {} if of_the_model else {"stop_strings": BOTH}
    for thinking in (False, True):
        with pytest.raises(ValueError, match=r"must pass the model's tokenizer"):
            generate(model, thinking, **options)


def test_token_healing_is_refused(model) -> None:
    model.generation_config.token_healing = True
    with pytest.raises(RecipeError, match=r"CFG-094.*token_healing"):
        generate(model, True, tokenizer=nano_tokenizer())
    assert generate(model, True, token_healing=False).shape == (2, LENGTH + NEW)


def test_an_argument_given_twice_is_refused(model) -> None:
    for thoughtful in (None, True):
        with pytest.raises(TypeError, match="multiple values"):
            model.generate(prompts(2, LENGTH), inputs=prompts(2, LENGTH), thoughts=thoughtful, **GREEDY)


# time and criteria ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("within", ["call", "config", "model", "criterion"])
def test_max_time(model, monkeypatch, within) -> None:
    """Asked once after every new token, on a clock that goes one second on each time it is read."""

    def clock() -> None:
        ticks = itertools.count()
        monkeypatch.setattr("transformers.generation.stopping_criteria.time.time", lambda: float(next(ticks)))

    found = []
    for thinking in (False, True):
        clock()
        options: dict[str, Any] = {"max_time": 3.5} if within == "call" else {}
        if within == "config":
            options["generation_config"] = config(max_time=3.5)
        if within == "criterion":
            options["stopping_criteria"] = StoppingCriteriaList([MaxTimeCriteria(3.5)])
        model.generation_config.max_time = 3.5 if within == "model" else None
        found.append(generate(model, thinking, **options))
    assert torch.equal(*found)
    assert found[1].shape == (2, LENGTH + 4)


@pytest.mark.parametrize("ends", [None, SCRIPT[0][6]])
def test_rows_that_end_one_after_another(model, ends) -> None:
    """Without an eos nothing is padded: a row that has ended says on, here what the script says."""
    out = stopped_alike(model, stopping_criteria=[at([7, 10]), at([99, 11])], eos_token_id=ends)
    assert out.shape == (2, 10)
    assert out[0, 7:].tolist() == ([0, 0, 0] if ends else SCRIPT[0][2:5])


@pytest.mark.parametrize("returned", [{}, {"return_dict_in_generate": True}])
@pytest.mark.parametrize("scores", [True, False])
def test_what_a_criterion_is_given(model, returned, scores) -> None:
    seen: list[list[tuple[Any, Any]]] = []

    def watch(input_ids: Tensor, scores: Any) -> bool:
        seen[-1].append((input_ids.clone(), None if scores is None else torch.stack(scores)))
        return input_ids.shape[1] >= 8

    for thinking in (False, True):
        seen.append([])
        generate(model, thinking, stopping_criteria=[watch], output_scores=scores, **returned)
    plain, ours = seen
    assert len(plain) == len(ours) == 3
    for (ids, old), (own_ids, new) in zip(plain, ours, strict=True):
        assert torch.equal(ids, own_ids)
        assert (old is None) == (new is None) == (not (scores and returned))
        assert old is None or torch.equal(old, new)


def test_returned_thoughts_come_with_their_scores(model) -> None:
    out = generate(model, True, output_scores=True, thoughts=thoughts(), stopping_criteria=[at([8, 8])])
    assert len(out.scores) == out.thoughts.thought_BN.shape[1] == 3
    assert out.logits is None
