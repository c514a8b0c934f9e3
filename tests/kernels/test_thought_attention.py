"""Thought attention: the reference equals a double loop, the path over stock kernels equals the reference."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from quietgoose.kernels.testing import assert_close, assert_same
from quietgoose.kernels.thought_attention import UnsupportedShape, fast, thought_attention

from .thought_problems import SHAPES, Problem

each_shape = pytest.mark.parametrize("shape", list(SHAPES.values()), ids=list(SHAPES))


def looped(problem: Problem) -> torch.Tensor:
    """Attention of one query at a time, one key at a time: what the definition says."""
    q, prefix_k, prefix_v, own_k, own_v = (x.double() for x in problem.tensors)
    B, H, A, S, M, D = q.shape
    filled = problem.N if problem.used is None else problem.used
    scale = D**-0.5 if problem.scale is None else problem.scale
    out = torch.zeros_like(q)
    for b, h, a, s, m in torch.cartesian_prod(*(torch.arange(n) for n in (B, H, A, S, M))).tolist():
        anchor, k = int(problem.anchor[b, a]), h // problem.G
        if anchor < 0:
            continue
        pairs = [(prefix_k[b, k, i], prefix_v[b, k, i]) for i in range(int(problem.start[b, a]), anchor + 1)]
        pairs += [(own_k[b, k, a, s, n], own_v[b, k, a, s, n]) for n in range(filled - M + m + 1)]
        weights = [math.exp(scale * float(q[b, h, a, s, m] @ key)) for key, _ in pairs]
        out[b, h, a, s, m] = sum(w / sum(weights) * value for w, (_, value) in zip(weights, pairs))
    return out


@each_shape
def test_the_reference_equals_a_loop_over_queries_and_keys(shape) -> None:
    if shape.get("L", 9) > 40 or shape.get("D", 16) > 64:
        shape = {**shape, "D": 8}
    problem = Problem(**shape)
    got = problem.run(dtype=torch.float64, implementation="reference")["out"]
    assert_close("out", got, looped(problem))


def test_the_references_gradients_are_those_of_finite_differences() -> None:
    problem = Problem(B=1, K=1, G=2, A=2, S=2, M=2, L=4, D=2, anchors=[[1, 3]]).cast(torch.float64)
    call = partial(
        thought_attention, anchor_BA=problem.anchor, start_BA=problem.start, implementation="reference"
    )  # fmt: skip
    inputs = [x.contiguous().requires_grad_() for x in problem.tensors]
    assert torch.autograd.gradcheck(call, inputs)


@each_shape
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
def test_stock_equals_the_reference(shape, dtype) -> None:
    Problem(**shape).cast(dtype).check(implementation="stock")


def test_stock_in_bf16() -> None:
    Problem(B=2, K=2, G=3, A=9, S=2, M=4, L=33, D=64).cast(torch.bfloat16).check(implementation="stock")


@pytest.mark.parametrize(("first", "A", "L"), [(0, 12, 12), (0, 12, 15), (5, 4, 15), (14, 1, 15)])
def test_consecutive_anchors_take_the_causal_kernel(first: int, A: int, L: int) -> None:
    """All positions of a row, without its last ones, and a chunk of anchors in the middle."""
    anchors = [list(range(first, first + A))] * 2
    problem = Problem(B=2, K=2, G=3, S=2, M=3, L=L, anchors=anchors).cast(torch.float64)
    problem.check(implementation="stock", consecutive_from=first)
    problem.check(implementation="reference", consecutive_from=first)


def test_consecutive_anchors_may_have_padding_among_them() -> None:
    problem = Problem(B=2, K=2, G=3, S=2, M=3, L=7, anchors=[[0, 1, -1, 3, 4, 5, -1], [-1, 1, 2, 3, 4, 5, 6]])
    problem.cast(torch.float64).check(implementation="stock", consecutive_from=0)


def test_one_thought_position_and_no_prefix_beyond_the_anchor_is_ordinary_attention() -> None:
    """A branch of one position at anchor i that carries token i + 1's own q, k, v gives that token's causal output."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 10, 8, dtype=torch.float64)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    branch = [x[:, :, 1:, None, None] for x in (q, k, v)]
    anchor = torch.arange(9).expand(2, 9)
    got = thought_attention(branch[0], k, v, branch[1], branch[2], anchor, torch.zeros_like(anchor))
    assert_close("out", got[:, :, :, 0, 0], want[:, :, 1:])


