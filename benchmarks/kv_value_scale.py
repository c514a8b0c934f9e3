"""What one channel scale for all of a row's values costs, against one a block: relative error of the values, on a CPU.

    python benchmarks/kv_value_scale.py [--tokens 2048] [--prompts 1 16 512 2048]
    python benchmarks/kv_value_scale.py --model FOLDER --text FILE.gz        # values of a model instead of random ones

60 % of the tokens, chosen at random, at 4 bits, the others at 2; a prompt is packed at once, later tokens in windows of
128. Per block: ZipCache's c = sqrt(max |V|) of the block's own tokens. Kept: c of the prompt, for everything after it.
Printed is the root mean square error over that of the values, averaged over heads.
"""

from __future__ import annotations

import argparse
import gzip
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from quietgoose.kernels.quantize import BLOCK, reference
from torch import Tensor

RATIO, WINDOW = 0.6, 128


def flushes(value: Tensor, prompt: int, order: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(bits, values [heads, count, D]) of every flush and arena of value [heads, n, D], tokens in position order."""
    n = value.shape[1]
    for start, end in [(0, prompt), *((s, min(s + WINDOW, n)) for s in range(prompt, n, WINDOW))]:
        high = math.ceil(RATIO * (end - start))
        ranked = order[:, start:end].argsort(1) + start
        for bits, chosen in ((4, ranked[:, :high]), (2, ranked[:, high:])):
            if chosen.shape[1]:
                index = chosen.sort(1).values.unsqueeze(2).expand(-1, -1, value.shape[2])
                yield bits, value.gather(1, index)


def squared_error(value: Tensor, channel: Tensor, bits: int) -> Tensor:
    """Summed over tokens and channels, [heads]."""
    codes, scale, minimum = reference.quantize_values(value, channel, bits)
    restored = channel.unsqueeze(1) * (scale.unsqueeze(2) * codes + minimum.unsqueeze(2))
    return (restored - value).pow(2).sum((1, 2))


def errors(value: Tensor, prompt: int, order: Tensor) -> tuple[float, float]:
    """(per block, kept) for values [heads, n, D] fp32."""
    blocks, kept = torch.zeros(value.shape[0]), torch.zeros(value.shape[0])
    channels: dict[int, Tensor] = {}
    for bits, part in flushes(value, prompt, order):
        channel = channels.setdefault(bits, reference.channel_scales(part))
        kept += squared_error(part, channel, bits)
        for block in part.split(BLOCK, 1):
            own = reference.round_up(block.abs().amax(1).sqrt()).clamp_min(reference.SCALE_FLOOR)
            blocks += squared_error(block, own, bits)
    whole = value.pow(2).sum((1, 2))
    return float((blocks / whole).sqrt().mean()), float((kept / whole).sqrt().mean())


def random_values(tokens: int, heads: int = 8, width: int = 128) -> dict[str, Tensor]:
    shape = (heads, tokens, width)
    normal, heavy = torch.randn(shape), torch.distributions.StudentT(3.0).sample(shape)
    spread = torch.randn(heads, 1, width).exp()
    first_small = torch.randn(shape)
    first_small[:, 0] *= 0.05
    dead = torch.randn(shape)
    dead[:, : tokens // 2, 7] = 0.0
    return {
        "normal": normal,
        "normal, channels of log-normal size": normal * spread,
        "Student t, 3 degrees": heavy,
        "the same, channels of log-normal size": heavy * spread,
        "normal, first token 1/20": first_small,
        "normal, one channel 0 in the first half": dead,
    }


def model_values(folder: Path, text: Path, tokens: int) -> dict[str, Tensor]:
    """Values of all layers and heads of a Hugging Face causal LM over the first tokens of a text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with gzip.open(text, "rt", encoding="utf-8") as file:
        words = file.read(20 * tokens)
    ids = AutoTokenizer.from_pretrained(folder)(words, return_tensors="pt").input_ids[:, :tokens]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    layers = model(ids, use_cache=True).past_key_values.layers
    return {f"{folder.name}, {len(layers)} layers": torch.cat([layer.values[0] for layer in layers])}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--prompts", type=int, nargs="+", default=[1, 16, 512, 2048])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--text", type=Path)
    given = parser.parse_args()
    if (given.model is None) != (given.text is None):
        parser.error("--model and --text go together: a folder, and a gzipped text for it to read")
    torch.manual_seed(0)
    rows = model_values(given.model, given.text, given.tokens) if given.model else random_values(given.tokens)
    for name, value in rows.items():
        order = torch.rand(value.shape[:2])
        for prompt in given.prompts:
            per_block, kept = errors(value, min(prompt, value.shape[1]), order)
            print(f"{name:40s} prompt {prompt:5d}  per block {per_block:.3f}  kept {kept:.3f}  {kept / per_block:.3f}x")


if __name__ == "__main__":
    main()
