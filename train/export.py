"""Export a routed model as a folder of data, load it back, merge it for servers that cannot route.

    export/quietgoose.json          format, base id and hash, router, k, experts with provenance, hash of every file
    export/experts/<name>/          one ordinary PEFT adapter per expert
    export/gates.safetensors        one fp32 vector per expert and site (PHATGOOSE)
    export/tokenizer*, base/        the tokenizer; the base itself only where it exists nowhere else (nano)

Called by the `export` stage and by users: `quietgoose.load(path)`, `quietgoose.merge(path, out)`.
"""

from __future__ import annotations

import importlib.metadata
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..base.errors import ArtifactError, RecipeError, suggest
from ..base.files import inside, read_json, safe_name, sha256_file, write_atomic, write_json
from ..routing.gates_format import load_gates, save_gates
from ..routing.library import ExpertLibrary
from ..routing.merge import mean_of_products
from ..routing.model import attach
from ..routing.peft_format import load_peft, save_peft
from ..routing.sites import Site, find_sites
from .base_models import LoadedBase, load_base
from .recipe import BaseSettings, RouterSettings

MANIFEST = "quietgoose.json"
FORMAT = 1
ROUTERS_OF_AN_EXPORT = ("phatgoose", "arrow", "random", "uniform")


@dataclass(frozen=True)
class Provenance:
    """Where an export comes from: shown in the card, checked by nobody."""

    recipe: Mapping[str, Any]
    experts: Mapping[str, Mapping[str, Any]]
    results: str = ""


