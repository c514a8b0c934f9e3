"""Export a routed model as a folder of data, load it back, merge it for servers that cannot route.

    export/quietgoose.json          format, base id and hash, router, k, experts with provenance, hash of every file
    export/experts/<name>/          one ordinary PEFT adapter per expert
    export/gates.safetensors        one fp32 vector per expert and site (PHATGOOSE)
    export/thinking/                START, END, mixing head and LoRA on top, if the run learned to think (thought_model.py)
    export/tokenizer*, base/        the tokenizer; the base itself only where it exists nowhere else (nano)

Called by the `export` stage and by users: `quietgoose.load(path)`, `quietgoose.merge(path, out)`.
"""

from __future__ import annotations

import importlib.metadata
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..base.devices import usable_device
from ..base.errors import ArtifactError, RecipeError, suggest
from ..base.files import check_writable, inside, safe_name, sha256_file, write_atomic, write_json
from ..routing.gates_format import load_gates, save_gates
from ..routing.library import ExpertLibrary
from ..routing.merge import mean_of_products
from ..routing.model import attach
from ..routing.peft_format import load_peft, save_peft
from ..routing.routers import KINDS
from ..routing.sites import Site, all_sites
from .base_models import LoadedBase, load_base
from .export_manifest import FORMAT, GATES, IMAGES, MANIFEST, OWN_BASE, check_tokenizer_files, kind_of, read_manifest
from .recipe import BaseSettings, RouterSettings
from .thought_model import Thinking, attach_below, hidden_size, put_thinking, read_thinking, save_thinking
from .thought_settings import BASE, ROUTED

THINKING = "thinking"


@dataclass(frozen=True)
class Provenance:
    """Where an export comes from: shown in the card, checked by nobody."""

    recipe: Mapping[str, Any]
    experts: Mapping[str, Mapping[str, Any]]
    results: str = ""


