"""Packed documents never see each other: packed logits equal those of every document alone."""

import sys
from types import SimpleNamespace

import pytest
import torch
from quietgoose.base.errors import EnvironmentProblem, RecipeError
from quietgoose.train.data.attention import (
    block_causal_mask,
    document_borders,
    model_inputs,
    resolve_attention,
)
from quietgoose.train.nano import build_nano
from quietgoose.train.recipe import NanoSettings
from quietgoose.train.types import Batch

NANO = NanoSettings(layers=2, width=64, heads=4, kv_heads=2, mlp_width=96, context=64)
DOCUMENTS = ([[5, 6, 7], [9], [1, 2, 3, 4, 5, 6]], [[8] * 12], [])  # three rows of 12; the last is empty


def packed(rows=DOCUMENTS, length=12):
    tokens, position, segment = (torch.zeros(len(rows), length, dtype=torch.int64) for _ in range(3))
    tokens += 256
    for r, documents in enumerate(rows):
        at = 0
        for number, document in enumerate(documents, start=1):
            part = slice(at, at + len(document))
            tokens[r, part] = torch.tensor(document)
            position[r, part] = torch.arange(len(document))
            segment[r, part] = number
            at = part.stop
    labels = torch.full_like(tokens, -100)
    return Batch(tokens, labels, position, segment.int(), torch.zeros(len(rows), dtype=torch.int64))


def model(implementation, seed=0):
    nano = build_nano(NANO, seed).model.eval()
    for parameter in nano.parameters():  # larger than at the start of training, so that attention matters
        parameter.data.mul_(3 if parameter.ndim > 1 else 1)
    nano.set_attn_implementation(implementation)
    return nano


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_packed_logits_equal_each_document_alone(implementation):
    net, batch = model(implementation), packed()
    with torch.no_grad():
        logits = net(**model_inputs(batch, implementation), use_cache=False).logits
        assert logits.isfinite().all()
        for r, documents in enumerate(DOCUMENTS):
            at = 0
            for document in documents:
                alone = net(input_ids=torch.tensor([document]), use_cache=False).logits[0]
                torch.testing.assert_close(logits[r, at : at + len(document)], alone, rtol=1e-5, atol=1e-5)
                at += len(document)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_no_document_sees_another_nor_its_own_future(implementation):
    """The gradient of one position's logits by the input embeddings is zero outside its past."""
    net, batch = model(implementation), packed()
    inputs = model_inputs(batch, implementation)
    embedded = net.get_input_embeddings()(inputs.pop("input_ids")).detach().requires_grad_()
    logits = net(inputs_embeds=embedded, **inputs, use_cache=False).logits
    for row, position, seen in ((0, 1, [0, 1]), (0, 3, [3]), (0, 7, [4, 5, 6, 7]), (1, 11, list(range(12)))):
        (gradient,) = torch.autograd.grad(logits[row, position].square().sum(), embedded, retain_graph=True)
        touched = gradient.abs().sum(-1).nonzero().tolist()
        assert touched == [[row, t] for t in seen]


def test_mask_and_borders_of_a_row():
    segment = torch.tensor([[1, 1, 2, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.int32)
    mask = block_causal_mask(segment)
    assert mask.shape == (2, 1, 5, 5)
    wanted = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1]]
    assert mask[0, 0].int().tolist() == wanted
    assert document_borders(segment).tolist() == [0, 2, 3, 5, 10]
    assert document_borders(segment).dtype == torch.int32
    inputs = model_inputs(packed(), "flash_attention_2")
    assert inputs["input_ids"].shape == inputs["position_ids"].shape == (1, 36)
    assert inputs["cu_seq_lens_q"].tolist() == [0, 3, 4, 10, 12, 24, 36]
    assert (inputs["max_length_k"], "attention_mask" in inputs) == (12, False)


