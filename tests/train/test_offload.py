"""Offload to the host: the settings that can work, and (mark gpu) the curve that it must not change and the memory that it must
spare on a GPU. On the CPU tests/train/test_engine.py trains with it at every stage."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from quietgoose.base.errors import RecipeError
from quietgoose.train.strategy import check, load_strategy, merge, offloads

ROOT = Path(__file__).resolve().parents[2]
STRATEGIES = ("zero2", "zero2_offload", "zero3", "zero3_offload")
STEPS = 12
# about 76 million weights trained in fp32: 16 bytes each beside a few MB of activations
WIDE = '{"layers": 12, "width": 768, "heads": 12, "kv_heads": 4, "mlp_width": 2048, "context": 256}'
CHAIN = [
    "--stages", "[base, experts, gates]", "--base.dtype", "bfloat16", "--base.nano", WIDE, "--base.train.steps", str(STEPS),
    "--base.train.rows_per_expert", "8", "--base.train.micro_rows", "4", "--experts.train.steps", str(STEPS),
    "--gates.train.steps", str(STEPS), "--experts.train.compile", "off", "--gates.train.compile", "off",
    "--tracking.enabled", "false",
]  # fmt: skip
CURVE, BASE_CURVE = 2e-2, 2e-3
"""Largest relative difference of two losses: bf16 activations over fp32 weights, and (the base stage) fp32 throughout."""


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "device is 'nvme'; allowed are cpu, none"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "gpu"}}}, "device is 'gpu'; allowed are cpu, none"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}}, "to the host whole: set 1.0"),
        ({"zero_optimization": {"stage": 2}, "zero_force_ds_cpu_optimizer": True}, "torch's fused AdamW: remove it"),
        ({"zero_optimization": {"stage": 1, "offload_param": {"device": "cpu"}}}, "unknown key 'zero_optimization.offload_param'"),
    ],
)  # fmt: skip
def test_what_cannot_be_offloaded_is_refused(strategy: dict, message: str) -> None:
    with pytest.raises(RecipeError, match="CFG-011") as caught:
        check(strategy, "test")
    assert message in str(caught.value)


def test_offload_is_to_pinned_memory_and_with_norms() -> None:
    for name in ("zero2_offload", "zero3_offload"):
        zero = merge(load_strategy(name), micro_rows=1, micro_count=1, world_size=1, trainable=1000)[
            "zero_optimization"
        ]
        assert offloads(zero)
        assert offloads(zero, "offload_param") is (name == "zero3_offload")
        assert zero["offload_optimizer"] == {"device": "cpu", "pin_memory": True, "ratio": 1.0}
        assert zero.get("compute_grad_norm", True), "DeepSpeed refuses ZeRO-2 offload without"
    assert not offloads(load_strategy("zero2")["zero_optimization"])


def chain(folder: Path, strategy: str) -> list[dict]:
    """The first steps of the nano recipe's chain on one GPU; its events."""
    command = [
        sys.executable, "launch/train.py", "--config", "launch/recipes/nano_demo.yaml", "--strategy", strategy,
        "--output", str(folder / strategy), "--data.cache", str(folder / "cache"), *CHAIN,
    ]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}  # of tests before
    environment["CUDA_VISIBLE_DEVICES"] = (os.environ.get("CUDA_VISIBLE_DEVICES") or "0").split(",")[0]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, f"{strategy}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
    lines = (folder / strategy / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["kind"] == "step"]


@pytest.mark.gpu
@pytest.mark.timeout(900)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_offload_keeps_the_curve_and_spares_the_device(tmp_path: Path) -> None:
    """Also through accumulation (two micro-batches), with gates and experts trained in fp32 over a bf16 base."""
    steps = {name: chain(tmp_path, name) for name in STRATEGIES}
    memory = {name: max(s["memory_gib"] for s in found if s["stage"] == "base") for name, found in steps.items()}
    seconds = {name: found[STEPS - 1]["seconds"] for name, found in steps.items()}
    print(f"memory of the base stage in GiB: {memory}; seconds of its last step: {seconds}")
    for name in STRATEGIES[1:]:
        for ours, plain in zip(steps[name], steps["zero2"], strict=True):
            tolerance = BASE_CURVE if plain["stage"] == "base" else CURVE
            assert (ours["stage"], ours["step"], ours["skipped"]) == (plain["stage"], plain["step"], False)
            assert ours["loss"] == pytest.approx(plain["loss"], rel=tolerance), (name, ours["stage"], ours["step"])
    # 12 bytes a weight leave the device (0.85 GiB here); what is left of ZeRO-3 is weights, gradients, buckets
    assert memory["zero2_offload"] < 0.65 * memory["zero2"], memory
    assert memory["zero3_offload"] < 0.65 * memory["zero3"], memory
