"""Capacity, growth, crop into packed tokens, files, devices, bytes and refusals of LayerState."""

from __future__ import annotations

import json

import pytest
import torch
from quietgoose.base.errors import ArtifactError, RecipeError
from quietgoose.cache import LayerState, Policy
from safetensors.torch import load, save

from .state_tools import (
    HEADS,
    KV_HEADS,
    LOSSLESS,
    LOSSLESS_SINKS,
    PACKED,
    SCALING,
    TAIL,
    WIDTH,
    Plain,
    Source,
    check_same,
    codes,
    filled,
    go_on,
    make,
)


def equal(one: LayerState, other: LayerState) -> None:
    mine, theirs = one.tensors(), other.tensors()
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert torch.equal(mine[name], theirs[name]), name


# crop ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [PACKED, TAIL], ids=["packed", "tail"])
def test_crop_then_append_again_inside_the_tail_is_as_if_nothing_happened(policy: Policy) -> None:
    one, other = filled(policy, 8), filled(policy, 8)
    source = Source(2)
    query, key, value = source(2, 3)
    one.append(key, value)
    one.attend(query, scaling=SCALING)
    one.crop(3)
    for mine, theirs in zip(one.logical(), other.logical()):
        assert torch.equal(mine, theirs)
    first, second = (go_on(state, Source(3), 12) for state in (one, other))
    assert torch.equal(first, second)
    equal(one, other)


def test_crop_across_blocks_leaves_surviving_codes() -> None:
    for count in range(1, 30):
        state = filled(PACKED, 20)  # 17 prompt + 20 decoded, the last flush at 35
        before, columns = state.logical(), state.seq_length
        state.crop(count)
        after = state.logical()
        assert state.seq_length == columns - count
        for old, new in zip(before[:2], after[:2]):
            assert torch.equal(old[:, :, : columns - count], new)
        kept = state.packed_length
        source = Source(4)
        go_on(state, source, 15)
        assert torch.equal(state.logical()[0][:, :, :kept], before[0][:, :, :kept])
        assert state.seq_length == columns - count + 15


def test_crop_at_a_flush_boundary_or_with_one_group_stays_in_place() -> None:
    state = filled(PACKED, 20)
    state.crop(state.seq_length - 23)  # prompt of 17 and one flush of 6
    assert not state.history.segments
    assert state.high.lengths().tolist() == [8 + 4, 11 + 4]
    state.crop(3)
    assert len(state.history.segments) == 1  # heads disagree inside a flush: limited, and a new store
    single = filled(Policy(salient_ratio=1.0, flush_every=6, max_query=4), 20)
    blocks = single.high.num_blocks.tolist()
    single.crop(single.seq_length - 20)
    assert not single.history.segments
    assert single.high.lengths().tolist() == [15, 20]
    assert single.high.num_blocks.tolist() == [2, 2] != blocks
    assert single.high.block_start[0, :4].tolist() == [0, 12, 15, 15]
    go_on(single, Source(5), 7)
    assert single.high.num_blocks.tolist() == [3, 3]  # a new block, not the shortened one


def test_crop_to_nothing_and_refill() -> None:
    state, plain, source = make(LOSSLESS_SINKS), Plain(2), Source(6)
    for _ in range(3):
        query, key, value = source(2, 17)
        state.prefill(query, key, value, None, scaling=SCALING)
        plain.extend(key, value, None)
        check_same(state, plain)
        state.crop(15)
        plain.crop(15)
        check_same(state, plain)
    state.crop(state.seq_length)
    assert not state.tail.valid[:, :3].any()


# capacity -----------------------------------------------------------------------------------------------------------


def test_growing_and_static_arenas_hold_the_same() -> None:
    growing, static = filled(TAIL, 60), filled(TAIL, 60, capacity=100)
    for name, tensor in codes(growing).items():  # sums of attention differ in the last bit: other tile lengths
        assert torch.equal(tensor, codes(static)[name]), name
    addresses = [t.data_ptr() for t in static.static_tensors()]
    version = static.layout_version
    static.select(torch.tensor([1, 0]))
    go_on(static, Source(2), 20)
    assert addresses == [t.data_ptr() for t in static.static_tensors()]
    assert static.layout_version == version == 0
    assert growing.layout_version > 0


