"""The plug around ZipCache: stock behaviour stays stock, families, and one clear error for what cannot be."""

from __future__ import annotations

import copy
import traceback
import warnings

import pytest
import torch
from quietgoose.base.errors import QuietGooseError, RecipeError
from quietgoose.cache.hf import NAME, ZipCache, restore
from quietgoose.cache.hf_attention import columns_seen, stock_name
from quietgoose.cache.hf_causal import causal_attention
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, DynamicCache, StaticCache, T5Config

from .hf_models import GREEDY, LOSSLESS, MIXED, both, draw, family, left_padded, llama

FAMILIES = {
    "LlamaForCausalLM": {},
    "MistralForCausalLM": {"sliding_window": None},
    "Qwen2ForCausalLM": {},
    "Qwen3ForCausalLM": {},
    "SmolLM3ForCausalLM": {"num_hidden_layers": 4},
    "GemmaForCausalLM": {},
    "Gemma3ForCausalLM": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 24},
    "Gemma2ForCausalLM": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 24},
}


def of_family(name: str):
    text = "Gemma3TextConfig" if name == "Gemma3ForCausalLM" else None
    if text is None:
        return family(name, **FAMILIES[name])
    import transformers

    from .hf_models import SHAPE

    torch.manual_seed(0)
    return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**(SHAPE | FAMILIES[name]))).eval()


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name):
    """Greedy, left-padded, a prompt longer than any sliding window; the lossless cache gives the stock tokens."""
    model = of_family(name)
    if name == "Qwen2ForCausalLM":
        for layer in model.model.layers:
            torch.nn.init.normal_(layer.self_attn.k_proj.bias)
    ids, mask = left_padded(2, 50, [0, 6])
    stock, ours = both(model, ids, attention_mask=mask, max_new_tokens=40)
    assert torch.equal(stock, ours)
    cache = ZipCache(model.config, MIXED)
    model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=40, **GREEDY)
    sliding = FAMILIES[name].get("layer_types", []).count("sliding_attention")
    assert len(cache.zip_layers) == model.config.num_hidden_layers - sliding


def test_gemma2_softcap_goes_the_dense_way_with_one_warning(monkeypatch):
    from quietgoose.cache import hf_layer

    monkeypatch.setattr(hf_layer, "_warned", set())
    model = of_family("Gemma2ForCausalLM")
    model.set_attn_implementation("eager")  # the stock implementation that knows soft-capping
    ids, mask = left_padded(2, 40, [0, 6])
    with pytest.warns(UserWarning, match="soft-capping"):
        stock, ours = both(model, ids, attention_mask=mask, max_new_tokens=30)
    assert torch.equal(stock, ours)


def test_only_sliding_layers_warns_that_nothing_is_packed(monkeypatch):
    from quietgoose.cache import hf_layer

    monkeypatch.setattr(hf_layer, "_warned", set())
    model = family("MistralForCausalLM", sliding_window=16)
    with pytest.warns(UserWarning, match="saves nothing"):
        cache = ZipCache(model.config, LOSSLESS)
    assert not cache.zip_layers
    stock, ours = both(model, draw(1, 40), max_new_tokens=20)
    assert torch.equal(stock, ours)
    lookup = both(model, draw(1, 12).repeat(1, 4), max_new_tokens=20, prompt_lookup_num_tokens=4)
    assert torch.equal(*lookup)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_calls_without_our_cache_are_bit_identical_to_stock(implementation):
    model = llama()
    model.set_attn_implementation(implementation)
    ids, mask = left_padded(2, 40, [0, 6])

    def calls():
        found = []
        with torch.no_grad():
            found.append(model(ids, attention_mask=mask, use_cache=False).logits)
            found.append(model(ids, use_cache=False).logits)
            for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=64)):
                found.append(model(ids, attention_mask=mask, past_key_values=cache).logits)
                more = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
                found.append(model(draw(2, 1), attention_mask=more, past_key_values=cache).logits)
            packed = torch.cat([torch.arange(15), torch.arange(25)])[None]
            found.append(model(ids[:1], position_ids=packed, use_cache=False).logits)
        model.train()
        loss = model(ids, attention_mask=mask, labels=ids, use_cache=False).loss
        loss.backward()
        model.eval()
        found += [loss.detach(), model.model.layers[0].self_attn.k_proj.weight.grad.clone()]
        model.zero_grad()
        return found

    before = calls()
    ZipCache(model.config)
    assert model.config._attn_implementation == NAME
    assert stock_name(model.config) == implementation
    for old, new in zip(before, calls(), strict=True):
        assert torch.equal(old, new)
    restore(model.config)
    assert model.config._attn_implementation == implementation


