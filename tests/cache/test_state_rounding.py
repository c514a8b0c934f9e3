"""Keys rounded with the queries in mind: the state hands the right queries to the kernels, and only where there are any."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch
from quietgoose.cache import PRESETS, Policy

from .state_tools import HEADS, KV_HEADS, SCALING, WIDTH, Source, make

AWARE = Policy(salient_ratio=1.0, low_bits=4, flush_every=8, max_query=4, rounding="queries")
NEAREST = dataclasses.replace(AWARE, rounding="nearest")


def narrow(query: torch.Tensor) -> torch.Tensor:
    """Queries that live near two directions."""
    g = torch.Generator().manual_seed(9)
    return query[..., :2] @ torch.randn(2, WIDTH, generator=g) + 0.1 * query


def scores(state, query: torch.Tensor, key: torch.Tensor) -> float:
    found, _, _ = state.logical()
    grouped = query.unflatten(1, (KV_HEADS, HEADS // KV_HEADS)).flatten(2, 3)
    return (grouped @ (found[:, :, : key.shape[2]] - key).transpose(-1, -2)).square().mean().item()


def test_a_prompt_and_a_later_chunk_keep_their_scores_better() -> None:
    source = Source(1)
    errors = {}
    first, second = (source(2, n) for n in (50, 40))
    for policy in (AWARE, NEAREST):
        state = make(policy)
        for query, key, value in (first, second):
            state.prefill(narrow(query), key, value, None, scaling=SCALING)
        keys = torch.cat([first[1], second[1]], 2)
        errors[policy.rounding] = scores(state, narrow(torch.cat([first[0], second[0]], 2)), keys)
    assert errors["queries"] < 0.5 * errors["nearest"]


def test_generated_tokens_are_rounded_to_nearest() -> None:
    source = Source(2)
    states = [make(policy) for policy in (AWARE, NEAREST)]
    for _ in range(12):
        query, key, value = source(2, 1)
        for state in states:
            state.append(key, value)
            state.attend(query, scaling=SCALING)
    assert states[0].packed_length > 0
    assert torch.equal(states[0].high.key_codes, states[1].high.key_codes)


def test_without_queries_there_is_a_warning_and_rounding_to_nearest() -> None:
    _, key, value = Source(3)(2, 30)
    aware, nearest = make(AWARE), make(NEAREST)
    with pytest.warns(UserWarning, match="rounded to nearest"):
        aware.prefill(None, key, value, None, scaling=SCALING)
    nearest.prefill(None, key, value, None, scaling=SCALING)
    assert torch.equal(aware.high.key_codes, nearest.high.key_codes)


def test_sixteen_bits_need_no_queries() -> None:
    policy = dataclasses.replace(AWARE, high_bits=16, low_bits=16)
    assert not policy.rounds_with_queries
    _, key, value = Source(4)(2, 30)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(policy).prefill(None, key, value, None, scaling=SCALING)


def test_bytes_are_those_of_rounding_to_nearest() -> None:
    query, key, value = Source(5)(2, 50)
    found = []
    for policy in (AWARE, NEAREST):
        state = make(policy)
        state.prefill(query, key, value, None, scaling=SCALING)
        found.append(state.nbytes())
    assert found[0] == found[1]


def test_the_quality_preset_rounds_with_queries() -> None:
    assert PRESETS["quality"].rounds_with_queries
    assert not PRESETS["paper"].rounds_with_queries
