"""What Triton makes of the routed kernels for an H100, looked at on a machine without one: no copy is issued into a
shared-memory buffer that an asynchronous tensor-core product still reads.

The compiler gives a tile that registers read as well a buffer too few (Triton pull request 7110). Results are then wrong
from time to time, and only where a program holds 64 tokens or more, so that few calls show it.

And where a launch begins before the one that makes hm has ended, what it reads of hm and all it writes stands behind its wait.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache

import pytest

pytest.importorskip("triton")

PROGRAM = """
import json
import torch
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor
from quietgoose.kernels.routed_lora import group_shape, group_tables, grouped, launch, split_gates, stack_factors, tiles

NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.int32: "i32"}
made = {}


def record(kernel, grid):
    def go(*given, num_warps=4, num_stages=3, maxnreg=None, launch_pdl=False, **constants):
        signature, fixed, aligned = {}, dict(constants), {}
        for i, parameter in enumerate(kernel.params):
            name = parameter.name
            value = given[i] if i < len(given) else constants[name]
            if name in constants or value is None or (isinstance(value, int) and value == 1):
                signature[name], fixed[name] = "constexpr", value
                continue
            if isinstance(value, TensorDescriptor):
                signature[name] = f"tensordesc<{NAMES[value.base.dtype]}{value.block_shape}>"
                continue
            pointer = isinstance(value, torch.Tensor)
            signature[name] = "*" + NAMES[value.dtype] if pointer else "i32" if abs(value) < 2**31 else "i64"
            if pointer or value % 16 == 0:
                aligned[(i,)] = [["tt.divisibility", 16]]
        key = str((kernel.__name__, num_warps, num_stages, maxnreg, launch_pdl, *constants.items()))
        if key not in made:
            source = ASTSource(kernel, signature, fixed, aligned)
            options = {"num_warps": num_warps, "num_stages": num_stages, "maxnreg": maxnreg, "launch_pdl": launch_pdl}
            done = compile(source, target=GPUTarget("cuda", 90, 32), options=options)
            ptx = done.asm["ptx"]
            made[key] = done.asm["ttgir"], ptx.count("cp.async.bulk.tensor"), done.metadata.shared, ptx
    return go


JITFunction.__getitem__ = record
kind, width, outs = torch.bfloat16, 576, (576, 192, 192)


def problem(tokens, experts, rank=16):
    ranks = [[rank] * experts] * 3
    shape, tables = group_shape(ranks), group_tables(ranks, torch.device("cpu"))
    x, a = torch.zeros(tokens, width, dtype=kind), torch.zeros(sum(shape.slots), width, dtype=kind)
    sites = launch.Sites([torch.zeros(o, width, dtype=kind) for o in outs], [], [a.new_zeros(shape.slots[0], o) for o in outs])
    return x, split_gates(torch.zeros(3 * experts, width), kind), tables, shape, 2, False, a, sites


for tokens in (4096, 32768):
    *both, a, sites = problem(tokens, 16)
    launch.linear(both[0], launch.route(*both, a, store=False)[2], sites, both[3])  # by descriptors
    chosen = [tiles.choose(table, tokens, width) for table in (tiles.ROUTE_SHRINK, tiles.LINEAR_EXPAND)]
    hidden = launch.route(*both, a, store=False, chosen=chosen[0])[2]
    launch.linear(both[0], hidden, sites, both[3], chosen=chosen[1])
    weight, index, _ = launch.route(*both)
    launch.shrink_masked(both[0], a, both[2], both[3], weight, index)
*both, a, sites = problem(4096, 16)
for tile in tiles.CANDIDATES["route_shrink_copies"]:
    hidden = launch.route(*both, a, store=False, chosen=tile)[2]
for tile in tiles.CANDIDATES["linear_expand_copies"]:
    launch.linear(both[0], hidden, sites, both[3], chosen=tile)
weight, index, _ = launch.route(*both)
for tile in (tiles.MASKED_SHRINK[-1][2], *tiles.CANDIDATES["masked_shrink_copies"]):
    launch.shrink_masked(both[0], a, both[2], both[3], weight, index, chosen=tile, begins=True)