def export_model(
    folder: Path, base: LoadedBase, library: ExpertLibrary, router: RouterSettings, provenance: Provenance,
    base_folder: Path | None = None,
) -> None:  # fmt: skip
    """Write the export into `folder` (empty; the caller renames it into place). `base_folder`: copy the base in."""
    for expert in library:
        target = folder / "experts" / safe_name(expert.card.name)
        save_peft(expert, target, base_id=base.id)
    save_gates(library, folder / "gates.safetensors")
    base.tokenizer.save_pretrained(folder)
    if base_folder is not None:
        shutil.copytree(base_folder, folder / "base")
    write_atomic(folder / "README.md", _card(base, library, router, provenance))
    files = {str(path.relative_to(folder)): sha256_file(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    manifest = {
        "format": FORMAT,
        "base": {
            "id": "base" if base_folder is not None else base.id,
            "sha256": base.sha256,
            "dtype": str(base.model.dtype).removeprefix("torch."),
            "notes": base.notes,
        },
        "router": {"name": router.name, "k": router.k, "normalisation": "standardised dot product / sqrt(d)"},
        # a list: the order of the experts is part of the model (sums, ties)
        "experts": [
            {"name": name, "folder": f"experts/{name}", "provenance": provenance.experts.get(name, {})}
            for name in library.names
        ],
        "recipe": provenance.recipe,
        "versions": {
            name: importlib.metadata.version(name) for name in ("quietgoose", "torch", "transformers", "peft")
        },
        "files": files,
    }
    write_json(folder / MANIFEST, manifest)


def load(
    path: str | Path,
    *,
    base: str | None = None,
    router: str | None = None,
    k: int | None = None,
    experts: list[str] | None = None,
    device: str | torch.device | None = None,
    attention: str = "sdpa",
) -> PreTrainedModel:
    """Open an exported folder as a Hugging Face causal LM whose every token picks its experts.

    base       overrides where the base model is found (its hash must be the one recorded)
    router     one of phatgoose, arrow, random, uniform; default: the exported one
    k          experts a token; default: the exported one
    experts    restrict the model to these, in this order
    attention  Hugging Face's name of the attention implementation

    Raises ArtifactError EXP-002..EXP-006 if a file is missing, changed or foreign, or the base is another one.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    loaded = _load_base(folder, manifest["base"], base, attention, device)
    library = read_library(folder, manifest, tuple(find_sites(loaded.model, ["all-linear"])))
    if experts is not None:
        library = library.restrict(experts)
    name = router or manifest["router"]["name"]
    if name not in ROUTERS_OF_AN_EXPORT:
        raise RecipeError(
            f"router={name!r}: allowed are {', '.join(ROUTERS_OF_AN_EXPORT)}.{suggest(name, ROUTERS_OF_AN_EXPORT)}",
            code="CFG-030",
        )
    routed = attach(loaded.model, library, name, k or manifest["router"]["k"])
    return cast(PreTrainedModel, routed)


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of an export; read after its hashes were checked."""
    from transformers import AutoTokenizer

    read_manifest(Path(path))
    return AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)


def merge(path: str | Path, out: str | Path) -> Path:
    """Write the static merge (mean of the experts' products) of an export as one plain PEFT adapter in `out`.

    For servers that cannot route per token. It is a different and usually weaker model than the routed one.
    """
    folder, target = Path(path), Path(out)
    if target.exists() and any(target.iterdir()):
        raise RecipeError(f"{target}: exists and is not empty; choose another folder", code="EXP-007")
    manifest = read_manifest(folder)
    loaded = _load_base(folder, manifest["base"], None, "sdpa", "cpu")
    library = read_library(folder, manifest, tuple(find_sites(loaded.model, ["all-linear"])))
    save_peft(mean_of_products(library), target, base_id=loaded.id)
    return target


def read_manifest(folder: Path) -> dict[str, Any]:
    """quietgoose.json after every file it names was found with its hash. ArtifactError otherwise."""
    if not (folder / MANIFEST).is_file():
        raise ArtifactError(f"{folder}: no {MANIFEST} in it, so it is no quietgoose export", code="EXP-002")
    manifest = read_json(folder / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise ArtifactError(
            f"{folder / MANIFEST}: format is {manifest.get('format')!r}, this version reads {FORMAT}", code="EXP-003"
        )
    for name, wanted in manifest["files"].items():
        file = inside(folder, name)
        if not file.is_file():
            raise ArtifactError(f"{file}: named in {MANIFEST} but missing; export again or restore it", code="EXP-004")
        found = sha256_file(file)
        if found != wanted:
            raise ArtifactError(
                f"{file}: sha256 is {found[:12]}.., {MANIFEST} says {wanted[:12]}..; the file changed after the export. "
                "Restore it or export again",
                code="EXP-004",
            )
    return manifest


def read_library(folder: Path, manifest: Mapping[str, Any], sites: tuple[Site, ...]) -> ExpertLibrary:
    """All experts of an export with their gates, in the exported order."""
    experts = [
        load_peft(inside(folder, card["folder"]), safe_name(card["name"]), sites) for card in manifest["experts"]
    ]
    return load_gates(folder / "gates.safetensors", ExpertLibrary(experts), sites)


def _load_base(
    folder: Path, wanted: Mapping[str, Any], override: str | None, attention: str, device: Any
) -> LoadedBase:
    source = override or (str(folder / "base") if wanted["id"] == "base" else wanted["id"])
    settings = BaseSettings(model=source, dtype=wanted["dtype"], attention=attention)  # type: ignore[arg-type]
    loaded = load_base(settings, device=device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if loaded.sha256 != wanted["sha256"]:
        raise ArtifactError(
            f"base model {source}: its weights hash to {loaded.sha256[:12]}.., the experts were trained on "
            f"{wanted['sha256'][:12]}..; pass base=FOLDER with the right one",
            code="EXP-006",
        )
    return loaded


def _card(base: LoadedBase, library: ExpertLibrary, router: RouterSettings, provenance: Provenance) -> str:
    names = [expert.card.name for expert in library]
    notes = f" ({base.notes})" if base.notes else ""
    return f"""---
library_name: quietgoose
base_model: {base.id}
tags: [lora, mixture-of-experts, phatgoose]
---
# A routed model of {len(names)} LoRA experts

Base: `{base.id}`{notes}. Every token picks its {router.k} experts at every adapted linear (router: {router.name}).

```python
import quietgoose
model = quietgoose.load("this folder")
tokenizer = quietgoose.load_tokenizer("this folder")
```

Each folder in `experts/` is an ordinary PEFT adapter: `PeftModel.from_pretrained(base, "experts/{names[0]}")`.

Experts: {", ".join(names)}.

{provenance.results}
"""
