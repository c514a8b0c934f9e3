"""Time and memory of decoding with every kind of KV cache, on one shape, in one run.

    python benchmarks/kv_cache.py --out results/kv_cache.json                        # 1x4096 and 8x4096, all peers
    python benchmarks/kv_cache.py --cells 1x512 8x32768 --peers dynamic static_captured zip_captured:quality
    python benchmarks/kv_cache.py --cells 1x4096 --variants                          # ways to make the captured step
    python benchmarks/kv_cache.py --prefill                                          # prefill alone, its host time apart
    python benchmarks/kv_cache.py --tiny                                             # a small shape, also on a CPU

LLaMA3-8B's shape with random bf16 weights (no quality is claimed from it). A cell is rows x input tokens. Per cell and
peer: prefill, decode step (median, p20, p80 of consecutive steps without a wait between them), the limit that bytes set
at the measured copy bandwidth (weights + cache read once), bytes per second achieved, peak memory, true bytes of the
cache. A prompt too long to prefill in reasonable time is replaced by random keys and values. Nothing is timed before
the correctness gate is green. JSON is rewritten after every cell; a peer that fails leaves its error there.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from kv_cache_gate import gate
from kv_cache_runs import DEFAULT_PEERS, NotAvailable, Run, StepSettings, make_run
from measure import Times, copy_bandwidth, elapsed_ms, peak, reset_peak, say, time_steps, wait
from random_models import build, llama3_8b, numbers_cached, tiny, weight_bytes

PREFILL_CELLS = ("1x512", "8x512", "1x32768", "8x4096")
PREFILL_PEERS = ("dynamic", "static_captured", "zip_captured", "zip_eager")
VARIANTS = [
    StepSettings(fuse="none"),
    StepSettings(fuse="layer", join=False),
    StepSettings(fuse="layer"),
    StepSettings(fuse="layer", stream=True),
    StepSettings(fuse="layer", tune=True),
    StepSettings(fuse="model"),
    StepSettings(fuse="model", stream=True),
]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="+", default=None, help="rows x tokens, such as 8x4096")
    parser.add_argument("--peers", nargs="+", default=None)
    parser.add_argument(
        "--variants", action="store_true", help="compare ways to make the captured step instead of peers"
    )
    parser.add_argument(
        "--prefill", action="store_true",
        help="time prefills only: whole and until the last launch is queued; other cells and peers by default",
    )  # fmt: skip
    parser.add_argument("--variant-peer", default="zip_captured", help="whose step --variants makes")
    parser.add_argument("--fuse", default="layer", choices=["model", "layer", "none"])
    parser.add_argument("--stream", action="store_true", help="our kernel for linears of up to 16 rows")
    parser.add_argument("--tune", action="store_true", help="let the compiler measure GEMM variants")
    parser.add_argument("--steps", type=int, default=140, help="steps of a cell at most")
    parser.add_argument("--decode-seconds", type=float, default=2.5, help="timed steps of a cell take no longer")
    parser.add_argument(
        "--budget-seconds", type=float, default=90.0, help="a peer that has used so much starts no cell"
    )
    parser.add_argument("--prefill-tokens", type=int, default=40000, help="rows x tokens prefilled for real, at most")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--tiny", action="store_true", help="a 2-layer shape; runs on a CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--skip-gate", action="store_true", help="time without checking; the JSON says so")
    parser.add_argument("--out", type=Path, default=Path("kv_cache.json"))
    options = parser.parse_args()
    options.peers = options.peers or list(PREFILL_PEERS if options.prefill else DEFAULT_PEERS)
    return options


def cells_of(options: argparse.Namespace) -> list[tuple[int, int]]:
    usual = PREFILL_CELLS if options.prefill else ("1x4096", "8x4096")
    wanted = options.cells or (["1x64", "2x96"] if options.tiny else list(usual))
    try:
        found = [tuple(int(part) for part in cell.split("x")) for cell in wanted]
        if any(len(cell) != 2 or min(cell) < 1 for cell in found):
            raise ValueError
    except ValueError:
        raise SystemExit(f"--cells {' '.join(wanted)}: each is rows x tokens, such as 8x4096") from None
    return found


def free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    reset_peak(device)


def measure(run: Run, options: argparse.Namespace) -> dict[str, Any]:
    """Prefill and decode of one peer on one cell."""
    found: dict[str, Any] = {"launches": run.launches()}
    vocabulary = run.model.config.vocab_size
    if run.rows * run.tokens <= options.prefill_tokens:
        ids = torch.randint(vocabulary, (run.rows, run.tokens), device=run.device)
        found["first_prefill_ms"] = round(elapsed_ms(lambda: run.prefill(ids), run.device), 2)
        repeats = 2 if found["first_prefill_ms"] < 3000 else 1
        found["prefill_ms"] = round(min(elapsed_ms(lambda: run.prefill(ids), run.device) for _ in range(repeats)), 2)
        if run.device.type == "cuda":
            found["prefill_peak_bytes"] = peak(run.device)
            reset_peak(run.device)
    else:
        run.fill()
    found["filled"] = "prefill" if "prefill_ms" in found else "random keys and values"
    found["cache_bytes"] = run.cache_bytes()
    found["bits_per_number"] = round(
        8 * found["cache_bytes"] / numbers_cached(run.model.config, run.rows, run.tokens), 3
    )
    found["bytes_per_token"] = round(found["cache_bytes"] / (run.rows * run.tokens), 1)
    found["warm_up_ms"] = round(elapsed_ms(lambda: [run.step() for _ in range(4)], run.device), 1)
    times: Times = time_steps(run.step, run.device, options.steps, options.decode_seconds)
    found["decode_ms"] = times.rounded()
    if run.device.type == "cuda":
        found["decode_peak_bytes"] = peak(run.device)
    return found


def measure_prefill(run: Run, options: argparse.Namespace) -> dict[str, Any]:
    """Prefills of one peer on one cell. `host`: until the last launch is queued, so what a faster device cannot save;
    on long prompts the host waits for a full queue and the two come together."""
    ids = torch.randint(run.model.config.vocab_size, (run.rows, run.tokens), device=run.device)
    found: dict[str, Any] = {"launches": run.launches(), "first_prefill_ms": round(prefill_ms(run, ids)[0], 2)}
    pairs = [prefill_ms(run, ids)]
    pairs += [prefill_ms(run, ids) for _ in range(max(2, min(15, int(2500 / pairs[0][0]))))]
    whole, host = zip(*pairs)
    found["prefill_ms"], found["host_ms"] = (Times.of(list(part)).rounded() for part in (whole, host))
    found["cache_bytes"] = run.cache_bytes()
    if run.device.type == "cuda":
        found["prefill_peak_bytes"] = peak(run.device)
    return found


def prefill_ms(run: Run, ids: torch.Tensor) -> tuple[float, float]:
    """(milliseconds of one prefill, those until its last launch was queued); the device is drained before and after."""
    wait(run.device)
    start = time.perf_counter()
    run.prefill(ids)
    queued = time.perf_counter()
    wait(run.device)
    return 1e3 * (time.perf_counter() - start), 1e3 * (queued - start)


def with_limit(found: dict[str, Any], weights: int, bandwidth: float) -> dict[str, Any]:
    """Adds what the bytes alone would take, and the rate reached."""
    moved = weights + found["cache_bytes"]
    found["limit_ms"] = round(1e3 * moved / bandwidth, 4)
    found["gb_per_second"] = round(moved / found["decode_ms"]["median"] / 1e6, 1)
    found["share_of_bandwidth"] = round(moved / (found["decode_ms"]["median"] / 1e3) / bandwidth, 3)
    return found


def ask_room(name: str, model: Any, cell: tuple[int, int], steps: int) -> None:
    """Refuse a cell whose keys and values cannot fit at 16 bits, before anything is allocated."""
    device = next(model.parameters()).device
    if device.type != "cuda" or not name.startswith(("dynamic", "static")):
        return
    needed = 2 * numbers_cached(model.config, cell[0], cell[1] + steps)
    available = torch.cuda.mem_get_info(device)[0]
    if needed > available:
        raise NotAvailable(f"keys and values need {needed / 2**30:.1f} GiB, {available / 2**30:.1f} GiB are free")


def attempt(name: str, model: Any, cell: tuple[int, int], step: StepSettings, options: argparse.Namespace) -> dict:
    """One peer on one cell; whatever it raises is its result."""
    rows, tokens = cell
    device = next(model.parameters()).device
    free(device)
    run = None
    try:
        ask_room(name, model, cell, options.steps)
        run = make_run(name, model, rows, tokens, options.steps + 16, step)
        return measure_prefill(run, options) if options.prefill else measure(run, options)
    except NotAvailable as reason:
        return {"not_available": str(reason)}
    except Exception as error:  # a peer may fail in any way; the table goes on and keeps the text
        return {"error": f"{type(error).__name__}: {error}"[:600]}
    finally:
        if run is not None:
            try:
                run.close()
            except Exception as error:
                say("  closing failed:", repr(error)[:200])
        del run
        model.set_attn_implementation("sdpa")
        free(device)


def collect(model: Any, report: dict[str, Any], options: argparse.Namespace) -> None:
    """All peers (or variants) on all cells, peer by peer; the file is whole after every cell."""
    weights = weight_bytes(model)
    report["weight_bytes_read"] = weights
    chosen = StepSettings(options.fuse, True, options.stream, options.tune)
    work = [(name, chosen, name) for name in options.peers]
    if options.variants:
        work = [(options.variant_peer, v, f"{options.variant_peer} ({v})") for v in VARIANTS]
    for name, settings, label in work:
        spent = 0.0
        for cell in cells_of(options):
            title = f"{label} {cell[0]}x{cell[1]}"
            if spent > 1e3 * options.budget_seconds:
                found: dict[str, Any] = {"not_available": f"time budget of {options.budget_seconds} s was used up"}
            else:
                say(title)
                result: dict[str, Any] = {}
                spent += elapsed_ms(lambda: result.update(attempt(name, model, cell, settings, options)), model.device)
                found = with_limit(result, weights, report["bytes_per_second"]) if "decode_ms" in result else result
            say("  ", found.get("error") or found.get("not_available") or brief(found))
            report["results"].append({"peer": label, "rows": cell[0], "tokens": cell[1], **found})
            options.out.write_text(json.dumps(report, indent=1))


def brief(found: dict[str, Any]) -> str:
    if "host_ms" in found:
        whole, host = found["prefill_ms"], found["host_ms"]
        return f"prefill {whole['median']:.1f} ({whole['p20']:.1f}-{whole['p80']:.1f}) ms, host {host['median']:.1f} ms"
    decode = found["decode_ms"]
    return (
        f"prefill {found.get('prefill_ms', '-')} ms, decode {decode['median']:.2f} ({decode['p20']:.2f}-{decode['p80']:.2f}) "
        f"ms, limit {found['limit_ms']:.2f}, {found['gb_per_second']:.0f} GB/s, {found['bits_per_number']} bits"
    )


def prefill_table(report: dict[str, Any]) -> str:
    """Markdown, one line a cell and peer; `over` is the difference from the first peer of the cell."""
    lines = ["|cell|cache|prefill ms (p20-p80)|over|host ms|first ms|", "|-|-|-|-|-|-|"]
    base: dict[tuple[int, int], float] = {}
    for r in sorted(report["results"], key=lambda r: (r["rows"] * r["tokens"], r["rows"])):
        cell = (r["rows"], r["tokens"])
        if "host_ms" not in r:
            lines.append(f"|{cell[0]}x{cell[1]}|{r['peer']}|{(r.get('error') or r['not_available'])[:90]}||||")
            continue
        whole = r["prefill_ms"]
        over = 100 * (whole["median"] / base.setdefault(cell, whole["median"]) - 1)
        lines.append(
            f"|{cell[0]}x{cell[1]}|{r['peer']}|{whole['median']:.1f} ({whole['p20']:.1f}-{whole['p80']:.1f})|{over:+.1f} %|"
            f"{r['host_ms']['median']:.1f}|{r['first_prefill_ms']:.0f}|"
        )
    return "\n".join(lines)


def table(report: dict[str, Any]) -> str:
    """Markdown, one section a cell."""
    lines: list[str] = []
    cells = dict.fromkeys((r["rows"], r["tokens"]) for r in report["results"])
    for rows, tokens in cells:
        lines += [
            f"\n### {rows} x {tokens}\n",
            "|cache|launches|prefill ms|step ms (p20-p80)|mean|limit|GB/s|of copy|peak GiB|cache MiB|bits|",
            "|-|-|-|-|-|-|-|-|-|-|-|",
        ]
        for r in report["results"]:
            if (r["rows"], r["tokens"]) != (rows, tokens):
                continue
            if "decode_ms" not in r:
                lines.append(f"|{r['peer']}|{(r.get('error') or r['not_available'])[:90]}|" + "|" * 9)
                continue
            step = r["decode_ms"]
            peak = f"{r['decode_peak_bytes'] / 2**30:.1f}" if "decode_peak_bytes" in r else "-"
            lines.append(
                f"|{r['peer']}|{r['launches']}|{r.get('prefill_ms', '-')}|"
                f"{step['median']:.2f} ({step['p20']:.2f}-{step['p80']:.2f})|{step['mean']:.2f}|{r['limit_ms']:.2f}|"
                f"{r['gb_per_second']:.0f}|{r['share_of_bandwidth']:.2f}|{peak}|{r['cache_bytes'] / 2**20:.0f}|"
                f"{r['bits_per_number']}|"
            )
    return "\n".join(lines)


def main() -> None:
    options = parse()
    device = torch.device(options.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch._dynamo.config.recompile_limit = 64
    torch.set_grad_enabled(False)
    cells_of(options)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "torch": torch.__version__, "transformers": transformers.__version__, "dtype": str(dtype),
        "shape": "tiny" if options.tiny else f"llama3-8b, {options.layers} layers", "results": [],
    }  # fmt: skip
    say(report["device"], "torch", torch.__version__, "transformers", transformers.__version__)
    if options.skip_gate:
        report["gate"] = "skipped"
    else:
        report["gate"] = gate(device, dtype)
        say("gate:", report["gate"])
        options.out.write_text(json.dumps(report, indent=1))
        if not report["gate"]["green"]:
            raise SystemExit("the correctness gate is red: nothing is timed")
    report["bytes_per_second"] = copy_bandwidth(device)
    say(f"copy {report['bytes_per_second'] / 1e9:.0f} GB/s; building the model")
    model = build(tiny() if options.tiny else llama3_8b(options.layers), device, dtype)
    collect(model, report, options)
    say("done")
    print(prefill_table(report) if options.prefill else table(report))


if __name__ == "__main__":
    main()
