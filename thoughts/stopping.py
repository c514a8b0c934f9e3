"""What the `generate` of transformers loses on its way to a decoding method: stop strings are handed over as a criterion.

A criterion of stop strings is made with the tokenizer that `generate` is given, and a `generate` with a decoding method
drops that tokenizer: strings of the call, of its generation_config or of the model's own would raise. Time limits, lengths,
ends and `stopping_criteria` reach the method as they are. Called by generation.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from inspect import Parameter, signature
from typing import Any

from transformers.generation import StoppingCriteriaList, StopStringCriteria

from ..base.errors import RecipeError


def named_options(
    generate: Callable[..., Any], inputs: tuple[Any, ...], options: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(positional arguments without a name, all others by name) of a call generate(self, *inputs, **options).

    TypeError if one is given twice.
    """
    parameters = list(signature(generate).parameters.values())[1:]
    names = [parameter.name for parameter in parameters if parameter.kind is Parameter.POSITIONAL_OR_KEYWORD]
    return inputs[len(names) :], dict(**dict(zip(names, inputs)), **options)


def with_stop_criterion(model: Any, options: dict[str, Any]) -> dict[str, Any]:
    """The same options of `generate`, their stop strings as a criterion in `stopping_criteria`.

    As in plain `generate`, a setting of the call counts before that of its generation_config, and this before the model's
    own; a StopStringCriteria in `stopping_criteria` takes the place of all strings. Strings without a tokenizer stay,
    and transformers says what is missing. RecipeError CFG-094 for token_healing, which would need the tokenizer too.
    """
    if _setting(model, options, "token_healing"):
        raise RecipeError(
            "generate(thoughts=...) does not go with token_healing; leave it out, or pass input_ids that model.heal_tokens "
            "has made",
            code="CFG-094",
        )
    strings = _setting(model, options, "stop_strings")
    if strings is None or options.get("tokenizer") is None:
        return options
    criteria: list[Any] = list(options.get("stopping_criteria") or ())
    if not any(type(criterion) is StopStringCriteria for criterion in criteria):
        criteria.append(StopStringCriteria(options["tokenizer"], strings))
    return _without_strings(model, options) | {"stopping_criteria": StoppingCriteriaList(criteria)}


def _setting(model: Any, options: Mapping[str, Any], name: str) -> Any:
    """What transformers takes: of the call, even None; else of its generation_config, else of the model's own."""
    if name in options:
        return options[name]
    given = getattr(options.get("generation_config"), name, None)
    return getattr(model.generation_config, name, None) if given is None else given


def _without_strings(model: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    found = {name: value for name, value in options.items() if name not in ("stop_strings", "tokenizer")}
    if getattr(found.get("generation_config"), "stop_strings", None) is not None:
        found["generation_config"] = deepcopy(found["generation_config"])
        found["generation_config"].stop_strings = None
    if model.generation_config.stop_strings is not None:
        found["stop_strings"] = None  # a None of the generation_config would be filled from the model's own
    return found
