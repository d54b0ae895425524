"""Where a number comes from: versions, machine, seed, source, recipe, commit, command."""

import platform
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Origin:
    """What the caller knows: both models' hashes, the seed, the resolved recipe, the command as typed."""

    source: str
    source_sha256: str
    seed: int
    recipe: dict[str, Any] | None = None
    command: str | None = None
    mom_sha256: str | None = None


@dataclass(frozen=True)
class Provenance:
    """Everything that is needed to make a report again, or to see why another machine's differs."""

    origin: Origin
    versions: dict[str, str]
    machine: dict[str, str | int]
    commit: str | None = None


def collect_provenance(origin: Origin) -> Provenance:
    """`origin` together with this process's versions, machine and commit."""
    return Provenance(origin, versions(), machine(), commit())


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that numbers depend on."""
    found = {"python": platform.python_version()}
    for name in ("momify", "torch", "transformers", "fvcore"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"  # momify run from a source tree
    return found


def machine() -> dict[str, str | int]:
    """Operating system, processor, cores and threads, and the GPU where there is one."""
    found: dict[str, str | int] = {
        "system": f"{platform.system()} {platform.release()}",
        "processor": _processor(),
        "threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        found["gpus"] = torch.cuda.device_count()
    return found


def _processor() -> str:
    """The processor's name: Linux tells it only in /proc."""
    if sys.platform == "linux":
        try:
            for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
        except OSError:
            pass
    return platform.processor() or platform.machine()


def commit(package: Path | None = None) -> str | None:
    """Hash of the checkout that momify runs from, "-dirty" if it has changes; None outside a checkout."""
    folder = Path(__file__).resolve().parents[1] if package is None else package
    if _git(folder, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None  # a site-packages folder may lie inside somebody else's repository
    return _git(folder, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def _git(folder: Path, *arguments: str) -> str | None:
    """What git says in `folder`, or None if there is no git or it refuses."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
