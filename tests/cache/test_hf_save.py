"""Save and restore: bit-exact, for packed, sliding and empty layers; every unfit file gives one clear error."""

from __future__ import annotations

import json

import pytest
import torch
from quietgoose.base.errors import ArtifactError, StorageError
from quietgoose.cache.hf import ZipCache
from quietgoose.cache.hf_save import KEY
from safetensors import safe_open
from safetensors.torch import save_file

from .hf_models import GREEDY, LOSSLESS, MIXED, SHAPE, codes, draw, left_padded, llama


@torch.no_grad()
def filled(model, policy, rows=2, length=70):
    cache = ZipCache(model.config, policy)
    ids, mask = left_padded(rows, length, [0, 9][:rows])
    model(ids[:, :50], attention_mask=mask[:, :50], past_key_values=cache)
    for column in range(50, length):
        model(ids[:, column : column + 1], attention_mask=mask[:, : column + 1], past_key_values=cache)
    return cache, ids, mask


@pytest.mark.parametrize("policy", [LOSSLESS, MIXED], ids=["lossless", "mixed"])
def test_restored_and_going_on_is_bit_exact(tmp_path, policy):
    model = llama()
    cache, ids, mask = filled(model, policy)
    path = cache.save(tmp_path / "cache.safetensors")
    again = ZipCache.load(path, model.config)
    assert again.policy == cache.policy
    assert again.get_seq_length() == 70
    assert again.nbytes().total == cache.nbytes().total
    for a, b in zip(codes(cache), codes(again), strict=True):
        assert torch.equal(a, b)
    more = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
    found = []
    for kept in (cache, again):
        rows = torch.cat([ids, draw(2, 1, 4)], 1)
        found.append(model.generate(rows, attention_mask=more, past_key_values=kept, max_new_tokens=40, **GREEDY))
    assert torch.equal(found[0], found[1])
    for a, b in zip(codes(cache), codes(again), strict=True):
        assert torch.equal(a, b)
    assert [p.name for p in tmp_path.iterdir()] == ["cache.safetensors"]


@torch.no_grad()
def test_sliding_layers_and_forks(tmp_path):
    import transformers

    torch.manual_seed(0)
    changes = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 24}
    model = transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**(SHAPE | changes))).eval()
    cache, _, mask = filled(model, MIXED)
    for rows in (4, 2):  # the fork first: while it lives, its parent is frozen
        kept = cache.fork(2) if rows == 4 else cache
        path = kept.save(tmp_path / f"{rows}.safetensors")
        again = ZipCache.load(path, model.config)
        seen = torch.cat([mask, torch.ones(2, 3, dtype=torch.long)], 1).repeat_interleave(rows // 2, 0)
        found = [model(draw(rows, 3), attention_mask=seen, past_key_values=k).logits for k in (kept, again)]
        assert torch.equal(found[0], found[1])
        del kept


def test_unwritable_places_are_plain_errors(tmp_path):
    cache = ZipCache(llama().config)
    with pytest.raises(StorageError, match="no folder"):
        cache.save(tmp_path / "nowhere" / "cache")
    (tmp_path / "taken").mkdir()
    with pytest.raises(StorageError, match="could not be written"):
        cache.save(tmp_path / "taken")
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]


def test_empty_cache(tmp_path):
    model = llama()
    again = ZipCache.load(ZipCache(model.config).save(tmp_path / "empty.safetensors"), model.config)
    assert again.get_seq_length() == 0


@pytest.fixture
def saved(tmp_path):
    model = llama()
    cache, _, _ = filled(model, MIXED, rows=1, length=52)
    return model, cache.save(tmp_path / "cache.safetensors")


def rewritten(path, change):
    with safe_open(str(path), framework="pt") as handle:
        tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        meta = json.loads(handle.metadata()[KEY])
    change(meta, tensors)
    save_file(tensors, str(path), metadata={KEY: json.dumps(meta)})
    return path


def test_other_models_are_refused(saved):
    _, path = saved
    with pytest.raises(ArtifactError, match="3 layers"):
        ZipCache.load(path, llama(num_hidden_layers=2).config)
    with pytest.raises(ArtifactError, match="KV heads"):
        ZipCache.load(path, llama(num_key_value_heads=4).config)
    with pytest.raises(ArtifactError, match="size 64, this model has 2 of size 32"):
        ZipCache.load(path, llama(head_dim=32).config)


def test_a_policy_that_names_layers_this_model_lacks_is_refused(tmp_path):
    cache = ZipCache(llama().config, {"sixteen_bit_layers": [2]})
    path = cache.save(tmp_path / "cache")
    with pytest.raises(ArtifactError, match=r"CKPT-034.*names \[2\]"):
        ZipCache.load(path, llama(num_hidden_layers=2).config)


def test_torn_foreign_and_missing_files_are_refused(saved, tmp_path):
    model, path = saved
    with pytest.raises(ArtifactError, match="no such file"):
        ZipCache.load(tmp_path / "nothing", model.config)
    whole = path.read_bytes()
    for part in (b"", whole[:100], whole[:-50]):
        path.write_bytes(part)
        with pytest.raises(ArtifactError, match="not a whole"):
            ZipCache.load(path, model.config)
    save_file({"a": torch.zeros(1)}, str(path))
    with pytest.raises(ArtifactError, match="not of a ZipCache"):
        ZipCache.load(path, model.config)


def test_other_versions_and_missing_tensors_are_refused(saved):
    model, path = saved
    rewritten(path, lambda meta, tensors: meta.update(version=2))
    with pytest.raises(ArtifactError, match="version 2"):
        ZipCache.load(path, model.config)
    rewritten(path, lambda meta, tensors: (meta.update(version=1), tensors.pop(sorted(tensors)[0])))
    with pytest.raises(ArtifactError):
        ZipCache.load(path, model.config)
