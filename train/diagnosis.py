"""Looks at this machine and says what is missing or does not fit, and what to do. Used by launch/doctor.py.

Packages are looked at in other processes, so that one that crashes at import is a line of the table and not the end.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

State = Literal["ok", "note", "missing"]
DISTRIBUTION = "quietgoose"
REQUIRED_DISK_GIB = 5.0
REQUIRED_MEMORY_GIB = 4.0
SHARED_MEMORY_GIB = 0.25
IMPORT_SECONDS = 180


@dataclass(frozen=True)
class Finding:
    """One line: `missing` stops a run, `note` does not. `fix` says what to do."""

    name: str
    state: State
    found: str
    fix: str = ""


def examine(folder: Path) -> list[Finding]:
    """All findings; `folder` is where runs will be written."""
    checks: tuple[Callable[[], Iterator[Finding]], ...] = (
        _python, _packages, _imports, _compilers, _accelerator, _memory, lambda: _disk(folder), _network_names,
    )  # fmt: skip
    return [finding for check in checks for finding in check()]


def _python() -> Iterator[Finding]:
    version = platform.python_version()
    fits = (3, 11) <= sys.version_info[:2] <= (3, 12)
    yield Finding("Python", "ok" if fits else "missing", version, "" if fits else "use Python 3.11 or 3.12")


def _packages() -> Iterator[Finding]:
    """The installed versions against the requirements this package declares."""
    from packaging.requirements import Requirement

    for text in importlib.metadata.requires(DISTRIBUTION) or []:
        requirement = Requirement(text)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(requirement.name, "missing", "not installed", f"pip install '{requirement}'")
            continue
        fits = requirement.specifier.contains(version.split("+")[0], prereleases=True)
        yield Finding(
            requirement.name, "ok" if fits else "missing", version, "" if fits else f"pip install '{requirement}'"
        )


def _imports() -> Iterator[Finding]:
    """The packages that break at import when their neighbours do not fit."""
    for name in ("transformers", "peft", "deepspeed"):
        if importlib.util.find_spec(name) is None:
            continue  # said above
        problem = _run_python(f"import {name}", {"DS_ACCELERATOR": "cpu"} if name == "deepspeed" else {})
        if problem:
            yield Finding(f"import {name}", "missing", problem, "reinstall it with the versions of constraints.txt")


def _run_python(code: str, extra: dict[str, str]) -> str:
    """Empty, or the last line of what went wrong."""
    environment = {**os.environ, **extra}
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=IMPORT_SECONDS, env=environment
        )
    except subprocess.TimeoutExpired:
        return f"took over {IMPORT_SECONDS} s"
    lines = done.stderr.strip().splitlines()
    return "" if done.returncode == 0 else (lines[-1][:300] if lines else f"exit code {done.returncode}")


def _compilers() -> Iterator[Finding]:
    compiler = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)
    advice = "install gcc and g++ (apt install build-essential); torch.compile and Triton build with it"
    yield Finding("C++ compiler", "ok" if compiler else "note", compiler or "none", "" if compiler else advice)
    ninja = shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent))
    yield Finding("ninja", "ok" if ninja else "note", ninja or "none", "" if ninja else "pip install ninja")


def _accelerator() -> Iterator[Finding]:
    if importlib.util.find_spec("torch") is None:
        return
    import torch

    driver = _driver()
    if torch.cuda.is_available():
        names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
        free = torch.cuda.mem_get_info(0)[0] / 2**30
        found = f"{torch.cuda.device_count()} x {', '.join(names)}, {free:.0f} GiB free, CUDA {torch.version.cuda}"
        yield Finding("GPU", "ok", found)
    elif driver and torch.version.cuda is None:
        yield Finding("GPU", "note", f"{driver}, but this torch is built for the CPU", "install torch with CUDA")
    elif driver:
        advice = f"install a driver for CUDA {torch.version.cuda}, or torch for the driver's CUDA"
        yield Finding("GPU", "note", f"{driver}, but torch (CUDA {torch.version.cuda}) cannot use it", advice)
    else:
        yield Finding("GPU", "ok", "none; runs on the CPU (for real work take a GPU)")
    yield from _gpu_packages(torch.cuda.is_available())


def _driver() -> str:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ""
    query = [tool, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except subprocess.TimeoutExpired:
        return "a driver that does not answer"
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else ""


def _gpu_packages(gpu: bool) -> Iterator[Finding]:
    """flash-attn, triton and the CUDA toolkit, said on every machine; without a GPU they are not used and nothing is advised."""
    yield _flash_attention(gpu)
    triton = _version_of("triton")
    fix = "" if triton or not gpu else "pip install 'quietgoose[gpu]'"
    yield Finding("triton", "note" if fix else "ok", triton or _absent(gpu), fix)
    toolkit = os.environ.get("CUDA_HOME") or (str(Path(nvcc).parents[1]) if (nvcc := shutil.which("nvcc")) else "")
    fix = "" if toolkit or not gpu else "only needed to build flash-attn or DeepSpeed's fused optimizers"
    yield Finding("CUDA toolkit", "note" if fix else "ok", toolkit or _absent(gpu), fix)
    architectures = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    if "a" in architectures.lower():
        yield Finding(
            "TORCH_CUDA_ARCH_LIST", "note", architectures, "DeepSpeed cannot parse it; set 9.0 instead of 9.0a"
        )


def _flash_attention(gpu: bool) -> Finding:
    import torch

    advice = "pip install 'quietgoose[gpu]' --no-build-isolation (needs CUDA_HOME); without it attention is sdpa"
    version = _version_of("flash-attn")
    if not version or not gpu:
        return Finding("flash-attn", "note" if gpu else "ok", version or _absent(gpu), advice if gpu else "")
    problem = _run_python("import flash_attn_2_cuda", {})
    fix = f"rebuild it against torch {torch.__version__}: {advice}" if problem else ""
    return Finding("flash-attn", "missing" if problem else "ok", problem or version, fix)


def _version_of(distribution: str) -> str:
    """Empty if it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _absent(gpu: bool) -> str:
    return "not installed" if gpu else "not installed; only a GPU uses it"