def test_flash_inputs_mean_the_same_documents(monkeypatch):
    """The borders handed to flash attention, run by a plain per-document attention, give the same logits."""
    from transformers import AttentionInterface
    from transformers.models.llama.modeling_llama import repeat_kv

    def varlen(module, query, key, value, mask, scaling=None, cu_seq_lens_q=None, cu_seq_lens_k=None, **kwargs):
        assert mask is None
        assert kwargs["max_length_q"] >= int(cu_seq_lens_q.diff().max())
        groups = query.shape[1] // key.shape[1]
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
        parts = [
            torch.nn.functional.scaled_dot_product_attention(
                query[:, :, a:b], key[:, :, a:b], value[:, :, a:b], is_causal=True, scale=scaling
            )
            for a, b in zip(cu_seq_lens_q.tolist(), cu_seq_lens_k.tolist()[1:])
        ]
        return torch.cat(parts, 2).transpose(1, 2).contiguous(), None

    AttentionInterface.register("plain_varlen", varlen)
    batch = packed()
    with torch.no_grad():
        flat = model("plain_varlen")(**model_inputs(batch, "flash_attention_2"), use_cache=False).logits
        rows = model("sdpa")(**model_inputs(batch, "sdpa"), use_cache=False).logits
    used = batch.segment_BT.flatten() > 0
    torch.testing.assert_close(flat[0][used], rows.flatten(0, 1)[used], rtol=1e-5, atol=1e-5)


def test_which_attention_and_why(monkeypatch):
    assert resolve_attention("auto", "cpu", torch.float32) == (
        "sdpa", "flash attention needs a CUDA device, not cpu",
    )  # fmt: skip
    assert resolve_attention("eager", "cpu", "float32") == ("eager", "asked for")
    assert "bfloat16, not float32" in resolve_attention("auto", "cuda", torch.float32)[1]
    with pytest.raises(RecipeError, match=r"CFG-010 .*needs a CUDA device"):
        resolve_attention("flash_attention_2", "cpu", "bfloat16")
    with pytest.raises(RecipeError, match=r"allowed are auto, sdpa"):
        resolve_attention("sdpb", "cpu", "float32")
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert resolve_attention("auto", "cuda", "bfloat16")[0] == "sdpa"
    with pytest.raises(EnvironmentProblem, match=r"ENV-004 .*flash-attn"):
        resolve_attention("flash_attention_2", "cuda", torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_flash_attention_equals_the_mask_on_the_gpu():
    """The real flash-attn against sdpa with the exact mask: bf16 logits and gradients, measured by fp32."""
    pytest.importorskip("flash_attn")
    assert resolve_attention("auto", "cuda", torch.bfloat16)[0] == "flash_attention_2"
    settings = NanoSettings(layers=2, width=256, heads=4, kv_heads=2, mlp_width=256, context=256)
    lengths = torch.randint(1, 60, (8, 5), generator=torch.Generator().manual_seed(0)).tolist()
    batch = packed([[[7 * n % 250 + i % 5 for i in range(n)] for n in row] for row in lengths], 300).to("cuda")
    used = batch.segment_BT.flatten() > 0
    results = {}
    for name, dtype in (
        ("flash_attention_2", torch.bfloat16),
        ("sdpa", torch.bfloat16),
        ("exact", torch.float32),
    ):
        implementation = "sdpa" if name == "exact" else name
        net = build_nano(settings, 0).model.to("cuda", dtype)
        net.set_attn_implementation(implementation)
        logits = net(**model_inputs(batch, implementation), use_cache=False).logits.flatten(0, 1)[used].float()
        logits.square().mean().backward()
        gradient = net.model.layers[0].self_attn.q_proj.weight.grad.float()
        results[name] = SimpleNamespace(logits=logits.detach(), gradient=gradient)

    def error(name, field):
        right = getattr(results["exact"], field)
        return float((getattr(results[name], field) - right).square().mean().sqrt() / right.square().mean().sqrt())

    for field in ("logits", "gradient"):
        flash, sdpa = error("flash_attention_2", field), error("sdpa", field)
        print(f"{field}: relative error flash {flash:.2e}, sdpa {sdpa:.2e}")
        assert flash < max(2 * sdpa, 5e-3 if field == "logits" else 1e-2)
