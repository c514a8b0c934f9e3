"""Where a wide model adds its experts to the base's products: as a branch of the graph, whole, or in pieces that the L2 holds.

    python benchmarks/routed_lora_pieces.py --layers 16 --batches 8x512 4x512 1x512 --out results/routed_lora_pieces.json

A wide model's products run at the card's power limit, so its clock drifts by some percent within a minute: base and arms are
captured first and replayed in turn, and a share is the median over the rounds of one round's ratio. Random weights, sixteen
experts, top-2. What it finds is for BESIDE and STOCK_PIECE of kernels/routed_lora/tiles.py.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from measure import about, intervals, say, write
from quietgoose.kernels.routed_lora import tiles
from quietgoose.routing.model import attach, detach
from routed_lora_models import captured, forward, make_library, make_model, tokens_of
from routed_lora_tune import EVERY, _content

SEVERAL = 4  # replays a round


def _number(most: int) -> str:
    return "all" if most >= 2**40 else str(most)


def arms() -> dict[str, tuple[list[Any], list[Any]]]:
    """(BESIDE, STOCK_PIECE) by name: as they are, a branch, and without it each of the pieces that the tuner knows."""
    found = {
        "table": (list(tiles.BESIDE), list(tiles.STOCK_PIECE)),
        "branch": ([(EVERY, EVERY, True)], list(tiles.STOCK_PIECE)),
    }
    for rows, columns in tiles.STOCK_PIECES:
        name = f"{_number(rows)} tokens, {_number(columns)} outputs"
        found[name] = ([(EVERY, EVERY, False)], [(EVERY, EVERY, (rows, columns))])
    return found


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shape", default="llama3-8b")
    p.add_argument("--layers", type=int, default=16)
    p.add_argument("--batches", nargs="+", default=["8x512"])
    p.add_argument("--rounds", type=int, default=12)
    p.add_argument("--out", type=Path)
    options = p.parse_args()
    device = torch.device("cuda")
    found: list[dict[str, Any]] = []
    model = make_model(options.shape, options.layers, device)
    for batch in options.batches:
        found += _batch(options, model, batch)
    if options.out:
        write({**about(device), "results": found}, options.out)


@torch.no_grad()
def _batch(options: argparse.Namespace, model: Any, batch: str) -> list[dict[str, Any]]:
    work = forward(model, tokens_of(model, *(int(n) for n in batch.split("x"))))
    replays = {"base": captured(work)}
    attach(model, make_library(model, 16), k=2)
    for name, (beside, piece) in arms().items():
        with _content("beside", beside), _content("stock_piece", piece):
            replays[name] = captured(work)
    times: dict[str, list[float]] = {name: [] for name in replays}
    for _ in range(options.rounds):
        for name, replay in replays.items():
            replay()
            times[name].append(statistics.fmean(intervals(replay, model.device, SEVERAL)))
    detach(model)
    return [_row(options.shape, batch, name, times[name], times["base"]) for name in replays]


def _row(shape: str, batch: str, name: str, times: list[float], base: list[float]) -> dict[str, Any]:
    shares = [mine / plain for mine, plain in zip(times, base)]
    low, *_, high = statistics.quantiles(shares, n=5)
    row = {
        "shape": shape, "batch": batch, "arm": name, "ms": round(statistics.median(times), 3),
        "share": round(statistics.median(shares), 4), "p20": round(low, 4), "p80": round(high, 4),
    }  # fmt: skip
    say(*(f"{key}={value}" for key, value in row.items()))
    return row


if __name__ == "__main__":
    main()
