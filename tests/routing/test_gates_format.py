"""Gates survive the disk bit for bit; a file that is not exactly the library's gates is refused."""

from __future__ import annotations

import pytest
import torch
from quietgoose.base.errors import ArtifactError, SecurityError
from quietgoose.routing.gates_format import load_gates, save_gates
from quietgoose.routing.sites import all_sites
from safetensors.torch import load_file, save_file


def test_gates_round_trip_and_additions_leave_stored_tensors(model, mixed, new_expert, tmp_path) -> None:
    path, sites = tmp_path / "gates.safetensors", all_sites(model)
    save_gates(mixed, path)
    again = load_gates(path, mixed, sites)
    for expert in mixed:
        assert set(again[expert.name].gates) == set(expert.gates)
        assert all(torch.equal(again[expert.name].gates[s], v) for s, v in expert.gates.items())
    before = load_file(path)
    save_gates(mixed.add(new_expert(model, "eel")), path)
    after = load_file(path)
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    assert load_gates(path, mixed.restrict(["dog"]), sites).names == ("dog",)


def test_mean_activations_lie_beside_the_gates(model, mixed, tmp_path) -> None:
    path, sites = tmp_path / "gates.safetensors", all_sites(model)
    held = mixed.with_gates(
        {e.name: e.gates for e in mixed}, {e.name: {s: v + 1 for s, v in e.gates.items()} for e in mixed}
    )
    save_gates(held, path)
    again = load_gates(path, mixed, sites)
    for expert in held:
        assert all(torch.equal(again[expert.name].means[s], v) for s, v in expert.means.items())
        assert all(torch.equal(again[expert.name].gates[s], v) for s, v in expert.gates.items())
    assert all(expert.means is None for expert in mixed)
    tensors = load_file(path)
    del tensors[next(key for key in tensors if key.endswith(":mean"))]
    save_file(tensors, path)
    with pytest.raises(ArtifactError, match=r"EXP-003.*mean activations and adapters"):
        load_gates(path, mixed, sites)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (lambda t: t.pop(next(k for k in t if k.startswith("cat/"))), ArtifactError, "EXP-003.*cat"),
        (
            lambda t: [t.pop(k) for k in list(t) if k.startswith("dog/")],
            ArtifactError,
            "EXP-003.*no gates for expert dog",
        ),
        (lambda t: t.update({"cat/nowhere": torch.ones(3)}), ArtifactError, "EXP-003.*names no linear"),
        (lambda t: t[next(iter(t))].zero_(), ArtifactError, "EXP-003.*zero"),
        (lambda t: t[next(iter(t))].fill_(float("inf")), SecurityError, "SEC-005.*infinite"),
        (lambda t: t.update({next(iter(t)): torch.randn(5)}), SecurityError, "SEC-005.*shape"),
        (lambda t: t.update({next(iter(t)): t[next(iter(t))].bfloat16()}), SecurityError, "SEC-005.*BF16"),
        (lambda t: t.update({"../x/model.layers.0.mlp.up_proj": torch.ones(24)}), ArtifactError, "EXP-003"),
    ],
)
def test_wrong_gates_are_refused(model, mixed, tmp_path, change, error, text) -> None:
    path = tmp_path / "gates.safetensors"
    save_gates(mixed, path)
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(error, match=text):
        load_gates(path, mixed, all_sites(model))


def test_an_ungated_library_cannot_be_saved(model, new_expert, equal, tmp_path) -> None:
    with pytest.raises(ArtifactError, match=r"EXP-003.*eel"):
        save_gates(equal.add(new_expert(model, "eel", gates=False)), tmp_path / "gates.safetensors")
