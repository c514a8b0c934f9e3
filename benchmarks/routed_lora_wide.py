"""How a wide model adds its experts: inside the base's product (`persistent`), to the library's product piece by piece, or to all of
it, as a branch of the graph or not.

    python benchmarks/routed_lora_wide.py --layers 16 --batches 8x512 4x512 1x512 --out results/routed_lora_wide.json

A wide model's products run at the card's power limit, where what counts is energy: the clock falls until it is met, over a second
or so. So base and arms are captured first, and each is replayed for a while before it is timed, one after the other, in several
rounds; a share is an arm's time by the base's of its round, the median over the rounds. Random weights, sixteen experts (--experts),
top-2. What it finds is for CROSSOVERS, BESIDE and STOCK_PIECE of kernels/routed_lora/tiles.py.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import argparse
import statistics
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from measure import about, say, tidy, time_steps, write
from quietgoose.kernels.routed_lora import tiles
from quietgoose.routing.model import attach, detach
from routed_lora_models import captured, forward, make_library, make_model, tokens_of
from routed_lora_tune import EVERY, _content

MOST = 10_000  # replays at a time


def arms() -> dict[str, dict[str, list[Any]]]:
    """Contents of tables of tiles.py by name: as they are; persistent; split and stock without a branch, whole and in the largest and
    the smallest of the pieces that the tuner knows; and stock with its branch."""
    found: dict[str, dict[str, list[Any]]] = {"table": {}, "persistent": _only("persistent")}
    for name in ("split", "stock"):
        for piece in (tiles.STOCK_PIECES[0], tiles.STOCK_PIECES[1], tiles.STOCK_PIECES[4]):
            size = "whole" if piece[1] >= 2**40 else f"pieces of {piece[1]} outputs"
            found[f"{name}, {size}"] = {
                **_only(name), "beside": [(EVERY, EVERY, False)], "stock_piece": [(EVERY, EVERY, piece)],
            }  # fmt: skip
    found["stock, a branch"] = {**_only("stock"), "beside": [(EVERY, EVERY, True)]}
    return found


def _only(name: str) -> dict[str, list[Any]]:
    return {"crossovers": [(EVERY, EVERY, EVERY, name)]}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shape", default="llama3-8b")
    p.add_argument("--layers", type=int, default=16)
    p.add_argument("--experts", type=int, default=16)
    p.add_argument("--batches", nargs="+", default=["8x512"])
    p.add_argument("--arms", nargs="+", default=[*arms()], choices=[*arms()])
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--seconds", type=float, default=1.5, help="of timed replays an arm and round")
    p.add_argument("--out", type=Path)
    options = p.parse_args()
    device = torch.device("cuda")
    found: list[dict[str, Any]] = []
    model = make_model(options.shape, options.layers, device)
    for batch in options.batches:
        found += _batch(options, model, batch)
        tidy(device)
    if options.out:
        write({**about(device), "results": found}, options.out)


@torch.no_grad()
def _batch(options: argparse.Namespace, model: Any, batch: str) -> list[dict[str, Any]]:
    work = forward(model, tokens_of(model, *(int(n) for n in batch.split("x"))))
    replays = {"base": captured(work)}
    attach(model, make_library(model, options.experts), k=2)
    for name in options.arms:
        with ExitStack() as stack:
            for table, content in arms()[name].items():
                stack.enter_context(_content(table, content))
            replays[name] = captured(work)
    times: dict[str, list[float]] = {name: [] for name in replays}
    time_steps(replays["base"], model.device, MOST, options.seconds)
    for _ in range(options.rounds):
        for name, replay in replays.items():
            time_steps(replay, model.device, MOST, options.seconds / 4)
            times[name].append(time_steps(replay, model.device, MOST, options.seconds).mean)
    detach(model)
    return [_row(options.shape, options.experts, batch, name, times[name], times["base"]) for name in replays]


def _row(shape: str, experts: int, batch: str, name: str, times: list[float], base: list[float]) -> dict[str, Any]:
    shares = [mine / plain for mine, plain in zip(times, base)]
    row = {
        "shape": shape, "experts": experts, "batch": batch, "arm": name, "ms": round(statistics.median(times), 3),
        "share": round(statistics.median(shares), 4), "least": round(min(shares), 4), "most": round(max(shares), 4),
    }  # fmt: skip
    say(*(f"{key}={value}" for key, value in row.items()))
    return row


if __name__ == "__main__":
    main()