def _memory() -> Iterator[Finding]:
    import psutil

    free = psutil.virtual_memory().available / 2**30
    enough = free >= REQUIRED_MEMORY_GIB
    advice = f"the demo wants {REQUIRED_MEMORY_GIB:.0f} GiB; close other programs"
    yield Finding("memory", "ok" if enough else "note", f"{free:.1f} GiB free", "" if enough else advice)
    shared = Path("/dev/shm")  # noqa: S108  the place itself is looked at, nothing is written
    if shared.is_dir():
        room = shutil.disk_usage(shared).free / 2**30
        enough = room >= SHARED_MEMORY_GIB
        advice = "give the container --shm-size=1g or more; NCCL and gloo use it"
        yield Finding("shared memory", "ok" if enough else "note", f"{room:.1f} GiB free", "" if enough else advice)
    yield Finding("processors", "ok", f"{len(os.sched_getaffinity(0))} usable")


def _disk(folder: Path) -> Iterator[Finding]:
    place = folder.resolve()
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir():
        yield Finding(f"writing to {folder}", "missing", f"{place} is a file", "choose another output folder")
        return
    free = shutil.disk_usage(place).free / 2**30
    enough = free >= REQUIRED_DISK_GIB
    advice = f"free {REQUIRED_DISK_GIB:.0f} GiB, or choose another output folder"
    yield Finding(f"disk at {folder}", "ok" if enough else "note", f"{free:.1f} GiB free", "" if enough else advice)
    if not os.access(place, os.W_OK):
        yield Finding(f"writing to {folder}", "missing", "not allowed", "choose another output folder")


def _network_names() -> Iterator[Finding]:
    """Ranks of one host meet at a loopback port."""
    import socket

    try:
        with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname(), 2):
            yield Finding("loopback", "ok", "ranks can meet")
    except OSError as error:
        yield Finding("loopback", "missing", str(error), "ranks meet at 127.0.0.1: allow it in the firewall or sandbox")