def export_model(
    folder: Path, base: LoadedBase, library: ExpertLibrary | None, router: RouterSettings, provenance: Provenance,
    base_folder: Path | None = None, thinking: Thinking | None = None,
) -> None:  # fmt: skip
    """Write the export into `folder` (empty; the caller renames it into place). `base_folder`: copy the base in. A run without
    experts has no library."""
    experts = ExpertLibrary([]) if library is None else library
    for expert in experts:
        target = folder / "experts" / safe_name(expert.card.name)
        save_peft(expert, target, base_id=base.id)
    if len(experts):
        save_gates(experts, folder / GATES)
    if thinking is not None:
        save_thinking(thinking, folder / THINKING, base.id)
    base.tokenizer.save_pretrained(folder)
    if base_folder is not None:
        shutil.copytree(base_folder, folder / OWN_BASE)
    write_atomic(folder / "README.md", _card(base, experts, router, provenance, thinking))
    files = {str(path.relative_to(folder)): sha256_file(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    manifest = {
        "format": FORMAT,
        "base": {
            "id": OWN_BASE if base_folder is not None else base.id,
            "sha256": base.sha256,
            "dtype": str(base.model.dtype).removeprefix("torch."),
            "notes": base.notes,
        },
        "router": {"name": router.name, "k": router.k, "normalisation": "standardised dot product / sqrt(d)"},
        # a list: the order of the experts is part of the model (sums, ties)
        "experts": [
            {"name": name, "folder": f"experts/{name}", "provenance": provenance.experts.get(name, {})}
            for name in experts.names
        ],
        "thoughts": None if thinking is None else {"folder": THINKING, "over": thinking.over},
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
    thoughts: bool | None = None,
) -> Any:
    """Open an exported folder as a Hugging Face causal LM whose every token picks its experts, and which can think. The
    export of a U-Net opens as an ImageSampler (train/export_images.py), for which `device` is the only option.

    base       overrides where the base model is found (its hash must be the one recorded)
    router     one of phatgoose, phatgoose_mean, average_activation, arrow, random, uniform; default: the exported one
    k          experts a token, from 1 to as many as there are; default: the exported one (all, if there are fewer)
    experts    restrict the model to these, in this order
    attention  Hugging Face's name of the attention implementation
    thoughts   True: the model as its thoughts were trained, `model.generate(thoughts=True)` thinks, `model.thought_state`
               holds START, END and head; False: without; default: if the exported model is what they were trained over
               (router, k and experts as exported)

    Raises ArtifactError EXP-002..EXP-006 if a file is missing, changed or foreign, or the base is another one; RecipeError
    CFG-009, CFG-030, CFG-031, CFG-082 for options that this export or machine does not have.
    """
    folder = Path(path).expanduser()
    where = usable_device(device)
    manifest = read_manifest(folder)
    if kind_of(manifest) == IMAGES:
        return _image_sampler(folder, manifest, where, base, router, k, experts, thoughts)
    changed = any(option is not None for option in (router, k, experts))
    wanted = _wants_thoughts(manifest, thoughts, changed)
    check_routing(manifest, router, k, experts)
    loaded = _load_base(folder, manifest["base"], base, attention, where)
    model = cast(PreTrainedModel, loaded.model)
    if wanted:
        return _with_thoughts(model, folder, manifest)
    if not manifest["experts"]:
        return model
    library = read_library(folder, manifest, all_sites(model))
    if experts is not None:
        library = library.restrict(experts)
    attach(model, library, router or manifest["router"]["name"], manifest["router"]["k"] if k is None else k)
    return model


def check_routing(
    manifest: Mapping[str, Any], router: str | None, k: int | None, experts: Sequence[str] | None = None
) -> None:
    """Whether a language model's export can be routed so. RecipeError CFG-009 (k), CFG-030 (router), CFG-031 (no experts)."""
    if not manifest["experts"]:
        if any(option is not None for option in (router, k, experts)):
            raise RecipeError("this export has no experts; leave router, k and experts out", code="CFG-031")
        return
    name = manifest["router"]["name"] if router is None else router
    if name not in KINDS:
        raise RecipeError(
            f"router={name!r}: allowed are {', '.join(KINDS)}.{suggest(str(name), list(KINDS))}", code="CFG-030"
        )
    count = len(manifest["experts"] if experts is None else experts)
    if k is not None and (type(k) is not int or not 1 <= k <= count):
        raise RecipeError(f"k={k!r}: there are {count} experts, so a whole number from 1 to {count}", code="CFG-009")


def _image_sampler(folder: Path, manifest: Mapping[str, Any], device: torch.device, *language: Any) -> Any:
    """RecipeError CFG-031 if an option of language models is given."""
    if any(option is not None for option in language):
        raise RecipeError(
            f"{folder}: draws images; base, router, k, experts and thoughts are of language models", code="CFG-031"
        )
    from .export_images import open_sampler

    return open_sampler(folder, manifest, device)


def _wants_thoughts(manifest: Mapping[str, Any], thoughts: bool | None, changed: bool) -> bool:
    """Whether the loaded model is to think. RecipeError CFG-031 if it cannot."""
    there = manifest.get("thoughts")
    if thoughts and there is None:
        raise RecipeError("thoughts=True: this export has none; its run had no 'thoughts' stage", code="CFG-031")
    if thoughts and changed:
        raise RecipeError(
            "thoughts=True: the thoughts were trained over the exported experts and router; leave router, k and experts out",
            code="CFG-031",
        )
    if thoughts is not None or there is None:
        return bool(thoughts)
    return not changed and (there["over"] == ROUTED or not manifest["experts"])


def _with_thoughts(model: PreTrainedModel, folder: Path, manifest: Mapping[str, Any]) -> PreTrainedModel:
    """The model in the state that the thoughts were trained over, with them."""
    sites = all_sites(model)
    thinking = read_thinking(inside(folder, manifest["thoughts"]["folder"]), hidden_size(model), sites)
    if thinking.over != BASE:
        library = read_library(folder, manifest, sites)
        attach_below(model, library, thinking.over, manifest["router"]["name"], manifest["router"]["k"])
    put_thinking(model, thinking)
    return model


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of an export; read after its hashes were checked. RecipeError CFG-031 if the export draws images."""
    from transformers import AutoTokenizer

    folder = Path(path).expanduser()
    manifest = read_manifest(folder)
    if kind_of(manifest) == IMAGES:
        raise RecipeError(f"{folder}: draws images, so it has no tokenizer", code="CFG-031")
    check_tokenizer_files(folder, manifest, ())
    tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    check_tokenizer_files(folder, manifest, list(type(tokenizer).vocab_files_names.values()))
    return tokenizer


def merge(path: str | Path, out: str | Path) -> Path:
    """Write the static merge (mean of the experts' products) of an export as one plain PEFT adapter in `out`.

    For servers that cannot route per token. It is a different and usually weaker model than the routed one. StorageError
    IO-010 if nothing can be written there, RecipeError EXP-007 if something stands there, CFG-031 without experts.
    """
    folder, target = Path(path).expanduser(), Path(out).expanduser()
    check_writable(target, f"out={str(out)!r}", folder=True)
    if target.exists() and any(target.iterdir()):
        raise RecipeError(f"{target}: exists and is not empty; choose another folder", code="EXP-007")
    manifest = read_manifest(folder)
    if kind_of(manifest) == IMAGES:
        raise RecipeError(f"{folder}: draws images, so it has no experts to merge", code="CFG-031")
    if not manifest["experts"]:
        raise RecipeError(f"{folder}: has no experts to merge", code="CFG-031")
    loaded = _load_base(folder, manifest["base"], None, "sdpa", torch.device("cpu"))
    library = read_library(folder, manifest, all_sites(loaded.model))
    save_peft(mean_of_products(library), target, base_id=loaded.id)
    return target


def read_library(folder: Path, manifest: Mapping[str, Any], sites: tuple[Site, ...]) -> ExpertLibrary:
    """All experts of an export with their gates, in the exported order."""
    experts = [
        load_peft(inside(folder, card["folder"]), safe_name(card["name"]), sites) for card in manifest["experts"]
    ]
    return load_gates(folder / GATES, ExpertLibrary(experts), sites)


def _load_base(
    folder: Path, wanted: Mapping[str, Any], override: str | None, attention: str, device: torch.device
) -> LoadedBase:
    source = override or (str(folder / OWN_BASE) if wanted["id"] == OWN_BASE else wanted["id"])
    settings = BaseSettings(model=source, dtype=wanted["dtype"], attention=attention)  # type: ignore[arg-type]
    loaded = load_base(settings, device=device)
    if loaded.sha256 != wanted["sha256"]:
        raise ArtifactError(
            f"base model {source}: its weights hash to {loaded.sha256[:12]}.., the experts were trained on "
            f"{wanted['sha256'][:12]}..; pass base=FOLDER with the right one",
            code="EXP-006",
        )
    return loaded


def _card(
    base: LoadedBase, library: ExpertLibrary, router: RouterSettings, provenance: Provenance, thinking: Thinking | None
) -> str:
    names = [expert.card.name for expert in library]
    notes = f" ({base.notes})" if base.notes else ""
    routed = (
        f"Every token picks its {router.k} experts at every adapted linear (router: {router.name})."
        if names
        else "It has no experts."
    )
    thinks = thinking is not None and thinking.config.thinks
    tags = [*(["mixture-of-experts", "phatgoose"] if names else []), *(["quiet-star"] if thinks else [])]
    return f"""---
library_name: quietgoose
base_model: {base.id}
tags: [{", ".join(["lora", *tags])}]
---
# {f"A routed model of {len(names)} LoRA experts" if names else "A model that thinks" if thinks else "A fine-tuned model"}

Base: `{base.id}`{notes}. {routed}

```python
import quietgoose
model = quietgoose.load("this folder")
tokenizer = quietgoose.load_tokenizer("this folder")
```
{_card_of_thoughts(thinking)}{_card_of_experts(names)}
{provenance.results}
"""


def _card_of_experts(names: list[str]) -> str:
    if not names:
        return ""
    return f"""
Each folder in `experts/` is an ordinary PEFT adapter: `PeftModel.from_pretrained(base, "experts/{names[0]}")`.

Experts: {", ".join(names)}.
"""


def _card_of_thoughts(thinking: Thinking | None) -> str:
    if thinking is None:
        return ""
    if not thinking.config.thinks:
        return f"\nA control without thoughts, trained on the same text (over: {thinking.over}; in `{THINKING}/`). It cannot think.\n"
    return f"""
It learned to think {thinking.config.tokens} tokens before each token (Quiet-STaR, over: {thinking.over}; in `{THINKING}/`):

```python
model = quietgoose.load("this folder", thoughts=True)
model.generate(**tokenizer("...", return_tensors="pt"), thoughts=True)
```
"""
