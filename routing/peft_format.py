"""Experts on disk are ordinary PEFT adapter folders: adapter_config.json and adapter_model.safetensors.

Any LoRA that PEFT saved on linears loads (mixed ranks, alphas, rsLoRA, patterns, target sets); what we save opens with
`peft.PeftModel.from_pretrained`. Files from outside pass our schema first; nothing is unpickled.
Callers: train/stages.py, train/export.py.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from peft import LoraConfig, TaskType
from safetensors.torch import save
from torch import Tensor

from ..base.errors import ArtifactError, SecurityError
from ..base.files import sha256_file, write_atomic, write_json
from ..base.tensor_file import read_tensors
from .adapter_config import AdapterConfig, read_adapter_config
from .expert import Expert, ExpertCard, SiteAdapter
from .sites import Site, target_names

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
PARTS = {".lora_A.weight": "A", ".lora_B.weight": "B"}
HUB_COMMIT = re.compile(r"[\w.-]+(/[\w.-]+)?@[0-9a-f]{40}")


def load_peft(folder: Path | str, name: str, sites: Sequence[Site]) -> Expert:
    """The adapter in `folder` as expert `name`, tensors in fp32 on the CPU.

    `sites` are all linears of the base (`sites.all_sites`). Raises NameRefused (SEC-002), SecurityError SEC-001
    (pickled weights), SEC-003 (leaves the folder), SEC-004 (configuration), SEC-005 (tensors), ArtifactError EXP-001
    (no adapter there) or EXP-002 (made for another base).
    """
    folder = Path(folder)
    _refuse_pickles(folder)
    config = read_adapter_config(folder)
    pairs = _pair_up(read_tensors(folder, WEIGHTS), folder)
    known = {site.name: site for site in sites}
    for site, pair in pairs.items():
        _check_pair(site, pair, known, config, folder)
    ordered = [site.name for site in sites if site.name in pairs]
    card = ExpertCard(
        name,
        config.rank,
        config.alpha,
        target_names(ordered, known),
        config.rslora,
        {s: config.rank_at(s) for s in ordered if config.rank_at(s) != config.rank},
        {s: config.alpha_at(s) for s in ordered if config.alpha_at(s) != config.alpha},
        {"base": config.base, "sha256": sha256_file(folder / WEIGHTS)},
    )
    adapters = {
        site: SiteAdapter(pairs[site]["A"].float(), pairs[site]["B"].float(), card.scale_at(site)) for site in ordered
    }
    return Expert(card, adapters)


def save_peft(expert: Expert, folder: Path, base_id: str | None) -> None:
    """Write `expert` as a PEFT adapter of the base `base_id`, fp32, both files whole or absent. The commit of a hub id
    (`owner/name@commit`) goes to PEFT's `revision`, so that AutoPeftModel finds the base."""
    card = expert.card
    base, _, commit = base_id.partition("@") if base_id and HUB_COMMIT.fullmatch(base_id) else (base_id, "", "")
    if card.rank_pattern or card.alpha_pattern:
        card = _common_first(expert)
    config = LoraConfig(
        r=card.rank,
        lora_alpha=_plain_number(card.alpha),  # type: ignore[arg-type]
        use_rslora=card.rslora,
        target_modules=list(card.targets),
        rank_pattern=dict(card.rank_pattern),
        alpha_pattern={site: _plain_number(alpha) for site, alpha in card.alpha_pattern.items()},  # type: ignore[misc]
        task_type=TaskType.CAUSAL_LM,
        inference_mode=True,
        base_model_name_or_path=base,
        revision=commit or None,
    )
    values = {key: sorted(v) if isinstance(v, set) else v for key, v in config.to_dict().items()}
    tensors = {}
    for site, adapter in expert.adapters.items():
        tensors[f"{PREFIX}{site}.lora_A.weight"] = adapter.a_RI.detach().float().cpu().contiguous()
        tensors[f"{PREFIX}{site}.lora_B.weight"] = adapter.b_OR.detach().float().cpu().contiguous()
    write_atomic(folder / WEIGHTS, save(tensors, metadata={"format": "pt"}))
    write_json(folder / CONFIG, values)


def _refuse_pickles(folder: Path) -> None:
    if not folder.is_dir():
        raise ArtifactError(f"{folder}: no such folder; name a folder that PEFT saved", code="EXP-001")
    for path in sorted(folder.glob("adapter_model.*")):
        if path.name != WEIGHTS:
            raise SecurityError(
                f"{path}: only {WEIGHTS} is read, since other formats can run code; convert the adapter where you "
                "trust it (PeftModel.save_pretrained) and remove this file",
                code="SEC-001",
            )


def _pair_up(tensors: dict[str, Tensor], folder: Path) -> dict[str, dict[str, Tensor]]:
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        suffix = next((s for s in PARTS if key.endswith(s)), None)
        if suffix is None or not key.startswith(PREFIX):
            raise _refuse(folder, key, f"unexpected name; allowed are {PREFIX}SITE.lora_A.weight and .lora_B.weight")
        pairs.setdefault(key[len(PREFIX) : -len(suffix)], {})[PARTS[suffix]] = tensor
    for site, pair in pairs.items():
        if len(pair) != 2:
            raise _refuse(folder, site, f"lora_{'B' if 'A' in pair else 'A'} is missing")
    return pairs


def _check_pair(
    site: str, pair: dict[str, Tensor], known: dict[str, Site], config: AdapterConfig, folder: Path
) -> None:
    if site not in known:
        raise ArtifactError(
            f"{folder}: adapts {ascii(site)[:120]}, which is no linear of this base; the adapter was made for another "
            f"base ({config.base})",
            code="EXP-002",
        )
    rank = config.rank_at(site)
    want = {"A": (rank, known[site].in_features), "B": (known[site].out_features, rank)}
    for part, shape in want.items():
        if tuple(pair[part].shape) != shape:
            raise _refuse(folder, f"{site}.lora_{part}", f"shape {tuple(pair[part].shape)}, expected {shape}")


def _common_first(expert: Expert) -> ExpertCard:
    """The same card with the commonest rank as `rank` and every other site named in full, patterns anchored with ^:
    PEFT reads keys as regular expressions on the end of a name, so a bare name could hit a longer one."""
    card = expert.card
    rank = Counter(card.rank_at(site) for site in expert.sites).most_common(1)[0][0]
    alphas = {site: card.alpha_pattern.get(site, card.alpha) for site in expert.sites}
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    return ExpertCard(
        card.name,
        rank,
        alpha,
        card.targets,
        card.rslora,
        {f"^{site}": card.rank_at(site) for site in expert.sites if card.rank_at(site) != rank},
        {f"^{site}": value for site, value in alphas.items() if value != alpha},
        card.provenance,
    )


def _plain_number(value: float) -> float | int:
    return int(value) if float(value).is_integer() else value


def _refuse(folder: Path, tensor: str, why: str) -> SecurityError:
    return SecurityError(f"{folder / WEIGHTS}: tensor {ascii(tensor)[:160]}: {why}", code="SEC-005")