def test_capacity_is_refused_before_anything_changes() -> None:
    state = filled(TAIL, 9, capacity=30)
    before = state.tensors()
    query, key, value = Source(2)(2, 5)
    with pytest.raises(RecipeError, match=r"capacity is 30 tokens, needed are 31.*capacity=31"):
        state.prefill(query, key, value, None, scaling=SCALING)
    for name, tensor in state.tensors().items():
        assert torch.equal(tensor, before[name]), name
    go_on(state, Source(3), 4)
    with pytest.raises(RecipeError, match="needed are 31"):
        state.append(key[:, :, :1], value[:, :, :1])


def test_capacity_is_enough_however_tokens_arrive() -> None:
    for policy in (TAIL, PACKED, Policy(salient_ratio=0.999, flush_every=1, max_query=4)):
        state, source = make(policy, capacity=90), Source(4)
        for chunk in (1, 17, 33, 2):
            query, key, value = source(2, chunk)
            state.prefill(query, key, value, None, scaling=SCALING)
        go_on(state, source, 37)
        assert state.seq_length == 90


def test_many_tiny_chunks_in_static_arenas_say_what_to_do() -> None:
    state, source = make(Policy(salient_ratio=0.5, flush_every=128), capacity=200), Source(4)
    query, key, value = source(2, 1)

    def store_many() -> None:
        for _ in range(200):
            state.prefill(query, key, value, None, scaling=SCALING)

    with pytest.raises(RecipeError, match="longer chunks"):
        store_many()


# files and devices --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [PACKED, TAIL, LOSSLESS], ids=["packed", "tail", "lossless"])
@pytest.mark.parametrize("change", ["none", "crop", "fork", "static"])
def test_save_restore_continue_is_bit_exact(policy: Policy, change: str) -> None:
    state = filled(policy, 20, capacity=90 if change == "static" else None)
    if change == "crop":
        state.crop(13)
        go_on(state, Source(2), 3)
    if change == "fork":
        state = state.fork(2)
        go_on(state, Source(2), 9)
    meta = json.loads(json.dumps(state.meta()))
    restored = LayerState.from_tensors(policy, load(save(state.tensors())), meta)
    equal(state, restored)
    assert restored.meta() == state.meta()
    for mine, theirs in zip((state.high, state.low), (restored.high, restored.low)):
        assert torch.equal(mine.block_start, theirs.block_start)  # entries past the last block, too
    one, other = go_on(state, Source(5), 15), go_on(restored, Source(5), 15)
    assert torch.equal(one, other)
    equal(state, restored)


def test_damaged_or_foreign_files_are_refused() -> None:
    state = filled(TAIL)
    tensors, meta = state.tensors(), state.meta()
    with pytest.raises(ArtifactError, match="format 99"):
        LayerState.from_tensors(None, tensors, meta | {"format": 99})
    with pytest.raises(ArtifactError, match="policy"):
        LayerState.from_tensors(PACKED, tensors, meta)
    for name in ("tail.key", "store0.high.key_codes", "saliency.total"):
        with pytest.raises(ArtifactError, match="incomplete"):
            LayerState.from_tensors(None, {n: t for n, t in tensors.items() if n != name}, meta)
        with pytest.raises(ArtifactError, match="shape"):
            LayerState.from_tensors(None, tensors | {name: tensors[name][:, :1]}, meta)


def test_moving_takes_every_byte_along() -> None:
    state = filled(TAIL, 20)
    state.crop(9)
    child = state.fork(2)
    go_on(child, Source(2), 9)
    child.to("meta")
    everything = [*child.static_tensors(), child.sequence_id, *child.history.store.tensors().values()]
    assert {t.device.type for t in everything} == {"meta"}
    assert {t.device.type for t in state.static_tensors()} == {"cpu"}


