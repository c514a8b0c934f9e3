"""A tiny Llama and random experts of mixed ranks, scales and target sets."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from quietgoose.base.seeding import generator
from quietgoose.routing.expert import Expert, ExpertCard, SiteAdapter
from quietgoose.routing.library import ExpertLibrary
from quietgoose.routing.sites import all_sites, find_sites, target_names
from transformers import LlamaConfig, LlamaForCausalLM

MakeExpert = Callable[..., Expert]


def make_model(seed: int = 0, **changes: object) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    settings: dict[str, object] = {
        "vocab_size": 64, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).eval()  # type: ignore[arg-type]


def make_expert(
    model: torch.nn.Module,
    name: str,
    rank: int = 4,
    alpha: float = 8.0,
    rslora: bool = False,
    targets: tuple[str, ...] = ("all-linear",),
    gates: bool = True,
    strength: float = 0.3,
    rank_pattern: dict[str, int] | None = None,
    alpha_pattern: dict[str, float] | None = None,
) -> Expert:
    sites = find_sites(model, targets)
    g = generator(7, "test expert", name)
    names = target_names([s.name for s in sites], [s.name for s in all_sites(model)])
    card = ExpertCard(name, rank, alpha, names, rslora, rank_pattern or {}, alpha_pattern or {})
    adapters, vectors = {}, {}
    for site in sites:
        r = card.rank_at(site.name)
        adapters[site.name] = SiteAdapter(
            torch.randn(r, site.in_features, generator=g) * strength,
            torch.randn(site.out_features, r, generator=g) * strength,
            card.scale_at(site.name),
        )
        vectors[site.name] = torch.randn(site.in_features, generator=g)
    expert = Expert(card, adapters)
    return expert.with_gates(vectors) if gates else expert


@pytest.fixture
def model() -> LlamaForCausalLM:
    return make_model()


@pytest.fixture
def new_model() -> Callable[..., LlamaForCausalLM]:
    return make_model


@pytest.fixture
def new_expert() -> MakeExpert:
    return make_expert


@pytest.fixture
def equal(model: LlamaForCausalLM) -> ExpertLibrary:
    """Four experts of one rank on all linears."""
    return ExpertLibrary(make_expert(model, name) for name in ("ant", "bee", "cat", "dog"))


@pytest.fixture
def mixed(model: LlamaForCausalLM) -> ExpertLibrary:
    """Ranks 1 to 9, rsLoRA, patterns, and target sets that only partly overlap."""
    first = "model.layers.0.self_attn.q_proj"
    return ExpertLibrary(
        [
            make_expert(model, "ant", rank=1, alpha=1),
            make_expert(model, "bee", rank=9, rslora=True, targets=("q_proj", "down_proj")),
            make_expert(model, "cat", rank=3, targets=("q_proj", "v_proj", "gate_proj"), rank_pattern={first: 5}),
            make_expert(model, "dog", rank=4, targets=("self_attn.q_proj", "up_proj"), alpha_pattern={first: 2.0}),
        ]
    )


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(3, 64, (3, 11), generator=torch.Generator().manual_seed(5))
