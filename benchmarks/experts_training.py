"""Speed of training N LoRA experts and N gates in one pass, next to one PEFT adapter alone over the same base.

    python benchmarks/experts_training.py [--experts 12] [--rows 24 48 96] [--attention sdpa flash_attention_2]

SmolLM2-135M's shape with random weights, bf16, packed rows of 512 tokens, forward + backward (no optimizer), median of
several. Prints tokens/s and peak memory. The peer reads the same rows with one adapter for all of them.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
from measure import Times, elapsed_ms, peak, reset_peak
from peft import LoraConfig, get_peft_model
from quietgoose.routing.library import ExpertLibrary
from quietgoose.routing.model import attach, detach, uninstall
from quietgoose.train.data.attention import model_inputs
from quietgoose.train.jobs.experts import ExpertJob
from quietgoose.train.jobs.gates import GateJob
from quietgoose.train.recipe import ExpertSettings, GateSettings
from quietgoose.train.types import Batch
from random_models import smollm2
from transformers import LlamaForCausalLM

LENGTH = 512
DOCUMENT = 80
REPEATS = 5
DEVICE = torch.device("cuda")


def smollm2_shape(attention: str) -> LlamaForCausalLM:
    config = smollm2()
    config._attn_implementation = attention
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to("cuda", torch.bfloat16)


def batch_of(rows: int, experts: int) -> Batch:
    """Random rows of documents of 80 tokens, a label on the last quarter of each."""
    position = torch.arange(LENGTH) % DOCUMENT
    labels = torch.randint(49152, (rows, LENGTH))
    labels[:, position < DOCUMENT * 3 // 4] = -100
    return Batch(
        torch.randint(49152, (rows, LENGTH)), labels, position.expand(rows, -1).contiguous(),
        (torch.arange(LENGTH) // DOCUMENT + 1).int().expand(rows, -1).contiguous(),
        torch.arange(rows) % experts,
    ).to("cuda")  # fmt: skip


def timed(step: Any) -> tuple[float, float]:
    """(median seconds, peak GiB) of `step`, after two calls to warm up."""
    reset_peak(DEVICE)
    times = [elapsed_ms(step, DEVICE) for _ in range(REPEATS + 2)]
    return Times.of(times[2:]).median / 1e3, (peak(DEVICE) or 0) / 2**30


def report(what: str, attention: str, rows: int, seconds: float, peak: float) -> dict[str, Any]:
    line = {
        "what": what, "attention": attention, "rows": rows, "milliseconds": round(1e3 * seconds, 1),
        "tokens_per_second": round(rows * LENGTH / seconds), "peak_gib": round(peak, 1),
    }  # fmt: skip
    print(json.dumps(line), flush=True)
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=12)
    parser.add_argument("--rows", type=int, nargs="+", default=[24, 48])
    parser.add_argument("--attention", nargs="+", default=["sdpa"])
    options = parser.parse_args()
    print(torch.cuda.get_device_name(), torch.__version__, flush=True)
    names = [f"e{i}" for i in range(options.experts)]
    for attention in options.attention:
        model = smollm2_shape(attention)
        settings = ExpertSettings()
        for rows in options.rows:
            batch = batch_of(rows, options.experts)
            job = ExpertJob(model, attention, names, settings, 0).to("cuda")

            def backward(job: Any = job, batch: Batch = batch) -> None:
                job(batch).sum_E.sum().backward()

            report(f"{options.experts} experts", attention, rows, *timed(backward))
            flats = {f"bank.flat_{n}": torch.randn_like(job.bank.flat(n)) * 0.01 for n in names}
            library = ExpertLibrary(job.experts(flats))
            uninstall(model)
            gates = GateJob(model, attention, library, GateSettings()).to("cuda")
            report(
                f"{options.experts} gates",
                attention,
                rows,
                *timed(lambda: gates(batch).sum_E.sum().backward()),
            )
            uninstall(model)
            inputs = model_inputs(batch, attention, torch.bfloat16)
            with torch.inference_mode():
                body = model.model
                report("base forward", attention, rows, *timed(lambda: body(**inputs, use_cache=False)))
                attach(model, library, "random", 2)
                report("routed forward top-2", attention, rows, *timed(lambda: body(**inputs, use_cache=False)))
                detach(model)
        peer = get_peft_model(smollm2_shape(attention), LoraConfig(r=16, lora_alpha=16, target_modules="all-linear"))
        for rows in options.rows:
            batch = batch_of(rows, 1)
            inputs = {**model_inputs(batch, attention, torch.bfloat16), "use_cache": False}

            def peer_step(inputs: Any = inputs, batch: Batch = batch) -> None:
                logits = peer(**inputs).logits
                torch.nn.functional.cross_entropy(logits.flatten(0, -2), batch.labels_BT.flatten()).backward()

            report("one PEFT adapter", attention, rows, *timed(peer_step))
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