# bytes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.6, 0.8])
@pytest.mark.parametrize("width", [64, 128])
def test_bytes_are_the_formula(width: int, ratio: float) -> None:
    batch, heads, blocks = 2, 3, 5
    tokens = 128 * blocks * 10 // 10
    policy = Policy(salient_ratio=ratio, flush_every=128)
    state = LayerState(policy, batch=batch, kv_heads=heads, head_dim=width, dtype=torch.bfloat16, device="cpu")
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(batch, heads, tokens, width, generator=generator).bfloat16() for _ in range(3))
    state.prefill(query, key, value, None, scaling=0.1)
    found = state.nbytes()
    elements = batch * heads * tokens * width * 2
    high = -(-tokens * int(ratio * 10) // 10)
    full_blocks = -(-high // 128) + -(-(tokens - high) // 128)
    assert found.codes * 8 == elements * (4 * ratio + 2 * (1 - ratio))
    per_block = full_blocks / (tokens / 128)
    expected_bits = 0.125 * per_block + 16 / width
    channels = 2 * batch * heads * width * 2  # once for each arena
    tables = batch * 4 * (full_blocks + 2) + 2 * batch * 4 + batch * 4
    assert found.parameters * 8 == round(elements * expected_bits) + channels * 8 + tables * 8
    assert found.bitmap * 8 == elements / (2 * width) + batch * tokens
    assert found.tail + found.saliency == 4 + 4 + batch * 8
    assert found.total == found.codes + found.parameters + found.bitmap + found.tail + found.saliency
    assert found.tokens == batch * tokens
    allocated = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in state.static_tensors()}
    assert sum(allocated.values()) + batch * 8 == found.total + found.unused_capacity


def test_padding_takes_no_bytes() -> None:
    full, padded = filled(PACKED, 0), make(PACKED)
    query, key, value = Source(1)(2, 17)
    valid = torch.ones(2, 17, dtype=torch.bool)
    valid[:, :12] = False
    padded.prefill(query, key, value, valid, scaling=SCALING)
    assert padded.nbytes().codes == 2 * KV_HEADS * WIDTH * 2 * (3 * 4 + 2 * 2) // 8
    assert padded.nbytes().codes < full.nbytes().codes


# refusals -----------------------------------------------------------------------------------------------------------


def test_gradients_are_refused() -> None:
    state = filled(LOSSLESS)
    query, key, value = Source(2)(2, 1)
    key.requires_grad_()
    with pytest.raises(RecipeError, match="gradients enabled"):
        state.append(key, value)
    with pytest.raises(RecipeError, match="gradients enabled"):
        state.attend(query.requires_grad_(), scaling=1.0)
    with pytest.raises(RecipeError, match="gradients enabled"):
        state.prefill(query, key, value, None, scaling=1.0)
    with torch.no_grad():
        state.append(key, value)
        state.attend(query, scaling=1.0)


def test_wrong_shapes_say_what_is_needed() -> None:
    state = make(PACKED)
    _, key, value = Source(2)(2, 5)
    with pytest.raises(RecipeError, match="max_query is 4"):
        state.append(key, value)
    with pytest.raises(RecipeError, match=r"needed is \(2, 2, 1, 8\) torch.float32"):
        state.append(key[:1, :, :1], value[:1, :, :1])
    with pytest.raises(RecipeError, match="float64"):
        state.append(key[:, :, :1].double(), value[:, :, :1].double())
    with pytest.raises(RecipeError, match="head_dim = 6"):
        make(PACKED, head_dim=6)
    with pytest.raises(RecipeError, match="fp16, bf16 and fp32"):
        make(PACKED, dtype=torch.int32)
    with pytest.raises(RecipeError, match="capacity is 0"):
        make(PACKED, capacity=0)
    with pytest.raises(RecipeError, match="0 times"):
        state.fork(0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_no_synchronisation_on_a_gpu() -> None:
    policy = Policy(salient_ratio=0.6, flush_every=16, sink_tokens=4, recent_tokens=8)
    state = LayerState(policy, batch=2, kv_heads=2, head_dim=64, dtype=torch.bfloat16, device="cuda", capacity=400)
    query = torch.randn(2, HEADS, 120, 64, device="cuda", dtype=torch.bfloat16)
    key, value = query[:, :2].clone(), query[:, 2:].clone()

    def work() -> None:
        state.prefill(query, key, value, None, scaling=0.125)
        for _ in range(40):
            state.append(key[:, :, :1], value[:, :, :1])
            state.attend(query[:, :, :1], scaling=0.125)
            state.append(key[:, :, :3], value[:, :, :3])
            state.attend(query[:, :, :3], scaling=0.125)
            state.crop(2)

    work()  # compiles
    state.reset()
    torch.cuda.set_sync_debug_mode("error")
    try:
        work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert codes(state)