launch.route(*both, a, store=False, begins=True)
for tile in (chosen[1], *tiles.CANDIDATES["linear_expand_copies"]):
    if tile.columns in (128, 192) or tile.loads == "joined":
        launch.linear(both[0], hidden, sites, both[3], chosen=tile, follows=True)
launch.decode(*problem(64, 16))
for tile, begins in ((None, False), *((tile, True) for tile in tiles.CANDIDATES["weigh_products"])):
    *both, a, sites = problem(512, 16)
    _, gates, stack = stack_factors(a, both[1])
    launch.route_split(both[0], stack, gates, *both[2:], chosen=tile, begins=begins)
*both, a, sites = problem(4096, 16)
x, _, tables, shape, k, _ = both
weight, index, _ = launch.route(*both)
pairs = grouped.sort_pairs(index, 16)
hidden = grouped.shrink_pairs(x, a, tables, shape, pairs, k, weight)
grouped.outer_pairs(hidden, x, tables, shape, pairs, k, 0, 0)
for tokens in (4096, 32768):
    *both, a, sites = problem(tokens, 166)
    x, _, tables, shape, k, _ = both
    weight, index = grouped.route(*both)
    pairs = grouped.sort_pairs(index, 166)
    hidden = grouped.shrink_pairs(x, a, tables, shape, pairs, k, weight)
    grouped.expand_sites_([x.new_empty(tokens, o) for o in outs], hidden, sites.b_RO, tables, shape, pairs, k)
for tile in tiles.CANDIDATES["choose_products"]:
    grouped.route(*both, chosen=tile)
for kind, rank in zip((torch.bfloat16, torch.float32), tiles.WIDEST_OF_PAIRS):
    *both, a, sites = problem(8192, 4, rank)
    x, _, tables, shape, k, _ = both
    pairs = grouped.sort_pairs(torch.zeros(3, 8192, k, dtype=torch.int32), 4)
    hidden = grouped.shrink_pairs(x, a, tables, shape, pairs, k, torch.zeros(3, 8192, k))
    grouped.expand_sites_([x.new_empty(8192, o) for o in outs], hidden, sites.b_RO, tables, shape, pairs, k)
print(json.dumps(made))
"""


def walk(ttgir: str) -> Iterator[tuple[str, int | None]]:
    """Lines outside loops with None; a loop's lines twice, with steps 0 and 1: what is in flight at its end is so at its
    start. (The loops of these kernels hold no loops.)"""
    loop, end = [], ""
    for line in re.sub(r" loc\(.*", "", ttgir).splitlines():
        if not loop and "scf.for " not in line:
            yield line, None
            continue
        if not loop:
            end = " " * (len(line) - len(line.lstrip())) + "}"
        loop.append(line)
        if line.startswith(end):
            yield from ((body, step) for step in (0, 1) for body in loop)
            loop = []


def collisions(ttgir: str) -> tuple[int, list[str]]:
    """(asynchronous products in loops, what is wrong with them).

    A loop's step i copies the tile of step i + ahead, ahead being the copies before the loop, and tile j lies in buffer
    j % count. Products of step i - age that no wait has ended collide with it where ahead + age is a multiple of count.
    """
    count: dict[str, int] = {}
    ahead: dict[str, int] = {}
    whole_of: dict[str, str] = {}
    reading: list[tuple[int, list[str]]] = []
    products, wrong = 0, []
    for line, step in walk(ttgir):
        if made := re.search(r"%(\w+) = ttg\.local_alloc : \(\) -> !ttg\.memdesc<(\d+)x", line):
            count[made[1]], ahead[made[1]] = int(made[2]), 0
        elif part := re.search(r"%(\w+) = ttg\.memdesc_(?:index|trans|reshape) %(\w+)", line):
            whole_of[part[1]] = whole_of.get(part[2], part[2])
        elif copy := re.search(r"async_(?:copy_global_to_local %\w+,|tma_copy_global_to_local .*\]) %(\w+)", line):
            target = whole_of[copy[1]]
            if step is None:
                ahead[target] += 1
            else:
                ages = [step - when for when, tiles in reading if target in tiles]
                wrong += [f"{target}, {count[target]}" for age in ages if (ahead[target] + age) % count[target] == 0]
        elif (product := re.search(r"warp_group_dot %(\w+), %(\w+), .*isAsync = true", line)) and step is not None:
            products += 1
            reading.append((step, [whole_of[operand] for operand in product.groups() if operand in whole_of]))
        elif wait := re.search(r"warp_group_dot_wait .*pendings = (\d+)", line):
            reading = reading[max(0, len(reading) - int(wait[1])) :]
    return products, wrong


@cache
def compiled() -> dict[str, tuple[str, int, int, str]]:
    """By kernel and constants: its code for Hopper, its copies by descriptor, its bytes of shared memory, its PTX."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_no_copy_goes_into_a_buffer_that_a_product_still_reads() -> None:
    found = {name: collisions(ttgir) for name, (ttgir, *_) in compiled().items()}
    asynchronous = {name.split("'")[1] for name, (products, _) in found.items() if products}
    assert {"route_shrink", "linear_expand", "masked_shrink", "grouped_shrink"} <= asynchronous, (
        "Hopper's asynchronous products are what this is about"
    )
    assert not {name: wrong for name, (_, wrong) in found.items() if wrong}
    assert all(products for name, (products, _) in found.items() if compiled()[name][1])