def test_later_text_and_other_branches_are_never_seen() -> None:
    problem = Problem(B=1, K=1, G=2, S=2, M=3, L=30, anchors=[[4, 11, 25]], documents=(0, 9))
    before = problem.run()["out"]
    problem.tensors[1][:, :, 12:] += 3.0
    problem.tensors[2][:, :, :9] -= 2.0
    problem.tensors[3][:, :, 0] *= 2.0
    problem.tensors[4][:, :, 1, 1] *= 2.0
    after = problem.run()["out"]
    assert_same("anchor 11, sample 0", after[:, :, 1, 0], before[:, :, 1, 0])
    assert not torch.equal(after[:, :, 0], before[:, :, 0])
    assert not torch.equal(after[:, :, 1, 1], before[:, :, 1, 1])
    assert not torch.equal(after[:, :, 2], before[:, :, 2])


@pytest.mark.parametrize("implementation", ["reference", "stock"])
def test_a_rollout_step_by_step_gives_the_gradient_passs_outputs(implementation: str) -> None:
    whole = Problem(B=2, K=2, G=2, A=5, S=2, M=4, L=20).cast(torch.float64)
    q, prefix_k, prefix_v, own_k, own_v = whole.tensors
    want = whole.run(implementation=implementation)["out"]
    room = [torch.full((*x.shape[:4], 6, x.shape[5]), float("nan"), dtype=x.dtype) for x in (own_k, own_v)]
    for m in range(4):
        for store, x in zip(room, (own_k, own_v)):
            store[..., m, :] = x[..., m, :]
        got = thought_attention(
            q[..., m : m + 1, :], prefix_k, prefix_v, *room, whole.anchor, whole.start, torch.tensor(m + 1),
            implementation=implementation,
        )  # fmt: skip
        assert_close(f"step {m}", got, want[..., m : m + 1, :])


def test_the_length_may_be_a_number() -> None:
    problem = Problem(**SHAPES["rollout"])
    assert_same("out", problem.run(length_on_device=False)["out"], problem.run()["out"])


def test_auto_is_stock_on_the_cpu_and_no_branch_is_no_work() -> None:
    problem = Problem(**SHAPES["sparse"])
    assert_same("out", problem.run()["out"], problem.run(implementation="stock")["out"])
    empty = [torch.zeros(1, 2, 0, 1, 3, 8), *torch.zeros(2, 1, 2, 5, 8), *torch.zeros(2, 1, 2, 0, 1, 3, 8)]
    none = torch.zeros(1, 0, dtype=torch.int64)
    assert thought_attention(*empty, none, none).shape == (1, 2, 0, 1, 3, 8)


def test_only_the_gradients_asked_for() -> None:
    problem = Problem(**SHAPES["sparse"]).cast(torch.float64)
    inputs = [x.clone() for x in problem.tensors]
    inputs[1].requires_grad_()
    out = thought_attention(*inputs, problem.anchor, problem.start)
    assert_close("dprefix_k", torch.autograd.grad(out, inputs[1], problem.grad)[0], problem.run()["dprefix_k"])


def test_what_does_not_fit_is_named() -> None:
    problem = Problem(B=1, K=2, G=2, A=3, S=1, M=2, L=9)
    q, k, v, own_k, own_v = problem.tensors
    tail = (problem.anchor, problem.start)
    with pytest.raises(UnsupportedShape, match="multiple of K"):
        thought_attention(q[:, :3], k, v, own_k, own_v, *tail)
    with pytest.raises(UnsupportedShape, match="own_v"):
        thought_attention(q, k, v, own_k, own_v[:, :, :2], *tail)
    with pytest.raises(UnsupportedShape, match="N at least M"):
        thought_attention(q, k, v, own_k[..., :1, :], own_v[..., :1, :], *tail)
    with pytest.raises(UnsupportedShape, match=r"prefix_v of torch\.float64"):
        thought_attention(q, k, v.double(), own_k, own_v, *tail)
    with pytest.raises(UnsupportedShape, match="must be int64"):
        thought_attention(q, k, v, own_k, own_v, problem.anchor.int(), problem.start)
    with pytest.raises(UnsupportedShape, match="last anchor would be 9"):
        thought_attention(q, k, v, own_k, own_v, *tail, consecutive_from=7)


def test_fold_is_undone_by_unfold() -> None:
    from quietgoose.kernels.thought_attention.layout import Shape

    x = torch.randn(2, 6, 5, 2, 3, 4)
    shape = Shape(B=2, H=6, K=2, A=5, S=2, M=3, N=3, L=5, D=4)
    folded = fast.fold(x, 2)
    assert folded.shape == (4, 2 * 3 * 3, 5, 4)
    assert_same("unfold", fast.unfold(folded, shape).flatten(1, 2), x)
