"""Peers: error bounds, bytes by hand, what is kept and dropped, near-exact at 4 bit, generate."""

from __future__ import annotations

import importlib.util
import math

import pytest
import torch
from kv_peers import PEERS, dequantize_groups, make_peer, quantize_groups
from kv_peers_importance import ATTENTION, H2OLayer, MikvLayer, attend
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

LAYERS, HEADS, KV_HEADS, DIM = 2, 6, 2, 32
OURS = ["kivi", "mikv", "h2o"]
BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"no {package}"))
    for name, package in (("quanto", "optimum"), ("hqq", "hqq"))
]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HEADS * DIM, intermediate_size=128, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, head_dim=DIM, vocab_size=199, max_position_embeddings=512, initializer_range=0.1,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def logits_of(model, cache, attention, tokens, split, chunk=7):
    model.set_attn_implementation(attention)
    model(tokens[:, :split], past_key_values=cache)
    parts = [model(part, past_key_values=cache).logits for part in tokens[:, split:].split(chunk, 1)]
    return torch.cat(parts, 1)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("group", [8, 32])
def test_groups_round_trip(bits, group):
    x = torch.randn(2, 3, 5, 64) * torch.tensor([1e-3, 1.0, 40.0])[None, :, None, None]
    packed = quantize_groups(x, bits, group)
    back = dequantize_groups(packed, torch.float32)
    error = (back - x).unflatten(-1, (-1, group)).abs()
    # fp16 rounding of the two parameters comes on top of half a step
    slack = packed.low.float().abs() * 2**-10 + packed.scale.float() * (2**bits) * 2**-10
    assert (error <= (packed.scale.float() / 2 + slack)[..., None]).all()
    assert packed.codes.numel() == x.numel() * bits // 8


def test_groups_keep_constants_and_sixteen_bits():
    assert torch.equal(
        dequantize_groups(quantize_groups(torch.full((2, 64), 1.5), 2, 32), torch.float32), torch.full((2, 64), 1.5)
    )
    x = torch.randn(2, 64)
    assert torch.equal(dequantize_groups(quantize_groups(x, 16, 64), torch.float32), x)


@pytest.mark.parametrize(("bits", "group"), [(3, 32), (4, 48)])
def test_groups_refuse(bits, group):
    with pytest.raises(ValueError, match=r"bits|group"):
        quantize_groups(torch.zeros(2, 64), bits, group)


def test_unknown_peer_is_refused(model):
    with pytest.raises(ValueError, match=r"snapkv.*kivi"):
        make_peer("snapkv", model.config)


@pytest.mark.parametrize("name", ["dynamic", *OURS])
def test_prefill_is_exact(model, name):
    tokens = torch.randint(199, (2, 45))
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        expected = model(tokens, past_key_values=DynamicCache(config=model.config)).logits
        peer = make_peer(name, model.config)
        model.set_attn_implementation(peer.attention)
        found = model(tokens, past_key_values=peer.cache).logits
    assert torch.allclose(found, expected, atol=2e-4)
    assert peer.cache.get_seq_length() == 45


@pytest.mark.parametrize(
    ("name", "settings", "bound"),
    [
        ("kivi", {"bits": 4}, 0.25), ("mikv", {"high_bits": 8, "low_bits": 8}, 0.1), ("mikv", {"low_bits": 4}, 0.35),
        ("mikv", {"high_bits": 16, "low_bits": 8, "window": 16}, 0.1), ("h2o", {"heavy_ratio": 0.8, "recent_ratio": 1.0}, 1e-4),
    ],
)  # fmt: skip
def test_close_to_exact(model, name, settings, bound):
    torch.manual_seed(1)
    tokens = torch.randint(199, (2, 180))
    expected = logits_of(model, DynamicCache(config=model.config), "sdpa", tokens, 100)
    peer = make_peer(name, model.config, **settings)
    found = logits_of(model, peer.cache, peer.attention, tokens, 100)
    assert ((found - expected).norm() / expected.norm()).item() < bound


