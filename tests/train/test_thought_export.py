"""Thoughts on disk: save, load, the same logits with and without thoughts bit for bit; over a base, one expert, routed experts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from quietgoose.base.errors import ArtifactError, RecipeError, SecurityError
from quietgoose.base.files import read_json
from quietgoose.routing.expert import Expert, ExpertCard, SiteAdapter
from quietgoose.routing.library import ExpertLibrary
from quietgoose.routing.model import detach
from quietgoose.routing.on_top import as_expert
from quietgoose.routing.sites import AdapterLayout, all_sites, target_names
from quietgoose.thoughts.anchors import choose_anchors
from quietgoose.thoughts.attention import restore
from quietgoose.thoughts.branch import look_ahead
from quietgoose.thoughts.config import preset
from quietgoose.thoughts.parameters import ThoughtParameters
from quietgoose.thoughts.policy import ModelPolicy
from quietgoose.thoughts.prefix import run_prefix
from quietgoose.thoughts.rollout import rollout
from quietgoose.train import export
from quietgoose.train.base_models import LoadedBase, load_base
from quietgoose.train.nano import build_nano
from quietgoose.train.recipe import BaseSettings, NanoSettings, RouterSettings
from quietgoose.train.thought_model import Thinking, attach_below, put_thinking
from quietgoose.train.types import Batch

SMALL = NanoSettings(layers=2, width=32, heads=2, kv_heads=1, mlp_width=48, context=128)
CONFIG = preset("default", tokens=3, lookahead=1, samples=2, banned=(256,), head="bounded", initial_weight=0.3)
TOKENS = torch.tensor([list(b"ab 12 = cd 34"), list(b"#! [] = #! []")])


@pytest.fixture
def base(tmp_path: Path) -> LoadedBase:
    model, tokenizer = build_nano(SMALL, 0)
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return load_base(BaseSettings(model=str(tmp_path / "base")))


def library_of(model) -> ExpertLibrary:
    random = torch.Generator().manual_seed(5)
    names = [site.name for site in all_sites(model)]
    card_targets = target_names(names, names)
    experts = []
    for name in ("ant", "bee"):
        pairs = {
            s.name: SiteAdapter(
                torch.randn(2, s.in_features, generator=random) * 0.3,
                torch.randn(s.out_features, 2, generator=random) * 0.3, 1.0,
            )
            for s in all_sites(model)
        }  # fmt: skip
        gates = {s.name: torch.randn(s.in_features, generator=random) for s in all_sites(model)}
        experts.append(Expert(ExpertCard(name, 2, 2.0, card_targets), pairs, gates))
    return ExpertLibrary(experts)


def thinking_of(model, over: str, adapter: bool = True) -> Thinking:
    """Numbers that no initialisation would give."""
    random = torch.Generator().manual_seed(6)
    parameters = ThoughtParameters(torch.zeros(32), torch.zeros(32), CONFIG, 1)
    with torch.no_grad():
        for parameter in parameters.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.2)
    layout = AdapterLayout.uniform(all_sites(model), 3)
    names = [site.name for site in all_sites(model)]
    card = ExpertCard("thoughts", 3, 3.0, target_names(names, names))
    lora = as_expert(card, layout, torch.randn(layout.numel, generator=random) * 0.2) if adapter else None
    return Thinking(over, CONFIG, parameters, lora, "lora" if adapter else "embeddings")


@torch.no_grad()
def all_logits(model, parameters: ThoughtParameters) -> tuple[torch.Tensor, torch.Tensor]:
    """(ordinary logits, logits after a greedy thought at every position)."""
    plain = model(TOKENS).logits
    length = TOKENS.shape[1]
    rows = Batch(
        TOKENS, TOKENS.roll(-1, 1), torch.arange(length).expand(2, length), torch.ones(2, length).int(), torch.zeros(2).long()
    )  # fmt: skip
    policy = ModelPolicy(model.requires_grad_(False), parameters.requires_grad_(False))
    tensors, prefix = policy.tensors(), run_prefix(model, rows)
    anchors = choose_anchors(CONFIG, rows, seed=0, step=0)
    thoughts = rollout(policy, tensors, prefix, rows, anchors, CONFIG, greedy=True)
    ahead = look_ahead(model, tensors.thought, prefix, rows, thoughts, 1)
    restore(model)
    return plain, model.get_output_embeddings()(ahead.mixed_BASJD)


def exported(base: LoadedBase, tmp_path: Path, over: str, library: ExpertLibrary | None, adapter: bool = True) -> Path:
    folder = tmp_path / "export"
    folder.mkdir()
    thinking = thinking_of(base.model, over, adapter)
    provenance = export.Provenance(recipe={}, experts={})
    export.export_model(folder, base, library, RouterSettings(k=2), provenance, tmp_path / "base", thinking)
    return folder


@pytest.mark.parametrize(
    ("over", "adapter"), [("base", True), ("routed", True), ("expert:bee", True), ("routed", False)]
)
def test_a_loaded_model_has_the_same_logits_bit_for_bit(base, tmp_path, over: str, adapter: bool) -> None:
    library = None if over == "base" else library_of(base.model)
    folder = exported(base, tmp_path, over, library, adapter)
    if library is not None:
        attach_below(base.model, library, over, "phatgoose", 2)
    thinking = thinking_of(base.model, over, adapter)
    put_thinking(base.model, thinking)
    wanted = all_logits(base.model, thinking.parameters)
    loaded = export.load(folder, thoughts=True)
    state = loaded.thought_state
    assert state.config == CONFIG
    for name, tensor in thinking.parameters.state_dict().items():
        assert torch.equal(state.parameters.state_dict()[name], tensor), f"{name} was initialised again"
    first, again = (all_logits(loaded, state.parameters) for _ in range(2))
    for mine, other, third in zip(wanted, first, again):
        assert torch.equal(mine, other)
        assert torch.equal(other, third), "the first forward changed something"
    assert not torch.allclose(wanted[0], wanted[1][:, :, 0, 0], atol=1e-3), "the thought says something else"
    assert loaded.generate(TOKENS, max_new_tokens=3, do_sample=False, thoughts=True).shape == (2, TOKENS.shape[1] + 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_loaded_model_can_be_cast(base, tmp_path, dtype) -> None:
    """LoRA and experts follow the weights, with thoughts and without; what is on the disk stays."""
    folder = exported(base, tmp_path, "routed", library_of(base.model))
    kept, loaded = export.load(folder, thoughts=True), export.load(folder, thoughts=True)
    names = set(kept.state_dict())
    loaded.to(dtype)
    assert set(loaded.state_dict()) == names
    for thoughts in (False, True):
        text = loaded.generate(TOKENS, max_new_tokens=3, do_sample=False, thoughts=thoughts)
        assert text.shape == (2, TOKENS.shape[1] + 3)
    with torch.no_grad():
        found, wanted = loaded(TOKENS).logits, kept(TOKENS).logits
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), wanted, rtol=0.05, atol=0.1)
    loaded.to("meta")
    assert loaded(TOKENS.to("meta")).logits.is_meta


def test_what_load_gives_by_default(base, tmp_path) -> None:
    library = library_of(base.model)
    folder = exported(base, tmp_path, "routed", library)
    assert hasattr(export.load(folder), "thought_state")
    for options in ({"thoughts": False}, {"router": "uniform"}, {"k": 1}, {"experts": ["ant"]}):
        assert not hasattr(export.load(folder, **options), "thought_state"), options
    with pytest.raises(RecipeError, match="QG-CFG-031"):
        export.load(folder, thoughts=True, router="uniform")
    attach_below(base.model, library, "routed", "phatgoose", 2)
    with torch.no_grad():
        assert torch.equal(export.load(folder, thoughts=False)(TOKENS).logits, base.model(TOKENS).logits)
    detach(base.model)


def test_thoughts_over_the_base_beside_experts_are_asked_for(base, tmp_path) -> None:
    folder = exported(base, tmp_path, "base", library_of(base.model))
    assert not hasattr(export.load(folder), "thought_state"), "the routed model is not what they were trained over"
    thinking = export.load(folder, thoughts=True)
    assert hasattr(thinking, "thought_state")
    assert not hasattr(thinking, "routing_state")


def test_an_export_without_thoughts_or_without_experts(base, tmp_path) -> None:
    folder = exported(base, tmp_path, "base", None)
    manifest = read_json(folder / "quietgoose.json")
    assert manifest["experts"] == []
    assert {"thinking/thoughts/thoughts.safetensors", "thinking/thoughts/thoughts.json"} <= set(manifest["files"])
    assert hasattr(export.load(folder), "thought_state"), "nothing else to be"
    assert "thoughts=True" in (folder / "README.md").read_text()
    with pytest.raises(RecipeError, match="no experts to merge"):
        export.merge(folder, tmp_path / "merged")
    plain = tmp_path / "plain"
    plain.mkdir()
    provenance = export.Provenance(recipe={}, experts={})
    export.export_model(plain, base, library_of(base.model), RouterSettings(), provenance, tmp_path / "base")
    with pytest.raises(RecipeError, match="this export has none"):
        export.load(plain, thoughts=True)
    assert not hasattr(export.load(plain), "thought_state")


@pytest.mark.parametrize(
    "file", ["thoughts/thoughts.safetensors", "thoughts/thoughts.json", "adapter/adapter_model.safetensors"]
)
def test_a_changed_or_missing_file_is_refused(base, tmp_path, file: str) -> None:
    folder = exported(base, tmp_path, "base", None)
    path = folder / "thinking" / file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match="changed after the export"):
        export.load(folder)
    path.unlink()
    with pytest.raises(ArtifactError, match="missing"):
        export.load(folder)


def test_settings_that_do_not_fit_are_refused(base, tmp_path) -> None:
    folder = exported(base, tmp_path, "base", None)
    sites = all_sites(base.model)
    path = folder / "thinking" / "thoughts" / "thoughts.json"
    good = json.loads(path.read_text())
    for change, text in (
        ({"format": 9}, "format"), ({"config": {**good["config"], "tokenz": 3}}, "does not know"),
        ({"config": {**good["config"], "tokens": 0}}, "bad settings"),
    ):  # fmt: skip
        path.write_text(json.dumps({**good, **change}))
        with pytest.raises(ArtifactError, match=text):
            export.read_thinking(folder / "thinking", 32, sites)
    path.write_text(json.dumps(good))
    with pytest.raises((ArtifactError, SecurityError)):
        export.read_thinking(folder / "thinking", 64, sites)
