"""Which tokens become salient: what the tail collects is brute-force attention over the window, in every mode."""

from __future__ import annotations

import pytest
import torch
from quietgoose.cache import LayerState, Policy
from quietgoose.kernels.saliency import SaliencyMode, choose_probes, probe_saliency, select_salient

from .state_tools import HEADS, KV_HEADS, SCALING, Plain, Source, make

# lossless codes: attention is exact, the choice is what is tested
POLICY = Policy(salient_ratio=0.5, high_bits=16, low_bits=16, flush_every=8, max_query=4)


def weights(query: torch.Tensor, plain: Plain) -> torch.Tensor:
    """fp64 [B, Hk, q, n]: attention of the last q columns, summed over the group."""
    columns, queries = plain.key.shape[2], query.shape[2]
    scores = query.double() @ plain.key.double().repeat_interleave(HEADS // KV_HEADS, 1).transpose(2, 3) * SCALING
    own = torch.arange(columns - queries, columns)
    mask = plain.valid[:, None, None] & (torch.arange(columns) <= own[:, None])
    attention = scores.masked_fill(~mask, -torch.inf).softmax(-1).nan_to_num(0.0)
    return attention.unflatten(1, (KV_HEADS, -1)).sum(2)


def decode(state: LayerState, plain: Plain, source: Source, steps: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Append and attend; (sum, count) fp64 of attention to every column [B, Hk, n], [n]."""
    total = torch.zeros(2, KV_HEADS, 64, dtype=torch.float64)
    count = torch.zeros(64)
    for queries in steps:
        query, key, value = source(2, queries)
        state.append(key, value)
        plain.extend(key, value, None)
        state.attend(query, scaling=SCALING)
        columns = plain.key.shape[2]
        total[:, :, :columns] += weights(query, plain).sum(2)
        for i in range(queries):
            count[: columns - i] += 1
    return total[..., : plain.key.shape[2]], count[: plain.key.shape[2]]


def test_decoded_evidence_is_brute_force_attention() -> None:
    state, plain, source = make(POLICY), Plain(2), Source(1)
    query, key, value = source(2, 12)
    state.prefill(query, key, value, None, scaling=SCALING)
    plain.extend(key, value, None)
    total, count = decode(state, plain, source, [1, 1, 3, 1, 2])
    found_total, found_count = state.window.evidence()
    assert torch.allclose(found_total.double(), total[:, :, 12:], atol=1e-5)
    assert torch.equal(found_count, count[12:].expand(2, -1))
    expected = select_salient((total / count)[:, :, 12:].float(), torch.ones(2, 8, dtype=torch.bool), 0.5)
    state.flush()
    assert torch.equal(state.history.store.salient()[:, :, 12:], expected)


def test_rejected_queries_leave_no_evidence() -> None:
    """Four candidates of which one is accepted, against one token alone."""
    one, other, source = make(POLICY), make(POLICY), Source(2)
    query, key, value = source(2, 12)
    for state in (one, other):
        state.prefill(query, key, value, None, scaling=SCALING)
    for _ in range(3):
        query, key, value = source(2, 4)
        one.append(key, value)
        one.attend(query, scaling=SCALING)
        one.crop(3)
        other.append(key[:, :, :1], value[:, :, :1])
        other.attend(query[:, :, :1], scaling=SCALING)
        for mine, theirs in zip(one.window.evidence(), other.window.evidence()):
            assert torch.allclose(mine, theirs, atol=1e-6)
    for state in (one, other):
        state.flush()
    assert torch.equal(one.history.store.salient(), other.history.store.salient())


def test_recents_carry_their_evidence_through_a_flush() -> None:
    policy = Policy(salient_ratio=0.5, high_bits=16, low_bits=16, flush_every=8, recent_tokens=5, max_query=4)
    state, plain, source = make(policy), Plain(2), Source(3)
    query, key, value = source(2, 40)
    state.prefill(query, key, value, None, scaling=SCALING)
    plain.extend(key, value, None)
    probes = choose_probes(torch.ones(2, 40, dtype=torch.bool), sequence_id=torch.arange(2))
    rows = query.gather(2, probes[:, None, :, None].expand(-1, HEADS, -1, query.shape[3]))
    prompt = probe_saliency(rows, key, probes, torch.ones(2, 40, dtype=torch.bool), scaling=SCALING)
    expected = select_salient(prompt[:, :, :35].contiguous(), torch.ones(2, 35, dtype=torch.bool), 0.5)
    assert torch.equal(state.history.store.salient(), expected)
    seen = torch.stack([(row[:, None] >= torch.arange(35, 40)).sum(0) for row in probes]).double()  # [B, 5]
    start = prompt[:, :, 35:].double() * seen.unsqueeze(1)
    total, count = decode(state, plain, source, [1] * 8)
    total, count = total[:, :, 35:].clone(), count[35:].expand(2, -1).clone()
    total[:, :, :5] += start
    count[:, :5] += seen
    found = state.window.evidence()
    assert torch.allclose(found[0].double(), total, atol=1e-5)
    assert torch.equal(found[1], count.float())
    state.flush()
    found = state.window.evidence()
    assert torch.allclose(found[0].double(), total[:, :, -5:], atol=1e-5)
    assert torch.equal(found[1], count[:, -5:].float())
    again, _ = decode(state, plain, source, [2, 1])
    found = state.window.evidence()
    assert torch.allclose(found[0].double()[:, :, :5], (total[:, :, -5:] + again[:, :, 43:48]), atol=1e-5)


@pytest.mark.parametrize("mode", list(SaliencyMode))
def test_every_mode_keeps_counts(mode: SaliencyMode) -> None:
    policy = Policy(salient_ratio=0.5, flush_every=8, recent_tokens=3, saliency=mode, max_query=4)
    state, plain, source = make(policy), Plain(2), Source(4)
    query, key, value = source(2, 21)
    valid = torch.ones(2, 21, dtype=torch.bool)
    valid[0, :6] = False
    state.prefill(query, key, value, valid, scaling=SCALING)
    assert state.high.lengths().tolist() == [6, 9]  # half of 12 and of 18
    plain.extend(key, value, valid)
    decode(state, plain, source, [1, 2, 1, 4, 1, 1, 1])
    assert state.high.lengths().tolist() == [10, 13]
    query, key, value = source(2, 9)
    state.prefill(query, key, value, None, scaling=SCALING)  # a chunk while the window holds tokens
    assert state.seq_length == 41
    assert (state.saliency is None) == (mode in ("recent", "random"))
    if mode is SaliencyMode.RECENT:
        assert state.history.store.salient()[1, 0, 9:18].all()


def test_probes_of_a_chunk_do_not_depend_on_padding() -> None:
    policy = Policy(salient_ratio=0.5, flush_every=8)
    together, alone, source = make(policy), make(policy, batch=1, sequence_id=torch.tensor([1])), Source(5)
    for tokens, padding in ((30, 11), (25, 0)):
        query, key, value = source(2, tokens)
        valid = torch.ones(2, tokens, dtype=torch.bool)
        valid[1, :padding] = False
        together.prefill(query, key, value, valid, scaling=SCALING)
        alone.prefill(*(t[1:, :, padding:] for t in (query, key, value)), None, scaling=SCALING)
    assert torch.equal(together.history.store.salient()[1:, :, 11:], alone.history.store.salient())


def test_without_queries_tokens_are_evenly_spaced_with_a_warning() -> None:
    policy = Policy(salient_ratio=0.8, flush_every=8)
    state, source = make(policy), Source(6)
    _, key, value = source(2, 20)
    with pytest.warns(UserWarning, match="evenly spaced"):
        state.prefill(None, key, value, None, scaling=SCALING)
    salient = state.history.store.salient()
    assert salient.sum(-1).unique().tolist() == [16]
    assert not salient[0, 0].logical_not().nonzero().diff(dim=0).eq(1).any()
    for _ in range(9):
        state.append(key[:, :, :1], value[:, :, :1])  # stock attention: never attended here
    assert state.history.store.salient()[:, :, 20:].sum(-1).unique().tolist() == [7]


def test_ratio_zero_and_one_need_no_saliency() -> None:
    for ratio, used, empty in ((0.0, "low", "high"), (1.0, "high", "low")):
        state, source = make(Policy(salient_ratio=ratio, flush_every=8)), Source(7)
        query, key, value = source(2, 20)
        state.prefill(query, key, value, None, scaling=SCALING)
        assert state.saliency is None
        assert getattr(state, used).lengths().tolist() == [20, 20]
        assert getattr(state, empty).lengths().tolist() == [0, 0]
