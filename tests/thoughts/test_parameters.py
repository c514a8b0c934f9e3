"""START, END and head: set once, saved and restored bit for bit, mixed as the formula says."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from quietgoose.base.errors import ArtifactError, SecurityError
from quietgoose.base.files import sha256_tensors
from quietgoose.kernels.testing import assert_close
from quietgoose.thoughts.anchors import term_counts
from quietgoose.thoughts.config import HeadKind, ThoughtConfig, preset
from quietgoose.thoughts.files import load_thoughts, save_thoughts
from quietgoose.thoughts.gradient import Stream, thought_loss
from quietgoose.thoughts.parameters import ThoughtParameters, ThoughtTensors, mix
from quietgoose.thoughts.policy import ModelPolicy
from safetensors.torch import save_file

from .naive import llama, naive_mix, packed, policy_of

KINDS: tuple[HeadKind, ...] = ("paper", "bounded", "thought")


def made(kind: HeadKind = "paper", w0: float = 0.5) -> ThoughtParameters:
    parameters = ThoughtParameters(torch.randn(24), torch.randn(24), ThoughtConfig(head=kind, initial_weight=w0), 0)
    with torch.no_grad():
        for parameter in parameters.parameters():
            parameter += torch.randn_like(parameter) * 0.1
    return parameters


def test_starts_from_the_tokens_and_from_w0() -> None:
    model = llama()
    config = ThoughtConfig(initial_weight=0.25)
    tensors = ThoughtParameters.from_token(model, 7, config, seed=0).tensors()
    row = model.get_input_embeddings().weight[7]
    assert torch.equal(tensors.meta_2D[0], row)
    assert torch.equal(tensors.meta_2D[1], row)
    _, weight = mix(tensors, torch.randn(9, 24), torch.randn(9, 24))
    assert bool((weight == 0.25).all())
    other = ThoughtParameters.from_token(model, 7, config, seed=1).tensors()
    assert not torch.equal(tensors.head[0], other.head[0])
    assert torch.equal(tensors.head[0], ThoughtParameters.from_token(model, 7, config, seed=0).tensors().head[0])


def test_the_embeddings_are_copies_not_rows() -> None:
    model = llama()
    parameters = ThoughtParameters.from_token(model, 7, ThoughtConfig(), seed=0)
    with torch.no_grad():
        parameters.meta_2D.add_(1)
        assert not torch.equal(model.get_input_embeddings().weight[7], parameters.meta_2D[0])
    assert model.get_input_embeddings().weight.shape[0] == model.config.vocab_size


@pytest.mark.parametrize("kind", KINDS)
def test_mixing_equals_the_formula(kind) -> None:
    tensors = made(kind, 0.3).double().tensors()
    base, thought = torch.randn(5, 24).double(), torch.randn(5, 24).double()
    mixed, weight = mix(tensors, base, thought)
    assert_close("mixed", mixed, naive_mix(tensors, base, thought))
    assert weight.shape == (5, 1)
    if kind == "bounded":
        assert bool(((weight > 0) & (weight < 1)).all())


def test_mixing_hidden_states_is_mixing_logits() -> None:
    """The head is linear, so that the mixture's logits are the mixture of logits (Quiet-STaR, section 4.3)."""
    tensors, head = made().double().tensors(), llama().double().lm_head
    base, thought = torch.randn(5, 24).double(), torch.randn(5, 24).double()
    mixed, weight = mix(tensors, base, thought)
    assert_close("logits", head(mixed), (1 - weight) * head(base) + weight * head(thought))


def test_bf16_states_are_mixed_in_fp32() -> None:
    tensors = made().tensors()
    base, thought = torch.randn(50, 24).bfloat16(), torch.randn(50, 24).bfloat16()
    mixed, weight = mix(tensors, base, thought)
    want, _ = mix(tensors, base.float(), thought.float())
    assert mixed.dtype == weight.dtype == torch.float32, "rounded, a small weight's share of a thought would be lost"
    assert torch.equal(mixed, want)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_bit_for_bit(kind, tmp_path: Path) -> None:
    before = made(kind, 0.1)
    save_thoughts(before.tensors(), tmp_path / "thoughts.safetensors")
    after = load_thoughts(tmp_path / "thoughts.safetensors", 24)
    assert sha256_tensors(before.state_dict()) == sha256_tensors(after.state_dict())
    assert (after.kind, after.initial_weight) == (kind, 0.1)
    state = ThoughtParameters(torch.zeros(24), torch.zeros(24), ThoughtConfig(head=kind), 5)
    state.load_state_dict(before.state_dict())
    assert sha256_tensors(before.state_dict()) == sha256_tensors(state.state_dict())


def test_forward_and_backward_after_loading_keep_the_bits(tmp_path: Path) -> None:
    """The reference code re-initialises START, END and the head's last layer in the first forward after any load."""
    config, rows = preset("default", tokens=2, lookahead=2, samples=2), packed([[5, 4]], 10)
    model = llama()
    save_thoughts(policy_of(model, config).parameters.tensors(), tmp_path / "t.safetensors")
    policy = ModelPolicy(model, load_thoughts(tmp_path / "t.safetensors", 24))
    before, whole = sha256_tensors(policy.parameters.state_dict()), sha256_tensors(model.state_dict())
    weights = (1 / term_counts(config, rows, seed=0, step=0)).float()
    losses = []
    for _ in range(2):
        loss = thought_loss(policy, rows, config, weights, Stream(0, 0))
        loss.total.backward()
        losses.append(loss.total.item())
    assert losses[0] == losses[1]
    assert sha256_tensors(policy.parameters.state_dict()) == before
    assert sha256_tensors(model.state_dict()) == whole


def test_equal_parameters_make_equal_files(tmp_path: Path) -> None:
    tensors = made().tensors()
    contents = set()
    for number in range(8):
        save_thoughts(tensors, tmp_path / f"{number}.safetensors")
        contents.add((tmp_path / f"{number}.safetensors").read_bytes())
    assert len(contents) == 1


@pytest.mark.parametrize("change", ["width", "missing", "shape", "format", "head", "w0", "dtype", "nan", "torn"])
def test_a_wrong_file_is_refused(change, tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    named = {"meta": torch.randn(2, 24), **{f"head.{i}": t.detach() for i, t in enumerate(made().tensors().head)}}
    metadata: dict = {"format": "quietgoose-thoughts-1", "head": "paper", "initial_weight": 0.5}
    if change == "missing":
        del named["head.3"]
    elif change == "shape":
        named["head.4"] = torch.zeros(2, 24)
    elif change == "dtype":
        named["meta"] = named["meta"].bfloat16()
    elif change == "nan":
        named["meta"][0, 0] = math.nan
    elif change in ("format", "head"):
        metadata[change] = "other"
    elif change == "w0":
        metadata["initial_weight"] = math.nan
    save_file(named, path, metadata={"quietgoose": json.dumps(metadata)})
    if change == "torn":
        path.write_bytes(path.read_bytes()[:-4])
    width = 32 if change == "width" else 24
    with pytest.raises((ArtifactError, SecurityError)):
        load_thoughts(path, width)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="EXP-001"):
        load_thoughts(tmp_path / "none.safetensors", 24)


def test_what_is_not_finite_is_not_written(tmp_path: Path) -> None:
    tensors = ThoughtTensors(torch.full((2, 24), math.inf), made().tensors().head, "paper", 0.5)
    with pytest.raises(ArtifactError, match="EXP-003"):
        save_thoughts(tensors, tmp_path / "t.safetensors")
    assert not (tmp_path / "t.safetensors").exists()
