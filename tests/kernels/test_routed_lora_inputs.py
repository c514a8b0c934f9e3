"""Inputs that no model is meant to give the routed kernels and some do: turned in memory, or not finite at one token."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from quietgoose.kernels.routed_lora import group_shape
from quietgoose.kernels.testing import assert_close
from torch import Tensor

from .routed_lora_problems import check_grouped_gradients, exact, lists, problem

METHODS = ["decode", "fused", "stock", "grouped"]


def linears(p: Any, method: str) -> list[Tensor]:
    gates, tables = lists(p)
    shape = group_shape(p.ranks)
    return torch.ops.quietgoose.routed_linears(
        p.x, p.weights, [], p.a, p.b, gates, tables, shape.num_experts, shape.widest, p.k, False, method
    )


@pytest.mark.parametrize("method", METHODS)
def test_a_transposed_input_is_read_as_what_it_is(method: str) -> None:
    """What lies behind a convolution: channels are its slow axis in memory."""
    p = problem("k is N", torch.float32)
    turned = p._replace(x=p.x.t().contiguous().t())
    assert turned.x.stride() == (1, len(p.x))
    for y, w, update in zip(linears(turned, method), p.weights, exact(p)[2]):
        assert_close(method, y, p.x.double() @ w.double().t() + update)
    if method == "grouped":  # and where gradients are made
        for mine, usual in zip(check_grouped_gradients(turned, p.x.dtype), check_grouped_gradients(p, p.x.dtype)):
            assert_close("gradient", mine, usual.double(), direction="gradient")


@pytest.mark.parametrize("method", METHODS)
def test_a_token_that_is_not_finite_spoils_itself_alone(method: str) -> None:
    """No score of it is the largest; whatever expert it gets, it is one of those there are, and others keep theirs."""
    p = problem("k is N", torch.float32)
    want, spoilt = linears(p, method), p.x.clone()
    spoilt[7, 3] = float("nan")
    others = torch.arange(len(p.x), device=p.x.device) != 7
    for y, usual in zip(linears(p._replace(x=spoilt), method), want):
        assert not y[7].isfinite().any()
        torch.testing.assert_close(y[others], usual[others], rtol=1e-5, atol=1e-5)
    gates, tables = lists(p)
    _, index = torch.ops.quietgoose.route_experts(spoilt, p.vectors, gates[1:], tables, len(p.ranks[0]), p.k, False)
    assert 0 <= int(index.min()) <= int(index.max()) < len(p.ranks[0])
