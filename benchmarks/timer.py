"""One way to take times for every benchmark: the sides alternate in one run, medians with their spread."""

import gc
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch


@dataclass(frozen=True)
class Spread:
    """Median, lowest and highest of the rounds."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.low:.3g}-{self.high:.3g})"


@dataclass(frozen=True)
class Times:
    """Seconds that each side took, one number a round; round i of all sides stands side by side in time."""

    seconds: dict[str, tuple[float, ...]]

    def of(self, side: str) -> Spread:
        """Seconds of one side."""
        return _spread(self.seconds[side])

    def ratio(self, side: str, to: str) -> Spread:
        """`side` over `to`, round by round: what slows both for a while cancels."""
        pairs = zip(self.seconds[side], self.seconds[to], strict=True)
        return _spread(tuple(a / b for a, b in pairs))


def alternate(
    sides: Mapping[str, Callable[[], object]],
    rounds: int = 7,
    warmup: int = 2,
    device: str = "cpu",
    before: Callable[[str], object] | None = None,
) -> Times:
    """Time each of `sides` once a round, A B A B ..., the first `warmup` rounds uncounted.

    `before(name)` runs untimed ahead of each call. Garbage is collected between the calls, not in them.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(warmup + rounds):
        for name, call in sides.items():
            if before is not None:
                before(name)
            taken = _once(call, device)
            if turn >= warmup:
                seconds[name].append(taken)
    return Times({name: tuple(taken) for name, taken in seconds.items()})


def _once(call: Callable[[], object], device: str) -> float:
    gc.collect()
    gc.disable()
    try:
        _wait(device)
        start = time.perf_counter()
        call()
        _wait(device)
        return time.perf_counter() - start
    finally:
        gc.enable()


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def _spread(values: tuple[float, ...]) -> Spread:
    return Spread(statistics.median(values), min(values), max(values))


def circumstances(device: str = "cpu") -> str:
    """One line: date, hardware, threads, versions, commit."""
    chip = torch.cuda.get_device_name() if device != "cpu" else f"{_cpu_name()}, {torch.get_num_threads()} threads"
    load = f"load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "load unknown"
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return f"{now}, {chip}, {load}, torch {torch.__version__}, commit {_commit()}"


def _cpu_name() -> str:
    """Model name and how many processors, and whether it multiplies bfloat16 in hardware."""
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8") if info.exists() else ""
    names = [line.split(":")[1].strip() for line in text.splitlines() if line.startswith("model name")]
    flags = [flag for flag in ("avx512f", "amx_bf16") if f" {flag}" in text]
    return f"{os.cpu_count()} x {names[0] if names else platform.machine()} ({' '.join(flags)})"


def _commit() -> str:
    """Short hash of the checked-out commit, with a + where files differ from it."""
    here = Path(__file__).parent
    try:
        hash_ = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "-uno"], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return hash_ + ("+" if changed else "")