def test_two_models_interleaved():
    models = [llama(seed=0), llama(seed=1)]
    ids = draw(1, 90)
    with torch.no_grad():
        exact = [model(ids, use_cache=False).logits for model in models]
        caches = [ZipCache(model.config, LOSSLESS) for model in models]
        found = [[], []]
        for part in ids.split(18, 1):
            for which, model in enumerate(models):
                found[which].append(model(part, past_key_values=caches[which]).logits)
    for a, b in zip(exact, found, strict=True):
        torch.testing.assert_close(torch.cat(b, 1), a, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_config_is_copied_and_saved_without_our_name(tmp_path, implementation):
    model = llama()
    model.set_attn_implementation(implementation)
    clean = model.config.to_json_string(use_diff=False)
    ZipCache(model.config)
    twin = copy.deepcopy(model.config)
    assert twin._attn_implementation == NAME
    assert stock_name(twin) == implementation
    assert model.config.to_json_string(use_diff=False) == clean
    assert NAME not in model.config.to_json_string()
    model.save_pretrained(tmp_path)
    assert NAME not in "".join(p.read_text() for p in tmp_path.glob("*.json"))
    again = AutoConfig.from_pretrained(tmp_path)
    assert again._attn_implementation != NAME
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.config._attn_implementation == "sdpa"
    copied = copy.deepcopy(model)
    stock, ours = both(copied, draw(1, 30), max_new_tokens=10)
    assert torch.equal(stock, ours)


def test_back_under_a_stock_implementation():
    model = llama()
    ids, mask = left_padded(2, 60, [0, 7])
    cache, stock = ZipCache(model.config, LOSSLESS), DynamicCache(config=model.config)
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        for start, stop in ((0, 40), (40, 41), (41, 60)):
            seen = {"attention_mask": mask[:, :stop]}
            found = [model(ids[:, start:stop], past_key_values=kept, **seen).logits for kept in (cache, stock)]
            torch.testing.assert_close(found[0], found[1])
        ZipCache(model.config)
        with pytest.raises(RecipeError, match="reset"):
            model(draw(2, 1), past_key_values=cache)


# --------------------------------------------------------------------------- errors


def test_gradients_are_refused():
    model = llama()
    with pytest.raises(RecipeError, match="no_grad"):
        model(draw(1, 20), past_key_values=ZipCache(model.config))


@torch.no_grad()
def test_output_attentions_is_refused():
    model = llama()
    cache = ZipCache(model.config)
    with pytest.raises((RecipeError, ValueError), match=r"output_attentions|eager"):
        model(draw(1, 20), past_key_values=cache, output_attentions=True)


def test_encoder_decoder_and_foreign_objects_are_refused():
    with pytest.raises(RecipeError, match="encoder-decoder"):
        ZipCache(T5Config())
    with pytest.raises(RecipeError, match=r"model\.config"):
        ZipCache(llama())


@pytest.mark.parametrize("capacity", [0, -1, 2.5, True])
def test_bad_capacity(capacity):
    with pytest.raises(RecipeError, match="capacity"):
        ZipCache(llama().config, capacity=capacity)


def test_bad_policy():
    with pytest.raises(RecipeError, match="qualty"):
        ZipCache(llama().config, "qualty")
    with pytest.raises(RecipeError, match="salient"):
        ZipCache(llama().config, {"salient": 0.5})
    with pytest.raises(RecipeError, match=r"names \[3, 40\].*0 to 2"):
        ZipCache(llama().config, {"sixteen_bit_layers": [0, 3, 40]})


def test_unsupported_implementation():
    model = llama()
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(RecipeError, match="sdpa, eager"):
        ZipCache(model.config)


def test_old_transformers(monkeypatch):
    from quietgoose.cache import hf

    monkeypatch.setattr(hf.transformers, "__version__", "5.9.1")
    with pytest.raises(QuietGooseError, match=r"5\.17"):
        ZipCache(llama().config)


def test_linear_attention_layers_stay_stock_and_indexed_ones_are_refused(monkeypatch):
    from quietgoose.cache import hf
    from transformers.cache_utils import DynamicLayer

    class Indexed(DynamicLayer):
        pass

    monkeypatch.setattr(hf, "DynamicCache", lambda config: type("Some", (), {"layers": [Indexed()]}))
    with pytest.raises(RecipeError, match="Indexed"):
        ZipCache(llama().config)


@torch.no_grad()
def test_linear_attention_beside_ours_is_counted_and_gives_the_stock_tokens():
    kinds = ["linear_attention", "full_attention"] * 2
    linear = {
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    }
    experts = {
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
    }
    model = family("Qwen3NextForCausalLM", num_hidden_layers=4, layer_types=kinds, **linear, **experts)
    ids, mask = left_padded(2, 50, [0, 6])
    stock, ours = both(model, ids, attention_mask=mask, max_new_tokens=20)
    assert torch.equal(stock, ours)
    cache = ZipCache(model.config, LOSSLESS)
    model(ids, attention_mask=mask, past_key_values=cache)
    assert len(cache.zip_layers) == 2
    packed = sum(layer.state.nbytes().total for layer in cache.zip_layers)
    states = 2 * (2 * 2 * 16 * 16 + 2 * 3 * 32 * 4) * 4  # two layers: recurrent [2,2,16,16], convolution [2,96,4], fp32
    assert cache.nbytes().total == packed + states


@torch.no_grad()
def test_a_cache_of_another_config_object_is_noticed():
    model = llama()
    cache = ZipCache(copy.deepcopy(model.config))
    model(draw(1, 20), past_key_values=cache)
    with pytest.raises(RecipeError, match="very config"):
        model(draw(1, 1), past_key_values=cache)


@torch.no_grad()
def test_another_batch_size_and_short_masks():
    model = llama()
    cache = ZipCache(model.config)
    model(draw(2, 20), past_key_values=cache)
    with pytest.raises(RecipeError, match="columns"):
        model(draw(2, 3), attention_mask=torch.ones(2, 3, dtype=torch.long), past_key_values=cache)
    with pytest.raises(RecipeError, match="3 rows"):
        model(draw(3, 1), past_key_values=cache)
    cache = ZipCache(model.config)
    model(draw(1, 20), past_key_values=cache)
    with pytest.raises(RecipeError, match="4-D"):
        model(draw(1, 2), attention_mask=torch.ones(1, 1, 2, 2, dtype=torch.bool), past_key_values=cache)


@torch.no_grad()
def test_a_model_that_changes_keys_after_update_is_noticed(monkeypatch):
    model = llama()
    cache = ZipCache(model.config)
    inner = cache.update

    def update(key, value, index, *args, **kwargs):
        key, value = inner(key, value, index, *args, **kwargs)
        return key * 1.0, value

    monkeypatch.setattr(cache, "update", update)
    ids, mask = left_padded(2, 10, [0, 2])
    with pytest.raises(RecipeError, match="changes the keys"):
        model(ids, attention_mask=mask, past_key_values=cache)


@torch.no_grad()
def test_an_interrupted_forward_is_noticed_and_reset_helps(monkeypatch):
    model = llama()
    cache = ZipCache(model.config)
    monkeypatch.setattr(model.model.layers[1].mlp, "forward", lambda x: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(draw(1, 20), past_key_values=cache)
    monkeypatch.undo()
    cache.zip_layers[0].waiting = True  # as after an interruption between update and attention
    with pytest.raises(RecipeError, match="reset"):
        model(draw(1, 1), past_key_values=cache)
    cache.reset()
    model(draw(1, 20), past_key_values=cache)


@torch.no_grad()
def test_a_refused_forward_leaves_the_cache_as_it_was():
    """Too much for the capacity, a wrong mask, output_attentions: then the same cache goes on without a reset."""
    model = llama()
    cache, stock = ZipCache(model.config, LOSSLESS, capacity=100), DynamicCache(config=model.config)
    ids, more = draw(1, 60), draw(1, 5, 1)
    for kept in (cache, stock):
        model(ids, past_key_values=kept)
    with pytest.raises(RecipeError, match="capacity"):
        model(draw(1, 80), past_key_values=cache)
    with pytest.raises(RecipeError, match="4-D"):
        model(more, past_key_values=cache, attention_mask=torch.ones(1, 1, 5, 5, dtype=torch.bool))
    with pytest.raises((RecipeError, ValueError), match=r"output_attentions|eager"):
        model(more, past_key_values=cache, output_attentions=True)
    found = [model(more, past_key_values=kept).logits for kept in (cache, stock)]
    torch.testing.assert_close(found[0], found[1], atol=1e-3, rtol=1e-3)


# --------------------------------------------------------------------------- parts


@pytest.mark.parametrize(("length", "heads", "kv_heads"), [(1, 2, 1), (63, 4, 4), (300, 6, 2)])
def test_causal_attention_and_its_lse(length, heads, kv_heads):
    random = torch.Generator().manual_seed(0)
    query = torch.randn(2, heads, length, 16, generator=random)
    key, value = torch.randn(2, 2, kv_heads, length, 16, generator=random)
    valid = torch.ones(2, length, dtype=torch.bool)
    valid[0, : length // 3] = False
    out, lse = causal_attention(query, key, value, valid, scaling=0.3)
    full_key, full_value = (x.repeat_interleave(heads // kv_heads, 1) for x in (key, value))
    scores = (query @ full_key.transpose(-1, -2) * 0.3).double()
    seen = torch.tril(torch.ones(length, length, dtype=torch.bool)) & valid[:, None, None, :]
    scores = scores.masked_fill(~seen, float("-inf"))
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), atol=1e-5, rtol=1e-5)
    expected = scores.softmax(-1).nan_to_num() @ full_value.double()
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)


def test_columns_seen():
    mask = torch.tril(torch.ones(4, 4, dtype=torch.bool))[None, None].repeat(2, 1, 1, 1)
    mask[1, :, :, 1] = False
    assert columns_seen(mask, 3).tolist() == [[True, True, True], [False, True, True]]
    additive = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    assert torch.equal(columns_seen(additive - 3.0, 3), columns_seen(mask, 3))


def test_one_warning_for_the_slow_path(monkeypatch):
    from quietgoose.cache import hf_layer

    monkeypatch.setattr(hf_layer, "_warned", set())
    model = llama()
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        model(draw(1, 20), past_key_values=ZipCache(model.config))
    assert len([w for w in caught if "plain PyTorch" in str(w.message)]) == 1


class HostReads(TorchDispatchMode):
    """Names of the operators through which the host reads a tensor outside the plain twins of kernels."""

    READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "item", "masked_select", "equal", "unique", "allclose")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        indexed = name == "index" and any(x is not None and x.dtype == torch.bool for x in args[1])
        if name.startswith(self.READS) or indexed:
            places = [frame.filename for frame in traceback.extract_stack()]
            if not any(place.endswith("reference.py") for place in places):  # the twins of kernels may read
                self.found.append(name)
        return func(*args, **(kwargs or {}))


@torch.no_grad()
@pytest.mark.parametrize("policy", [LOSSLESS, MIXED], ids=["lossless", "mixed"])
def test_decode_reads_nothing_on_the_host(policy):
    """Over several flushes, with left padding: no step of one token synchronises."""
    model = llama()
    ids, mask = left_padded(2, 120, [0, 6])
    cache = ZipCache(model.config, policy)
    model(ids[:, :40], attention_mask=mask[:, :40], past_key_values=cache)
    place = (mask.cumsum(1) - 1).clamp_min(0)
    with HostReads() as reads:
        for column in range(40, 120):
            model(
                ids[:, column : column + 1],
                attention_mask=mask[:, : column + 1],
                position_ids=place[:, column : column + 1],
                past_key_values=cache,
            )
    assert reads.found == []
    with HostReads() as reads:  # the detector sees what it must
        model(draw(2, 70), attention_mask=torch.ones(2, 190), past_key_values=cache)
    assert reads.found
