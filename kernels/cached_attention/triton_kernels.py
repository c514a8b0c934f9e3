"""First Triton launch of `cached_attention`: partial attention over ranges of slots.

Why it is cheap (README.md has the algebra and the counts): codes are never converted. Two bytes of codes are one
16-bit word; masking a field of the word leaves u * 2^k in the low bits of an fp16, a subnormal number that is worth
exactly u * 2^(k-24), and tensor cores multiply subnormals exactly. So a field costs one AND for two values, its factor
2^k is folded into q (keys) or taken out of the accumulator at the end (values), and the loads are plain matrix loads.

One program reads one precision of one (row, KV head): tiles of the high arena, of the low arena, or 32 tail slots.
Rows are r = (s * G + g) * q + i: thought s, head g of the group, query i. Second launch: triton_reduce.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
BLOCK_SLOTS = tl.constexpr(128)  # slots of a block at most (quantize/layout.py)
TAIL_TILE = tl.constexpr(32)


@triton.jit
def _field(x, SHIFT: tl.constexpr, BITS: tl.constexpr, INTERPRET: tl.constexpr):
    """The code at bit SHIFT of each 16-bit word as an fp16 worth u * 2^(SHIFT - 24). SHIFT + BITS is at most 8."""
    if INTERPRET:
        return (x & (((1 << BITS) - 1) << SHIFT)).to(tl.float16, bitcast=True)
    if BITS == 4:
        if SHIFT == 0:
            y = tl.inline_asm_elementwise("and.b32 $0, $1, 0x000f000f;", "=r,r", [x], tl.float16, True, 2)
        else:
            y = tl.inline_asm_elementwise("and.b32 $0, $1, 0x00f000f0;", "=r,r", [x], tl.float16, True, 2)
    elif SHIFT == 0:
        y = tl.inline_asm_elementwise("and.b32 $0, $1, 0x00030003;", "=r,r", [x], tl.float16, True, 2)
    elif SHIFT == 2:
        y = tl.inline_asm_elementwise("and.b32 $0, $1, 0x000c000c;", "=r,r", [x], tl.float16, True, 2)
    elif SHIFT == 4:
        y = tl.inline_asm_elementwise("and.b32 $0, $1, 0x00300030;", "=r,r", [x], tl.float16, True, 2)
    else:
        y = tl.inline_asm_elementwise("and.b32 $0, $1, 0x00c000c0;", "=r,r", [x], tl.float16, True, 2)
    return y


@triton.jit
def _high_bytes(x, INTERPRET: tl.constexpr):
    """The upper byte of each word in the place of the lower one (the bits above it are left undefined)."""
    if INTERPRET:
        return x >> 8
    return tl.inline_asm_elementwise("shr.b32 $0, $1, 8;", "=r,r", [x], tl.int16, True, 2)


@triton.jit
def _channels(f: tl.constexpr, HEAD_DIM: tl.constexpr, BITS: tl.constexpr, BYTES: tl.constexpr):
    """Channels of field f of each word: byte 2e + f // H holds, in its field h = (H - 1) & f, channel byte + h * width."""
    H: tl.constexpr = 8 // BITS
    width: tl.constexpr = HEAD_DIM // H
    if BYTES:
        return tl.arange(0, width) + f * width
    else:
        return 2 * tl.arange(0, width // 2) + f // H + ((H - 1) & f) * width


@triton.jit
def _share_of(n_high, n_low, arena_parts, WEIGHT_HIGH: tl.constexpr, WEIGHT_LOW: tl.constexpr):
    """How many of the programs take the high arena, in proportion to the work that its tiles are."""
    cost = n_high * WEIGHT_HIGH + n_low * WEIGHT_LOW
    parts = (arena_parts * n_high * WEIGHT_HIGH + cost // 2) // tl.maximum(cost, 1)
    parts = tl.maximum(parts, tl.minimum(n_high, 1))
    return tl.minimum(parts, arena_parts - tl.minimum(n_low, 1))


@triton.jit
def _row_scale(q_max):
    """2^floor(log2 q_max) and its inverse, exactly."""
    exponent = tl.maximum(q_max, 1e-30).to(tl.int32, bitcast=True) & 0x7F800000
    return exponent.to(tl.float32, bitcast=True), (0x7F000000 - exponent).to(tl.float32, bitcast=True)


@triton.jit
def _channel_pairs(
    p_parameter, h, HEAD_DIM: tl.constexpr, BITS: tl.constexpr, BYTES: tl.constexpr, INTERPRET: tl.constexpr
):
    """fp16 parameters of the channels in field h of the lower and of the upper byte of each word: two times [words].

    They lie in pairs: one 32-bit load brings both, and it is wide enough to be copied ahead of time.
    """
    WIDTH: tl.constexpr = HEAD_DIM * BITS // 8
    if BYTES:
        both = tl.load(p_parameter.to(tl.pointer_type(tl.float16)) + h * WIDTH + tl.arange(0, WIDTH))
        return both, both
    else:
        pair = tl.load(p_parameter + h * (WIDTH // 2) + tl.arange(0, WIDTH // 2))
        if INTERPRET:
            lower = pair.to(tl.int16).to(tl.float16, bitcast=True)
            return lower, (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True)
        else:
            lower = tl.inline_asm_elementwise("cvt.u16.u32 $0, $1;", "=h,r", [pair], tl.float16, True, 1)
            upper = tl.inline_asm_elementwise("mov.b32 {_, $0}, $1;", "=h,r", [pair], tl.float16, True, 1)
            return lower, upper


@triton.jit
def _tile_slots(p_start, tile, TILE: tl.constexpr, TILES: tl.constexpr):
    """(first slot, slots left in the block) of a tile; the latter is not positive past the end of a short block."""
    block = tile // TILES
    begin = tl.load(p_start + block) + (tile - block * TILES) * TILE
    return begin.to(tl.int64), tl.load(p_start + block + 1) - begin


@triton.jit
def _packed_part(
    p_q, m_row, limit, p_key, p_value, p_scale, p_min, p_key_scale, p_key_min, p_channel, p_start,
    first, last, factor, p_out, p_lse,
    HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, BITS: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
    LIMITS: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Tiles [first, last) of a packed arena; tile = TILE slots of a block, BLOCK_SLOTS // TILE tiles a block."""
    H: tl.constexpr = 8 // BITS  # fields of a byte
    BYTES: tl.constexpr = HEAD_DIM * BITS // 16 < 16  # too narrow for matrix products over words
    FIELDS: tl.constexpr = H if BYTES else 2 * H
    WIDTH: tl.constexpr = HEAD_DIM // FIELDS
    TILES: tl.constexpr = BLOCK_SLOTS // TILE
    if BYTES:
        p_key, p_value = p_key.to(tl.pointer_type(tl.uint8)), p_value.to(tl.pointer_type(tl.uint8))
    i_slot, i_word = tl.arange(0, TILE), tl.arange(0, WIDTH)
    # per-slot parameters of the next tile are on their way while this one is computed
    begin, count = _tile_slots(p_start, first, TILE, TILES)
    next_scale = tl.load(p_scale + begin + i_slot, mask=i_slot < count, other=0)
    next_minimum = tl.load(p_min + begin + i_slot, mask=i_slot < count, other=0)
    queries, planes, acc = (), (), ()
    largest = tl.zeros([WIDTH, ROWS], tl.float32)
    for f in tl.static_range(FIELDS):
        q = tl.load(p_q[None, :] + _channels(f, HEAD_DIM, BITS, BYTES)[:, None], mask=m_row[None, :], other=0)
        queries = queries + (q.to(tl.float32),)
        largest = tl.maximum(largest, tl.abs(queries[f]))
    power, inverse = _row_scale(tl.max(largest, 0))
    for f in tl.static_range(FIELDS):
        planes = planes + ((queries[f] * (inverse * 2.0 ** (4 - BITS * ((H - 1) & f)))[None, :]).to(tl.float16),)
        acc = acc + (tl.zeros([WIDTH, ROWS], tl.float32),)
    score_scale = power * (factor * LOG2E * 2.0**20)
    zeta_scale = power * (factor * LOG2E)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([TILE, ROWS], tl.float32)
    for i_tile in tl.range(0, last - first, num_stages=STAGES):
        tile = first + i_tile
        begin, count = _tile_slots(p_start, tile, TILE, TILES)
        live = i_slot < count
        keys = tl.load(p_key + begin * WIDTH + (i_slot[:, None] * WIDTH + i_word[None, :]), mask=live[:, None], other=0)
        values = tl.load(
            p_value + begin * WIDTH + (i_slot[None, :] * WIDTH + i_word[:, None]), mask=live[None, :], other=0
        )
        if BYTES:
            keys, values = keys.to(tl.int16), values.to(tl.int16)
        key_scale, key_min = (), ()
        o_block = (tile // TILES).to(tl.int64) * (HEAD_DIM // 2)  # channels lie in pairs
        for h in tl.static_range(H):
            key_scale = key_scale + _channel_pairs(p_key_scale + o_block, h, HEAD_DIM, BITS, BYTES, INTERPRET)
            key_min = key_min + _channel_pairs(p_key_min + o_block, h, HEAD_DIM, BITS, BYTES, INTERPRET)
        scale, minimum = next_scale, next_minimum
        next_tile = tl.minimum(tile + 1, last - 1)
        next_begin, next_count = _tile_slots(p_start, next_tile, TILE, TILES)
        next_scale = tl.load(p_scale + next_begin + i_slot, mask=i_slot < next_count, other=0)
        next_minimum = tl.load(p_min + next_begin + i_slot, mask=i_slot < next_count, other=0)
        # raw = sum_j (q_j s_j) u_j in units of 2^-20, zeta = q . z through a product of 16 equal rows
        raw = tl.zeros([TILE, ROWS], tl.float32)
        zetas = tl.zeros([16, ROWS], tl.float32)
        for h in tl.static_range(H):
            part = tl.zeros([16, ROWS], tl.float32)
            for b in tl.static_range(FIELDS // H):
                word = _high_bytes(keys, INTERPRET) if b == 1 else keys
                scaled_q = planes[b * H + h] * key_scale[2 * h + b][:, None]
                raw = tl.dot(_field(word, BITS * h, BITS, INTERPRET), scaled_q, raw)
                minima = tl.broadcast_to(key_min[2 * h + b][None, :], [16, WIDTH])
                part = tl.dot(minima, planes[b * H + h], part)
            zetas += part * 2.0 ** (BITS * h - 4)
        zeta = tl.max(zetas, 0) * zeta_scale
        if LIMITS:
            raw = tl.where(live[:, None] & ((begin + i_slot)[:, None] < limit[None, :]), raw, float("-inf"))
        else:
            raw = tl.where(live[:, None], raw, float("-inf"))
        # softmax in base 2; weights carry 2^8 so that small ones stay normal numbers in fp16
        peak = tl.maximum(top, tl.max(raw, 0) * score_scale + zeta)
        safe = tl.where(peak == float("-inf"), 0.0, peak)
        weight = tl.exp2(raw * score_scale[None, :] + (zeta - safe + 8.0)[None, :])
        decay = tl.exp2(top - safe)[None, :]
        top = peak
        total = total * decay + weight
        mu = tl.sum(weight * minimum.to(tl.float32)[:, None], 0)
        scaled = (weight * scale.to(tl.float32)[:, None]).to(tl.float16)
        fresh = ()
        for f in tl.static_range(FIELDS):
            word = _high_bytes(values, INTERPRET) if f >= H else values
            start = tl.broadcast_to((mu * 2.0 ** (BITS * ((H - 1) & f) - 24))[None, :], [WIDTH, ROWS])
            part = tl.dot(_field(word, BITS * ((H - 1) & f), BITS, INTERPRET), scaled, start)
            fresh = fresh + (acc[f] * decay + part,)
        acc = fresh
    total = tl.sum(total, 0)
    norm = 1.0 / tl.where(total == 0.0, 1.0, total)
    channel = ()
    for h in tl.static_range(H):
        channel = channel + _channel_pairs(p_channel, h, HEAD_DIM, BITS, BYTES, INTERPRET)
    for f in tl.static_range(FIELDS):
        p_channels = p_out[None, :] + _channels(f, HEAD_DIM, BITS, BYTES)[:, None]
        c = channel[2 * ((H - 1) & f) + f // H].to(tl.float32)[:, None]
        tl.store(p_channels, acc[f] * c * (norm * 2.0 ** (24 - BITS * ((H - 1) & f)))[None, :], mask=m_row[None, :])
    tl.store(p_lse, tl.where(total == 0.0, float("-inf"), top + tl.log2(total) - 8.0), mask=m_row)


@triton.jit
def _plain_tile(
    q, p_key, p_value, slot, load, visible, factor, top, total, acc, HEAD_DIM: tl.constexpr, INTERPRET: tl.constexpr
):
    """One tile of 16-bit slots: (scores [T, rows] in base 2, top, total, acc). Slots without `load` are never used."""
    p_tile = slot.to(tl.int64)[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]
    key = tl.load(p_key + p_tile, mask=load[:, None], other=0)
    value = tl.load(p_value + p_tile, mask=load[:, None], other=0)
    if INTERPRET:  # its matrix product does not know bf16
        q, key, value = q.to(tl.float32), key.to(tl.float32), value.to(tl.float32)
    score = tl.where(visible, tl.dot(key, q) * (factor * LOG2E), float("-inf"))
    peak = tl.maximum(top, tl.max(score, 0))
    safe = tl.where(peak == float("-inf"), 0.0, peak)
    weight = tl.exp2(score - safe[None, :])
    decay = tl.exp2(top - safe)
    total = total * decay + tl.sum(weight, 0)
    acc = tl.dot(tl.trans(value), weight.to(value.dtype), acc * decay[None, :])
    return score, peak, total, acc


@triton.jit
def _store_part(acc, top, total, m_row, p_out, p_lse, HEAD_DIM: tl.constexpr):
    norm = 1.0 / tl.where(total == 0.0, 1.0, total)
    tl.store(p_out[None, :] + tl.arange(0, HEAD_DIM)[:, None], acc * norm[None, :], mask=m_row[None, :])
    tl.store(p_lse, tl.where(total == 0.0, float("-inf"), top + tl.log2(total)), mask=m_row)


@triton.jit
def _plain_part(
    p_q, m_row, limit, p_key, p_value, first, last, length, factor, p_out, p_lse,
    HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr, LIMITS: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """Tiles [first, last) of TILE slots of a 16-bit arena with `length` slots in use."""
    q = tl.load(p_q[None, :] + tl.arange(0, HEAD_DIM)[:, None], mask=m_row[None, :], other=0)
    acc = tl.zeros([HEAD_DIM, ROWS], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for i_tile in tl.range(0, last - first, num_stages=STAGES):
        slot = (first + i_tile) * TILE + tl.arange(0, TILE)
        live = slot < length
        visible = live[:, None]
        if LIMITS:
            visible = visible & (slot[:, None] < limit[None, :])
        _, top, total, acc = _plain_tile(
            q, p_key, p_value, slot, live, visible, factor, top, total, acc, HEAD_DIM, INTERPRET
        )
    _store_part(acc, top, total, m_row, p_out, p_lse, HEAD_DIM)


@triton.jit
def _tail_part(
    p_q, m_row, m_mine, first_rows, position, tail_row, kv_head, part, kv_heads, query_length,
    p_tail_key, p_tail_value, p_tail_valid, p_tail_length, tail_width,
    p_total, p_pending, p_accepted, p_scores, factor, p_out, p_lse,
    HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, PENDING: tl.constexpr, SALIENCY: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """Slots [part * 32, part * 32 + 32) of one row of the tail, for the rows m_mine that are its own."""
    slot = part * TAIL_TILE + tl.arange(0, TAIL_TILE)
    inside = slot < tail_width
    line = (tail_row * kv_heads + kv_head).to(tl.int64)
    if SALIENCY and first_rows:
        accepted = tl.load(p_accepted)
        i_query = tl.arange(0, PENDING)
        p_fold = p_pending + (line * PENDING + i_query[:, None]) * tail_width + slot[None, :]
        gained = tl.load(p_fold, mask=(i_query < accepted)[:, None] & inside[None, :], other=0.0)
        p_sum = p_total + line * tail_width + slot
        tl.store(p_sum, tl.load(p_sum, mask=inside, other=0.0) + tl.sum(gained, 0), mask=inside)
    length = tl.load(p_tail_length)
    if part * TAIL_TILE < length:
        valid = tl.load(p_tail_valid + tail_row.to(tl.int64) * tail_width + slot, mask=inside, other=0)
        load = inside & (slot < length) & (valid != 0)
        visible = load[:, None] & (slot[:, None] < (length - query_length + 1 + position)[None, :])
        q = tl.load(p_q[None, :] + tl.arange(0, HEAD_DIM)[:, None], mask=m_row[None, :], other=0)
        acc = tl.zeros([HEAD_DIM, ROWS], tl.float32)
        top = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        base = line * tail_width * HEAD_DIM
        score, top, total, acc = _plain_tile(
            q, p_tail_key + base, p_tail_value + base, slot, load, visible & m_mine[None, :], factor,
            top, total, acc, HEAD_DIM, INTERPRET,
        )  # fmt: skip
        _store_part(acc, top, total, m_row, p_out, p_lse, HEAD_DIM)
        if SALIENCY:
            tl.store(p_scores[None, :] + slot[:, None], score, mask=m_mine[None, :] & inside[:, None])
    else:
        tl.store(p_lse, tl.full([ROWS], float("-inf"), tl.float32), mask=m_row)


@triton.jit
def _arena_part(
    p_q, m_row, limit, p_key, p_value, p_scale, p_min, p_key_scale, p_key_min, p_channel, p_start, blocks,
    line, slots, capacity, part, parts, factor, p_out, p_lse,
    HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, BITS: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
    PLAIN_TILE: tl.constexpr, PLAIN_STAGES: tl.constexpr, LIMITS: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Part `part` of `parts` of one row and head of an arena: tiles are dealt out evenly, first come the early ones."""
    if BITS == 16:
        length = tl.load(p_start + blocks)
        tiles = tl.cdiv(length, PLAIN_TILE)
    else:
        tiles = blocks * (BLOCK_SLOTS // TILE)
    first = (part * tiles) // parts
    last = ((part + 1) * tiles) // parts
    if first >= last:
        tl.store(p_lse, tl.full([ROWS], float("-inf"), tl.float32), mask=m_row)
    elif BITS == 16:
        base = line * slots * HEAD_DIM
        _plain_part(
            p_q, m_row, limit, p_key + base, p_value + base, first, last, length, factor, p_out, p_lse,
            HEAD_DIM, ROWS, PLAIN_TILE, PLAIN_STAGES, LIMITS, INTERPRET,
        )  # fmt: skip
    else:
        base = line * slots * (HEAD_DIM * BITS // 16)
        o_block = line * capacity * (HEAD_DIM // 2)  # channels lie in pairs
        _packed_part(
            p_q, m_row, limit, p_key + base, p_value + base, p_scale + line * slots, p_min + line * slots,
            p_key_scale + o_block, p_key_min + o_block, p_channel + line * (HEAD_DIM // 2), p_start,
            first, last, factor, p_out, p_lse, HEAD_DIM, ROWS, BITS, TILE, STAGES, LIMITS, INTERPRET,
        )  # fmt: skip


# sizes that change while a cache grows: one compiled kernel for all of them
SIZES = ["hi_slots", "hi_capacity", "lo_slots", "lo_capacity", "limit_share", "tail_width", "tail_parts"]
SIZES += ["kv_heads", "query_length", "rows", "arena_parts"]


@triton.jit(do_not_specialize=SIZES)
def attend_kernel(
    p_query, stride_qb, stride_qh, stride_qi,
    p_hi_key, p_hi_value, p_hi_scale, p_hi_min, p_hi_key_scale, p_hi_key_min, p_hi_channel, p_hi_start, p_hi_blocks,
    p_lo_key, p_lo_value, p_lo_scale, p_lo_min, p_lo_key_scale, p_lo_key_min, p_lo_channel, p_lo_start, p_lo_blocks,
    hi_slots, hi_capacity, lo_slots, lo_capacity,
    p_hi_limit, p_lo_limit, limit_share,
    p_tail_key, p_tail_value, p_tail_valid, p_tail_length, tail_width, tail_parts,
    p_total, p_pending, p_accepted, p_scores,
    p_part_out, p_part_lse, kv_heads, query_length, rows, arena_parts, factor,
    HEAD_DIM: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, HIGH_BITS: tl.constexpr, LOW_BITS: tl.constexpr,
    TILE: tl.constexpr, STAGES: tl.constexpr, WEIGHT_HIGH: tl.constexpr, WEIGHT_LOW: tl.constexpr,
    PLAIN_TILE: tl.constexpr, PLAIN_STAGES: tl.constexpr, LIMITS: tl.constexpr, SALIENCY: tl.constexpr,
    PENDING: tl.constexpr, ONE: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """grid (B * Hk, arena_parts + share * tail_parts, row tiles); slots/capacity: of each arena, slots and blocks."""
    line = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    batch = (tl.program_id(0) // kv_heads).to(tl.int64)
    kv_head = tl.program_id(0) % kv_heads
    per_thought = GROUP * query_length
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    m_row = row < rows
    if ONE:  # one query of one thought: rows are the heads, and no integer needs dividing
        thoughts, thought, head, position = 1, tl.zeros_like(row), kv_head * GROUP + row, tl.zeros_like(row)
    else:
        thoughts, thought = rows // per_thought, row // per_thought
        head, position = kv_head * GROUP + (row % per_thought) // query_length, row % query_length
    query_row = batch * thoughts + thought
    p_q = p_query + query_row * stride_qb + head * stride_qh + position * stride_qi
    parts = tl.num_programs(1)
    p_lse = p_part_lse + (line * parts + part) * rows + row
    p_out = p_part_out + ((line * parts + part) * rows + row) * HEAD_DIM
    if part >= arena_parts:
        own = (part - arena_parts) // tail_parts
        _tail_part(
            p_q, m_row, m_row & (thought == own), tl.program_id(2) == 0, position,
            batch * thoughts + own, kv_head, (part - arena_parts) % tail_parts, kv_heads, query_length,
            p_tail_key, p_tail_value, p_tail_valid, p_tail_length, tail_width,
            p_total, p_pending, p_accepted, p_scores + (line * rows + row) * tail_width, factor, p_out, p_lse,
            HEAD_DIM, ROWS, PENDING, SALIENCY, INTERPRET,
        )  # fmt: skip
        return
    n_high = tl.load(p_hi_blocks + batch)
    n_low = tl.load(p_lo_blocks + batch)
    parts_high = _share_of(n_high, n_low, arena_parts, WEIGHT_HIGH, WEIGHT_LOW)
    limit = row
    o_limit = ((query_row // limit_share) * kv_heads + kv_head) * query_length + position
    if part < parts_high:
        if LIMITS:
            limit = tl.load(p_hi_limit + o_limit, mask=m_row, other=0)
        _arena_part(
            p_q, m_row, limit, p_hi_key, p_hi_value, p_hi_scale, p_hi_min, p_hi_key_scale, p_hi_key_min, p_hi_channel,
            p_hi_start + batch * (hi_capacity + 1), n_high, line, hi_slots, hi_capacity, part, parts_high, factor,
            p_out, p_lse, HEAD_DIM, ROWS, HIGH_BITS, TILE, STAGES, PLAIN_TILE, PLAIN_STAGES, LIMITS, INTERPRET,
        )  # fmt: skip
    else:
        if LIMITS:
            limit = tl.load(p_lo_limit + o_limit, mask=m_row, other=0)
        _arena_part(
            p_q, m_row, limit, p_lo_key, p_lo_value, p_lo_scale, p_lo_min, p_lo_key_scale, p_lo_key_min, p_lo_channel,
            p_lo_start + batch * (lo_capacity + 1), n_low, line, lo_slots, lo_capacity, part - parts_high,
            arena_parts - parts_high, factor, p_out, p_lse,
            HEAD_DIM, ROWS, LOW_BITS, TILE, STAGES, PLAIN_TILE, PLAIN_STAGES, LIMITS, INTERPRET,
        )  # fmt: skip