def test_fewer_bits_are_worse_and_smaller(model):
    torch.manual_seed(2)
    tokens = torch.randint(199, (2, 120))
    expected = logits_of(model, DynamicCache(config=model.config), "sdpa", tokens, 100)
    errors, sizes = [], []
    for bits in (8, 4, 2):
        peer = make_peer("kivi", model.config, bits=bits)
        found = logits_of(model, peer.cache, peer.attention, tokens, 100)
        errors.append((found - expected).norm().item())
        sizes.append(peer.true_bytes()["total"])
    assert errors == sorted(errors)
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize(("prompt", "residual", "bits"), [(45, 32, 2), (128, 32, 4), (20, 32, 2), (130, 128, 4)])
def test_kivi_bytes_by_hand(model, prompt, residual, bits):
    peer = make_peer("kivi", model.config, bits=bits, residual=residual)
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        model(torch.randint(199, (3, prompt)), past_key_values=peer.cache)
        model(torch.randint(199, (3, 1)), past_key_values=peer.cache)
    tokens, rows = prompt + 1, 3 * KV_HEADS * LAYERS
    keys = tokens - tokens % residual if prompt % residual + 1 == residual else prompt - prompt % residual
    values = max(0, tokens - residual)
    found = peer.true_bytes()
    assert found["codes"] == rows * (keys + values) * DIM * bits // 8
    assert found["parameters"] == rows * 4 * (keys * DIM // 32 + values * DIM // 32)
    assert found["sixteen_bit"] == rows * 2 * DIM * (2 * tokens - keys - values)
    assert found["total"] == sum(found[part] for part in ("codes", "parameters", "sixteen_bit"))
    assert peer.bits_per_element(3) == pytest.approx(8 * found["total"] / (2 * rows * DIM * tokens))


def test_mikv_bytes_by_hand(model):
    peer = make_peer("mikv", model.config)
    model.set_attn_implementation(ATTENTION)
    with torch.no_grad():
        model(torch.randint(199, (2, 50)), past_key_values=peer.cache)
    rows = 2 * KV_HEADS * LAYERS
    found = peer.true_bytes()
    assert found["codes"] == rows * 2 * DIM * (30 * 4 + 20 * 2) // 8
    assert found["parameters"] == rows * (50 * 2 * 4 + 2 * DIM)
    assert found["scores"] == rows * 50 * 4
    assert found["sixteen_bit"] == 0


def test_dynamic_counts_two_bytes_a_number(model):
    peer = make_peer("dynamic", model.config)
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        model(torch.randint(199, (2, 9)), past_key_values=peer.cache)
    assert peer.bits_per_element(2) == 16.0


def h2o_after(key, value, query, heavy, recent):
    layer = H2OLayer(heavy, recent, None)
    got_key, got_value = layer.update(key, value)
    _, mass = attend(query, got_key, got_value, None, 1.0, None)
    layer.add(mass)
    layer.commit(query, got_key)
    return layer, mass


def test_h2o_keeps_heavy_and_recent():
    torch.manual_seed(3)
    key, value, query = torch.randn(2, 2, 40, 8), torch.randn(2, 2, 40, 8), torch.randn(2, 4, 40, 8)
    layer, mass = h2o_after(key, value, query, 0.2, 0.1)
    assert layer.keys.shape[-2] == 12
    assert torch.equal(layer.keys[..., -4:, :], key[..., -4:, :])
    for row in range(2):
        for head in range(2):
            best = mass[row, head, :36].topk(8).indices.sort().values
            assert torch.equal(layer.values[row, head, :8], value[row, head, best])


def test_h2o_stays_that_size_and_importance_grows():
    torch.manual_seed(4)
    layer, _ = h2o_after(torch.randn(1, 1, 20, 8), torch.randn(1, 1, 20, 8), torch.randn(1, 2, 20, 8), 0.2, 0.2)
    for _ in range(5):
        query = torch.randn(1, 2, 3, 8)
        before = layer.score.sum()
        key, value = layer.update(torch.randn(1, 1, 3, 8), torch.randn(1, 1, 3, 8))
        _, mass = attend(query, key, value, None, 1.0, None)
        layer.add(mass)
        assert layer.score.sum() == pytest.approx((before + 6).item(), rel=1e-5)
        layer.commit(query, key)
        assert layer.keys.shape[-2] == layer.score.shape[-1] == 8
    assert layer.get_seq_length() == 35


def test_mikv_puts_the_important_tokens_high():
    torch.manual_seed(5)
    key, value, query = torch.randn(1, 2, 30, 32), torch.randn(1, 2, 30, 32), torch.randn(1, 4, 30, 32)
    layer = MikvLayer(16, 2, 0.4, 0.0, 10, None)
    got_key, got_value = layer.update(key, value)
    _, mass = attend(query, got_key, got_value, None, 1.0, None)
    layer.add(mass.clone())
    layer.commit(query, got_key)
    for head in range(2):
        best = mass[0, head].topk(12).indices.sort().values
        assert torch.equal(layer.high[0].codes[0, head], key[0, head, best])
        assert torch.allclose(layer.score[0, head, :12], mass[0, head, best])
    for step in range(25):  # a window is packed at every tenth token; counts follow the share
        got_key, got_value = layer.update(key[..., :1, :], value[..., :1, :])
        _, mass = attend(query[..., :1, :], got_key, got_value, None, 1.0, None)
        layer.add(mass)
        layer.commit(query[..., :1, :], got_key)
        assert sum(layer.counts) + layer.keys.shape[-2] == 31 + step
    assert layer.counts == (math.ceil(0.4 * 50), 50 - math.ceil(0.4 * 50))


def test_chunked_attention_is_the_same():
    torch.manual_seed(6)
    query, key, value = torch.randn(2, 6, 11, 8), torch.randn(2, 2, 17, 8), torch.randn(2, 2, 17, 8)
    valid = torch.ones(2, 2, 17, dtype=torch.bool)
    valid[0, :, :3] = False
    whole, mass = attend(query, key, value, valid, 0.3, None)
    parts, mass_parts = attend(query, key, value, valid, 0.3, 4)
    assert torch.allclose(whole, parts, atol=1e-6)
    assert torch.allclose(mass, mass_parts, atol=1e-6)
    assert mass[0, :, :3].abs().max() == 0


@pytest.mark.parametrize("name", ["mikv", "h2o"])
def test_left_padding_changes_nothing(model, name):
    """At 16 bit and nothing dropped, a padded row gives what it gives alone."""
    settings = {"high_bits": 16, "low_bits": 16} if name == "mikv" else {"heavy_ratio": 1.0, "recent_ratio": 1.0}
    torch.manual_seed(7)
    tokens = torch.randint(199, (2, 20))
    mask = torch.ones_like(tokens)
    mask[1, :6] = 0

    def run(tokens, **more):
        peer = make_peer(name, model.config, **settings)
        model.set_attn_implementation(peer.attention)
        return model.generate(
            tokens,
            past_key_values=peer.cache,
            do_sample=False,
            max_new_tokens=12,
            pad_token_id=0,
            eos_token_id=None,
            **more,
        )

    padded = run(tokens, attention_mask=mask)
    alone = run(tokens[1:, 6:])
    assert torch.equal(padded[1, 20:], alone[0, 14:])


@pytest.mark.parametrize("name", [*OURS, "dynamic", *BACKENDS])
def test_generate(model, name):
    peer = make_peer(name, model.config)
    model.set_attn_implementation(peer.attention)
    out = model.generate(
        torch.randint(199, (2, 30)), past_key_values=peer.cache, do_sample=False, max_new_tokens=10, pad_token_id=0,
        eos_token_id=None,
    )  # fmt: skip
    assert out.shape == (2, 40)
    assert peer.true_bytes()["total"] > 0


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("bits", [2, 4])
def test_backend_bytes(model, name, bits):
    peer = make_peer(name, model.config, nbits=bits)
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        model(torch.randint(199, (2, 64)), past_key_values=peer.cache)
    count = 2 * LAYERS * 2 * KV_HEADS * 64 * DIM
    assert peer.true_bytes()["codes"] == count * bits // 8
    assert peer.true_bytes()["parameters"] == count // 64 * 4


def test_every_peer_is_named_in_the_docstring():
    assert set(PEERS) == {"dynamic", "kivi", "mikv", "h2o", "quanto", "hqq", "fp8", "zipcache"}
