"""All gates of a library in one safetensors file: `EXPERT/SITE` -> fp32 [I], and the mean activations beside them, if the
library has some: `EXPERT/SITE:mean`. Loading never falls back to fresh gates.

One tensor per expert and site, so that adding an expert leaves every stored tensor of the others as it is.
Callers: train/stages.py, train/export.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from ..base.errors import ArtifactError, SecurityError
from ..base.files import safe_name, write_atomic
from ..base.tensor_file import read_tensors
from .library import ExpertLibrary
from .sites import Site

MEAN = ":mean"


def save_gates(library: ExpertLibrary, path: Path) -> None:
    """Write the gates and mean activations of every expert; ArtifactError (EXP-003) if one has no gates."""
    tensors: dict[str, Tensor] = {}
    for expert in library:
        if expert.gates is None:
            raise ArtifactError(f"expert {expert.name} has no gates to save; train them first", code="EXP-003")
        for kind, vectors in (("", expert.gates), (MEAN, expert.means or {})):
            for site, vector in vectors.items():
                tensors[f"{expert.name}/{site}{kind}"] = vector.detach().float().cpu().contiguous()
    write_atomic(path, save(tensors, metadata={"format": "pt"}))


def load_gates(path: Path, library: ExpertLibrary, sites: Sequence[Site]) -> ExpertLibrary:
    """`library` with its gates (and mean activations) from `path`: every expert at every site it adapts, width = the site's
    input width.

    Gates of experts that the library does not hold are checked alike and left out. Raises SEC-005 for a bad file or
    tensor, EXP-003 for a missing, surplus, zero or non-finite gate.
    """
    widths = {site.name: site.in_features for site in sites}
    gates: dict[str, dict[str, Tensor]] = {}
    means: dict[str, dict[str, Tensor]] = {}
    for key, vector in read_tensors(path.parent, path.name, ("F32",)).items():
        found = means if key.endswith(MEAN) else gates
        name, _, site = key.removesuffix(MEAN).partition("/")
        if site not in widths:
            raise ArtifactError(f"{path}: gate {ascii(key)[:160]} names no linear of this base", code="EXP-003")
        if tuple(vector.shape) != (widths[site],):
            raise SecurityError(
                f"{path}: gate {ascii(key)[:160]} has shape {tuple(vector.shape)}, expected ({widths[site]},)",
                code="SEC-005",
            )
        found.setdefault(safe_name(name), {})[site] = vector
    missing = [name for name in library.names if name not in gates]
    if missing:
        raise ArtifactError(f"{path}: no gates for expert {missing[0]}; train its gates first", code="EXP-003")
    return library.with_gates({name: gates[name] for name in library.names}, means)