def test_launches_by_descriptors_copy_tensors_and_fit() -> None:
    """All of them, those of the tables among them, with copies by the engine, within what a multiprocessor of Hopper has."""
    copying = [(name, shared) for name, (_, copies, shared, _) in compiled().items() if copies]
    assert len(copying) == sum("('TMA', True)" in name for name in compiled()) > 20
    assert all(shared <= 227 * 1024 for _, shared in copying), copying


def test_the_widest_experts_that_pairs_are_taken_of_fit() -> None:
    """8,192 tokens: the largest tiles. Twice the rank does not fit."""
    shared = {name: found[2] for name, found in compiled().items() if name.split("'")[1].startswith("grouped_")}
    assert {rank for rank in (16, 128, 256) if any(f"('RP', {rank})" in name for name in shared)} == {16, 128, 256}
    assert max(shared.values()) <= 227 * 1024 < 2 * max(shared.values())


def reaches(ptx: str) -> list[tuple[int, str, set[str]]]:
    """(line, instruction, parameters its operands come from) of every access to memory outside the multiprocessor, of waits for
    the launch before and of leaves for the one behind."""
    origin: dict[str, set[str]] = {}
    found = []
    for number, line in enumerate(ptx.splitlines()):
        words = re.findall(r"%\w+|\w+_param_\d+", line.split("//")[0])
        come = set().union(*(origin.get(word, {word} if "_param_" in word else set()) for word in words))
        code = re.sub(r"^\s*(@!?%\w+ )?", "", line)
        if re.match(r"ld\.global|st\.global|cp\.async\.\w+\.(shared|tensor)|griddepcontrol|(red|atom)\.", code):
            found.append((number, code, come))
        elif words and not code.startswith(("st.", "bra", "setp")):
            origin[next(word for word in words if not line.lstrip().startswith(f"@{word}"))] = come
    return found


def behind_the_wait(ptx: str) -> list[str]:
    """What is wrong with a linear_expand that begins early: writes ahead of its wait, and reads of hm."""
    descriptors = re.findall(r"align 64 \.b8 (\w+_param_\d+)", ptx)
    awaited = {descriptors[1] if descriptors else "linear_expand_param_1"}
    all_of = reaches(ptx)
    waits = [(number, code) for number, code, _ in all_of if "griddepcontrol.wait" in code]
    if len(waits) != 1 or f"\t{waits[0][1]}" not in ptx.splitlines()[waits[0][0]]:
        return [f"{len(waits)} waits, or one under a condition"]
    behind = set().union(
        *(come for number, code, come in all_of if number > waits[0][0] and not code.startswith("st."))
    )
    wrong = [
        code for number, code, come in all_of
        if number < waits[0][0] and (awaited & come or code.startswith(("st.", "red", "atom")))
    ]  # fmt: skip
    return wrong if awaited <= behind else ["what is waited for is not read"]


