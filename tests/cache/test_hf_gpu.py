"""ZipCache in transformers on a GPU: kernels, the flash operator of prompt chunks, offload to the CPU, no sync."""

from __future__ import annotations

import pytest
import torch
from quietgoose.cache.hf import ZipCache
from quietgoose.cache.hf_causal import _by_blocks, causal_attention
from transformers import DynamicCache

from .hf_models import GREEDY, LOSSLESS, MIXED, draw, left_padded, llama

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(scope="module")
def model():
    return llama(initializer_range=0.05).to("cuda", torch.bfloat16)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.float() - expected.float()).norm() / expected.float().norm()).item()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("length", [65, 300, 1024])
def test_flash_operator_of_a_chunk(length, width, dtype):
    random = torch.Generator("cuda").manual_seed(0)
    query = torch.randn(2, 8, length, width, device="cuda", dtype=dtype, generator=random)
    key, value = torch.randn(2, 2, 2, length, width, device="cuda", dtype=dtype, generator=random)
    out, lse = causal_attention(query, key, value, None, scaling=0.1)
    expected, expected_lse = _by_blocks(query, key, value, None, 0.1)
    assert lse.shape == expected_lse.shape
    assert relative(out, expected) < 5e-3
    assert relative(lse, expected_lse) < 1e-3


@torch.no_grad()
@pytest.mark.parametrize("sizes", [(200, 1, 1, 1, 5, 100), (40, *(1 for _ in range(80)), 300)])
@pytest.mark.parametrize("padded", [False, True])
def test_logits_follow_the_stock_cache(model, sizes, padded):
    ids, mask = left_padded(3, sum(sizes), [0, 11, 2] if padded else [0, 0, 0])
    ids, mask = ids.cuda(), mask.cuda()
    caches = ZipCache(model.config, LOSSLESS), DynamicCache(config=model.config)
    done = 0
    for size in sizes:
        part = slice(done, done + size)
        done += size
        found = [model(ids[:, part], attention_mask=mask[:, :done], past_key_values=c).logits for c in caches]
        valid = mask[:, part].bool()
        assert relative(found[0][valid], found[1][valid]) < 2e-2


@torch.no_grad()
def test_decode_does_not_synchronise(model):
    ids, mask = left_padded(2, 160, [0, 6])
    ids, mask = ids.cuda(), mask.cuda()
    for policy in (MIXED, LOSSLESS):
        cache = ZipCache(model.config, policy)
        place = (mask.cumsum(1) - 1).clamp_min(0)
        model(ids[:, :40], attention_mask=mask[:, :40], past_key_values=cache)
        steps = [slice(column, column + 1) for column in range(40, 160)]

        def step(part, place=place, cache=cache):
            seen, where = mask[:, : part.stop], place[:, part]
            return model(ids[:, part], attention_mask=seen, position_ids=where, past_key_values=cache).logits

        for part in steps[:60]:  # kernels compile here
            step(part)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for part in steps[60:]:
                step(part)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_offload_leaves_nothing_on_the_gpu_and_keeps_the_tokens(model):
    ids = draw(1, 200).cuda()
    cache = ZipCache(model.config, MIXED, offload=True)
    first = model.generate(ids, past_key_values=cache, max_new_tokens=40, **GREEDY)
    assert all(t.device.type == "cpu" for layer in cache.zip_layers for t in layer.state.static_tensors())
    second = model.generate(ids, past_key_values=ZipCache(model.config, MIXED), max_new_tokens=40, **GREEDY)
    assert torch.equal(first, second)


def test_saved_on_the_gpu_and_restored_there(model, tmp_path):
    ids = draw(2, 100).cuda()
    cache = ZipCache(model.config, MIXED)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    again = ZipCache.load(cache.save(tmp_path / "cache"), model.config, device="cuda")
    more = torch.cat([ids, draw(2, 2, 1).cuda()], 1)
    found = [model.generate(more, past_key_values=kept, max_new_tokens=40, **GREEDY) for kept in (cache, again)]
    assert torch.equal(found[0], found[1])
