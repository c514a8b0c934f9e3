"""What a model needs besides its weights to think, on disk and put back on a model.

    thoughts/thoughts.safetensors   START, END and the mixing head, fp32, bit for bit (thoughts/files.py)
    thoughts/thoughts.json          over what they were trained, and the config they think by
    adapter/                        the LoRA on top, an ordinary PEFT folder; absent if none was trained

Written by the `thoughts` stage and into exports; read by `evaluate`, `export` and `quietgoose.load`. Nothing is ever initialised
here: what is missing is an error.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..base.errors import ArtifactError, RecipeError
from ..base.files import inside, read_json, write_json
from ..routing.expert import Expert
from ..routing.library import ExpertLibrary
from ..routing.model import attach
from ..routing.on_top import TopLora, flat_of
from ..routing.peft_format import load_peft, save_peft
from ..routing.sites import AdapterLayout, Site
from ..thoughts.config import ThoughtConfig
from ..thoughts.files import load_thoughts, save_thoughts
from ..thoughts.generation import ThoughtState, attach_thoughts
from ..thoughts.parameters import ThoughtParameters
from .thought_settings import ONE, ROUTED

FOLDER, TENSORS, SETTINGS, ADAPTER = "thoughts", "thoughts.safetensors", "thoughts.json", "adapter"
FORMAT = 1
NAME = "thoughts"


@dataclass(frozen=True)
class Thinking:
    """`over`: base, routed or expert:NAME. `adapter`: the LoRA on top as an expert, None if there is none."""

    over: str
    config: ThoughtConfig
    parameters: ThoughtParameters
    adapter: Expert | None
    trainable: str


def save_thinking(thinking: Thinking, folder: Path, base_id: str) -> None:
    """Write `thoughts/` and `adapter/` into `folder`."""
    save_thoughts(thinking.parameters.tensors(), folder / FOLDER / TENSORS)
    write_json(
        folder / FOLDER / SETTINGS,
        {
            "format": FORMAT, "over": thinking.over, "trainable": thinking.trainable,
            "config": dataclasses.asdict(thinking.config), "adapter": thinking.adapter is not None,
        },
    )  # fmt: skip
    if thinking.adapter is not None:
        save_peft(thinking.adapter, folder / ADAPTER, base_id=base_id)


def read_thinking(folder: Path, width: int, sites: Sequence[Site]) -> Thinking:
    """What `save_thinking` wrote, for a model of width `width` with these linears.

    Raises:
        ArtifactError: EXP-001 (a file is not there), EXP-003 (another format, or tensors of another model), EXP-002 (a LoRA
        of another base). SecurityError: SEC-005, a bad file.
    """
    path = inside(folder, f"{FOLDER}/{SETTINGS}")
    if not path.is_file():
        raise ArtifactError(f"{path}: no such file; the model has no thoughts", code="EXP-001")
    settings = read_json(path)
    if not isinstance(settings, dict) or settings.get("format") != FORMAT:
        raise ArtifactError(f"{path}: not in format {FORMAT}, which this version reads; export again", code="EXP-003")
    adapter = load_peft(inside(folder, ADAPTER), NAME, sites) if settings["adapter"] else None
    return Thinking(
        str(settings["over"]),
        _config(settings["config"], path),
        load_thoughts(inside(folder, f"{FOLDER}/{TENSORS}"), width),
        adapter,
        str(settings["trainable"]),
    )


def put_thinking(model: Any, thinking: Thinking) -> TopLora | None:
    """The LoRA on top of what `model` carries, for good, and `generate(thoughts=...)`. Returns the LoRA's places."""
    top = None
    if thinking.adapter is not None:
        top = place_adapter(model, thinking.adapter)
        top.use(flat_of(thinking.adapter, top.layout))
    attach_thoughts(model, ThoughtState(thinking.parameters, thinking.config))
    return top


def place_adapter(model: Any, adapter: Expert) -> TopLora:
    """Places for a saved LoRA; its linears share one scale."""
    scales = {a.scale for a in adapter.adapters.values()}
    if len(scales) != 1:
        raise ArtifactError("the LoRA of the thoughts has several scales; it was not trained here", code="EXP-003")
    sites = tuple(Site(name, a.a_RI.shape[1], a.b_OR.shape[0]) for name, a in adapter.adapters.items())
    ranks = tuple(a.a_RI.shape[0] for a in adapter.adapters.values())
    return TopLora(model, AdapterLayout(sites, ranks), scales.pop())


def hidden_size(model: Any) -> int:
    """Width of the hidden states that thoughts mix."""
    return int(model.config.get_text_config().hidden_size)


def attach_below(model: Any, library: ExpertLibrary, over: str, router: str, k: int, seed: int = 0) -> ExpertLibrary:
    """Experts as thoughts find them: all with their router, or one for every token."""
    if over == ROUTED:
        attach(model, library, router, k, seed=seed)
        return library
    name = over.removeprefix(ONE)
    alone = ExpertLibrary([library[name]])
    attach(model, alone, f"expert:{name}", 1)
    return alone


def _config(values: Any, path: Path) -> ThoughtConfig:
    known = {field.name for field in dataclasses.fields(ThoughtConfig)}
    if not isinstance(values, dict) or set(values) - known:
        raise ArtifactError(
            f"{path}: settings of thoughts that this version does not know; export again", code="EXP-003"
        )
    try:
        return ThoughtConfig(**{**values, "banned": tuple(int(token) for token in values.get("banned", ()))})
    except (RecipeError, TypeError, ValueError) as error:
        raise ArtifactError(f"{path}: bad settings of thoughts ({error})", code="EXP-003") from error