def test_what_needs_the_launch_before_stands_behind_the_wait() -> None:
    early = {name: ptx for name, (*_, ptx) in compiled().items() if "('FOLLOWS', True)" in name}
    assert len(early) == 7
    assert {("JOINED', True" in name, "TMA', True" in name) for name in early} == {
        (True, True), (False, True), (False, False),
    }  # fmt: skip
    assert not {name: wrong for name, ptx in early.items() if (wrong := behind_the_wait(ptx))}
    for name, ptx in early.items():  # products of x come first, where both have loops of their own
        before = [code for _, code, _ in reaches(ptx[: ptx.index("griddepcontrol.wait")]) if "cp.async" in code]
        assert bool(before) != ("JOINED', True" in name)
        assert behind_the_wait(moved(ptx)), "the check is to see it"
    for name, (*_, ptx) in compiled().items():
        assert ptx.count("griddepcontrol.launch_dependents") == ("('BEGINS', True)" in name)
        assert ptx.count("griddepcontrol.wait") == (name in early)


def moved(ptx: str) -> str:
    """The same code with the wait at its end."""
    lines = ptx.splitlines()
    wait = lines.pop(next(n for n, line in enumerate(lines) if "griddepcontrol.wait" in line))
    end = max(n for n, line in enumerate(lines) if "\tret;" in line)
    return "\n".join([*lines[:end], wait, *lines[end:]])


BY_ADDRESS = "ttg.async_copy_global_to_local %p, %part : tensor"
BY_DESCRIPTOR = "ttng.async_tma_copy_global_to_local %desc[%t, %i] %part, %barrier, %true : !tt.tensordesc"


@pytest.mark.parametrize("copy", [BY_ADDRESS, BY_DESCRIPTOR])
@pytest.mark.parametrize(("buffers", "pending", "found"), [(2, 1, True), (3, 1, False), (2, 0, False)])
def test_a_buffer_too_few_is_seen(buffers: int, pending: int, found: bool, copy: str) -> None:
    """Two tiles ahead: the product of this step reads buffer i % 2 while tile i + 2 is copied there, unless waited for."""
    index = "%part = ttg.memdesc_index %tile[%i] : memdesc"
    lines = [
        f"    %tile = ttg.local_alloc : () -> !ttg.memdesc<{buffers}x64x64xbf16>", index, copy, index, copy,
        "    %r:2 = scf.for %i = %a to %b step %c {", "      " + index,
        "      %d = ttng.warp_group_dot %part, %other, %acc {isAsync = true} : memdesc",
        f"      %e = ttng.warp_group_dot_wait %d {{pendings = {pending} : i32}} : tensor",
        "      " + index, "      " + copy, "    }",
    ]  # fmt: skip
    products, wrong = collisions("\n".join(lines))
    assert products == 2
    assert bool(wrong) == found


@pytest.mark.parametrize(
    ("kernel", "names"),
    [
        ("triton_linear.linear_expand", ("to_y1", "to_y2")), ("triton_decode.decode_base", ("to_y1", "to_y2")),
        ("triton_decode.decode_update", ("to_y1", "to_y2")), ("triton_grouped.grouped_expand", ("y_1", "y_2")),
    ],
)  # fmt: skip
def test_where_outputs_lie_decides_no_signature(kernel: str, names: tuple[str, str]) -> None:
    """Outputs far apart would else take a kernel of another signature, which cannot be loaded inside a capture."""
    module, name = kernel.split(".")
    found = getattr(importlib.import_module(f"quietgoose.kernels.routed_lora.{module}"), name)
    parameters = inspect.signature(found.fn).parameters
    assert [parameters[name].annotation for name in names] == ["tl.int64"] * 2
