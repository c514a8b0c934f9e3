"""Probes, saliency and selection against brute force on materialised attention; planted flaws go red."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quietgoose.kernels.quantize import UnsupportedShape
from quietgoose.kernels.saliency import SaliencyMode, choose_probes, num_probes, probe_saliency, select_salient
from quietgoose.kernels.testing import assert_close, assert_same

ATTENTION_MODES = [SaliencyMode.EQ8, SaliencyMode.ROW_LENGTH, SaliencyMode.ACCUMULATED, SaliencyMode.AUTHORS_CODE]


def left_padded(n: int, *padding: int) -> torch.Tensor:
    valid = torch.ones(len(padding), n, dtype=torch.bool)
    for row, count in enumerate(padding):
        valid[row, :count] = False
    return valid


def rows_of(query: torch.Tensor, probes: torch.Tensor) -> torch.Tensor:
    return query.gather(2, probes.clamp(min=0)[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3]))


def problem(batch, heads, kv_heads, n, width, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, heads, n, width, generator=g, dtype=torch.float64)
    key = torch.randn(batch, kv_heads, n, width, generator=g, dtype=torch.float64)
    return query.to(dtype), key.to(dtype)


def brute_force(query, key, probes, valid, mode, scaling):
    """Python loops over one attention matrix per head."""
    batch, heads, n, _ = query.shape
    kv_heads = key.shape[1]
    out = torch.full((batch, kv_heads, n), float("-inf"), dtype=torch.float64)
    for b in range(batch):
        columns = torch.nonzero(valid[b]).flatten().tolist()
        chosen = [p for p in probes[b].tolist() if p >= 0]
        for h in range(kv_heads):
            for rank, i in enumerate(columns):
                total, count = 0.0, 0
                for k in (p for p in chosen if p >= i):
                    seen = [j for j in columns if j <= k]
                    for g in range(heads // kv_heads):
                        scores = key[b, h, seen].double() @ query[b, h * (heads // kv_heads) + g, k].double() * scaling
                        share = torch.softmax(scores, 0)[seen.index(i)].item()
                        total += share * (len(seen) if mode is SaliencyMode.ROW_LENGTH else 1)
                    count += 1
                divisor = {SaliencyMode.ACCUMULATED: 1, SaliencyMode.AUTHORS_CODE: len(columns) - rank}.get(mode, count)
                out[b, h, i] = total / max(divisor, 1)
    return out


@pytest.mark.parametrize("mode", ATTENTION_MODES)
@pytest.mark.parametrize(("heads", "kv_heads", "n"), [(3, 1, 1), (2, 2, 17), (6, 2, 25)])
def test_saliency_equals_brute_force(mode: SaliencyMode, heads: int, kv_heads: int, n: int) -> None:
    query, key = problem(2, heads, kv_heads, n, 8)
    valid = left_padded(n, 0, n // 3)
    if n > 20:
        valid[1, n // 2] = False  # a hole
    probes = choose_probes(valid, recent_fraction=0.15, random_fraction=0.2, mode=mode)
    got = probe_saliency(rows_of(query, probes), key, probes, valid, scaling=0.3, mode=mode)
    assert_close(mode, got, brute_force(query, key, probes, valid, mode, 0.3), limit=1e-12)


def test_the_wrong_denominator_is_seen() -> None:
    """Probe rows summed, all later rows counted (modeling_llama.py:793): it is a mode here, and not eq. 8."""
    query, key = problem(1, 2, 1, 30, 8)
    valid = left_padded(30, 0)
    probes = choose_probes(valid)
    flawed = probe_saliency(rows_of(query, probes), key, probes, valid, scaling=0.3, mode=SaliencyMode.AUTHORS_CODE)
    want = brute_force(query, key, probes, valid, SaliencyMode.EQ8, 0.3)
    with pytest.raises(AssertionError, match="relative RMSE"):
        assert_close("eq8", flawed, want, limit=1e-12)


def test_row_length_is_flat_under_uniform_attention() -> None:
    n = 200
    valid = left_padded(n, 0, 60)
    query, key = torch.zeros(2, 4, n, 16, dtype=torch.float64), torch.randn(2, 2, n, 16, dtype=torch.float64)
    probes = choose_probes(valid, random_fraction=0.2)
    got = probe_saliency(rows_of(query, probes), key, probes, valid, scaling=0.25, mode=SaliencyMode.ROW_LENGTH)
    for row in range(2):
        assert float((got[row][:, valid[row]] - 2.0).abs().max()) < 1e-12  # two query heads in a group
    biased = probe_saliency(rows_of(query, probes), key, probes, valid, scaling=0.25, mode=SaliencyMode.EQ8)
    assert biased[0, 0, 0] > 1.2 * biased[0, 0, -1]


def test_a_known_log_sum_exp_gives_the_same_scores() -> None:
    query, key = problem(2, 4, 2, 40, 8)
    valid = left_padded(40, 0, 11)
    probes = choose_probes(valid, random_fraction=0.3)
    rows = rows_of(query, probes)
    seen = (torch.arange(40) <= probes.unsqueeze(2)) & valid.unsqueeze(1)
    scores = 0.3 * rows @ key.repeat_interleave(2, 1).transpose(2, 3)
    lse = scores.masked_fill(~seen.unsqueeze(1), float("-inf")).logsumexp(-1)
    for mode in ATTENTION_MODES:
        want = probe_saliency(rows, key, probes, valid, scaling=0.3, mode=mode)
        assert_close(mode, probe_saliency(rows, key, probes, valid, scaling=0.3, mode=mode, lse=lse), want)


def test_padding_may_hold_anything() -> None:
    query, key = problem(2, 2, 2, 30, 8)
    valid = left_padded(30, 0, 12)
    probes = choose_probes(valid)
    rows = rows_of(query, probes)
    want = probe_saliency(rows, key, probes, valid, scaling=1.0)
    key[1, :, :12] = float("nan")
    rows[1, :, probes[1] < 0] = float("nan")
    assert_same("saliency", probe_saliency(rows, key, probes, valid, scaling=1.0), want)
    assert bool((want[1, :, :12] == float("-inf")).all())


def test_an_all_padding_row_has_no_probes_and_nothing_salient() -> None:
    query, key = problem(2, 2, 1, 20, 8)
    valid = left_padded(20, 20, 0)
    probes = choose_probes(valid)
    assert bool((probes[0] == -1).all())
    scores = probe_saliency(rows_of(query, probes), key, probes, valid, scaling=1.0)
    assert bool((scores[0] == float("-inf")).all())
    chosen = select_salient(scores, valid, 0.6)
    assert chosen.sum(-1).tolist() == [[0], [12]]


def check_probes(valid: torch.Tensor, probes: torch.Tensor) -> None:
    for row in range(len(valid)):
        found = [p for p in probes[row].tolist() if p >= 0]
        assert found == sorted(set(found))
        assert all(valid[row, p] for p in found)
        positions = torch.nonzero(valid[row]).flatten().tolist()
        recent = math.ceil(len(positions) * 0.05 - 1e-9)
        assert found[len(found) - recent :] == positions[len(positions) - recent :]
        assert len(found) == num_probes(len(positions))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=300), st.integers(0, 2**40), st.integers(0, 2**40))
def test_probes_are_valid_distinct_and_include_the_recent(flags: list[bool], seed: int, sequence: int) -> None:
    valid = torch.tensor([flags, flags[::-1]])
    check_probes(valid, choose_probes(valid, seed=seed, sequence_id=torch.tensor([sequence, 1])))


@pytest.mark.parametrize("n", [1, 2, 63, 100, 129])
def test_probes_of_a_row_do_not_depend_on_its_batch(n: int) -> None:
    padding = 41
    valid = left_padded(n + padding, padding, 0, 5)
    identity = torch.tensor([7, 8, 9])
    together = choose_probes(valid, seed=3, sequence_id=identity)
    alone = choose_probes(left_padded(n, 0), seed=3, sequence_id=identity[:1])
    count = alone.shape[1]
    assert_same("probes", together[0, :count] - padding, alone[0])
    assert bool((together[0, count:] == -1).all())


def test_the_seed_and_the_sequence_decide_the_draw() -> None:
    valid = left_padded(400, 0, 0)
    same = torch.tensor([5, 5])
    first = choose_probes(valid, seed=1, sequence_id=same)
    assert_same("twice", choose_probes(valid, seed=1, sequence_id=same), first)
    assert_same("rows of one id", first[0], first[1])
    assert not torch.equal(choose_probes(valid, seed=2, sequence_id=same), first)
    apart = choose_probes(valid, seed=1, sequence_id=torch.tensor([5, 6]))
    assert not torch.equal(apart[0], apart[1])


def test_random_probes_are_spread_evenly() -> None:
    valid = left_padded(1000, *[0] * 200)
    probes = choose_probes(valid, recent_fraction=0.0, random_fraction=0.05, sequence_id=torch.arange(200))
    counts = torch.bincount(probes.flatten() // 100, minlength=10).double()
    expected = probes.numel() / 10
    assert float(((counts - expected).square() / expected).sum()) < 30  # chi squared, 9 degrees: 1 in 2,000


def test_the_cap_holds_and_the_width_depends_on_n_only() -> None:
    assert [num_probes(n) for n in (1, 2, 20, 100, 4096, 10**6)] == [1, 2, 2, 10, 410, 512]
    assert choose_probes(left_padded(4096, 0, 4000), cap=100).shape == (2, 100)
    every = choose_probes(left_padded(30, 0, 10), mode=SaliencyMode.ACCUMULATED)
    assert every[0].tolist() == list(range(30))
    assert every[1].tolist() == [*range(10, 30), *[-1] * 10]


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_selection_takes_the_top_share_and_the_lower_of_ties(data) -> None:
    n = data.draw(st.integers(1, 40))
    valid = torch.tensor([data.draw(st.lists(st.booleans(), min_size=n, max_size=n))])
    forced = torch.tensor([data.draw(st.lists(st.booleans(), min_size=n, max_size=n))])
    scores = torch.tensor([[data.draw(st.lists(st.sampled_from([-1.0, 0.0, 0.5, 2.0]), min_size=n, max_size=n))]])
    percent = data.draw(st.integers(0, 100))
    got = select_salient(scores, valid, percent / 100, forced=forced)[0, 0].tolist()

    def place(i: int) -> tuple[bool, float, int]:
        first = bool(forced[0, i])
        return not first, 0.0 if first else -scores[0, 0, i].item(), i

    order = sorted((i for i in range(n) if valid[0, i]), key=place)
    want = set(order[: -(-percent * len(order) // 100)])
    assert got == [i in want for i in range(n)]


def test_selection_counts_are_equal_in_all_heads_even_with_nan() -> None:
    scores = torch.randn(2, 4, 50)
    scores[0, 1] = float("nan")
    scores[1, 2, ::2] = float("-inf")
    chosen = select_salient(scores, left_padded(50, 0, 13), 0.6)
    assert chosen.sum(-1).tolist() == [[30] * 4, [23] * 4]


def test_a_row_alone_and_padded_orders_its_tokens_alike() -> None:
    query, key = problem(1, 4, 2, 90, 16, dtype=torch.float32)
    pad = torch.full((1, 4, 33, 16), float("nan"))
    valid = left_padded(123, 33, 0)
    both_key = torch.cat([torch.cat([pad[:, :2], key], 2), torch.randn(1, 2, 123, 16)])
    both_query = torch.cat([torch.cat([pad, query], 2), torch.randn(1, 4, 123, 16)])
    probes = choose_probes(valid)
    together = probe_saliency(rows_of(both_query, probes), both_key, probes, valid, scaling=0.25)
    single = left_padded(90, 0)
    probes = choose_probes(single)
    alone = probe_saliency(rows_of(query, probes), key, probes, single, scaling=0.25)
    assert_same("order", together[0, :, 33:].argsort(stable=True), alone[0].argsort(stable=True))


def test_recent_and_random_need_no_attention() -> None:
    query, key = problem(2, 2, 2, 40, 8)
    valid = left_padded(40, 0, 10)
    probes = choose_probes(valid)
    arguments = {"scaling": 1.0, "sequence_id": torch.tensor([4, 4])}
    recent = probe_saliency(rows_of(query, probes), key, probes, valid, mode=SaliencyMode.RECENT, **arguments)
    assert torch.nonzero(select_salient(recent, valid, 0.1)[0, 1]).flatten().tolist() == [36, 37, 38, 39]
    random = probe_saliency(rows_of(query, probes), key, probes, valid, mode=SaliencyMode.RANDOM, **arguments)
    assert_same("random", random[1, :, 10:], random[0, :, :30])
    assert not torch.equal(random[0, 0], random[0, 1])
    other = probe_saliency(rows_of(query, probes), key, probes, valid, mode=SaliencyMode.RANDOM, seed=1, **arguments)
    assert not torch.equal(other, random)


def test_bad_input_is_named() -> None:
    query, key = problem(1, 3, 2, 10, 8)
    valid = left_padded(10, 0)
    probes = choose_probes(valid)
    with pytest.raises(UnsupportedShape, match="multiple of KV heads"):
        probe_saliency(rows_of(query, probes), key, probes, valid, scaling=1.0)
    with pytest.raises(UnsupportedShape, match="probes"):
        probe_saliency(query[:, :2], key, probes, valid, scaling=1.0)
    with pytest.raises(ValueError, match="must lie in 0"):
        select_salient(torch.zeros(1, 1, 10), valid, 1.5)
    with pytest.raises(ValueError, match="fractions must be"):
        choose_probes(valid, recent_fraction=0.0, random_fraction=0.0)
