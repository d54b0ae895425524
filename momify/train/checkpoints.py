"""Checkpoint folders: written whole, sealed with a hash of every file, checked before use, the best one kept.

A checkpoint is written under `.partial`, sealed by a manifest (manifest.json: SHA-256 and size of each file) and
renamed to `checkpoint-<step>`. So a folder of that name is whole, or was damaged afterwards, which the hashes show.
"""

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from momify.errors import MomifyError
from momify.files import disk_errors, write_json

MANIFEST = "manifest.json"
PARTIAL = ".partial"
_DISCARDED = ".discarded-"
_NAME = re.compile(r"checkpoint-(\d+)")
_OTHER_NAME = "give it another name or remove it"


@dataclass(frozen=True)
class Seal:
    """What a checkpoint says about itself, beside the hashes of its files."""

    step: int
    held_out_loss: float | None = None
    """Held-out loss measured at this very step, None where it was not."""
    lr_factor: float = 1.0
    """What rollbacks had made of the learning rate."""
    skipped_in_a_row: int = 0
    """Steps skipped just before, as their loss or gradient was not finite."""
    processes: int = 1
    """How many processes trained together."""
    sound: bool = True
    """Whether its held-out loss was a number, or not measured."""
    text: str | None = None
    """Hash of the text that it was trained on; None in checkpoints of older versions, as the next."""
    precision: str | None = None
    """bf16 or fp32."""


def seal(folder: Path, content: Seal) -> None:
    """Write the manifest of a checkpoint whose files are complete, and force all of it onto the disk."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST):
        files[path.relative_to(folder).as_posix()] = {"sha256": _digest(path), "bytes": path.stat().st_size}
        _to_disk(path)
    write_json(folder / MANIFEST, {**asdict(content), "files": files})
    _to_disk(folder)


def put_in_place(folder: Path, target: Path) -> None:
    """Rename a sealed folder to `target`; what was there steps aside first and is removed afterwards."""
    aside = _step_aside(target) if target.exists() else None
    os.replace(folder, target)
    _to_disk(target.parent)
    if aside:
        shutil.rmtree(aside, ignore_errors=True)


def fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint, in a few words; None when every file is as it was written."""
    try:
        files = _manifest(folder)["files"]
        if type(read_seal(folder).step) is not int:
            return f"{MANIFEST} does not say its step"
        for name, written in files.items():
            if not name.isprintable() or PurePosixPath(name).is_absolute() or ".." in name:
                return f"{MANIFEST} names a file that no checkpoint has"
            path = folder / name
            if path.stat().st_size != int(written["bytes"]):
                return f"{name} has {path.stat().st_size} bytes instead of {int(written['bytes'])}"
            if _digest(path) != written["sha256"]:
                return f"{name} is not what was written: its SHA-256 differs"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__})"
    return None


def read_seal(folder: Path) -> Seal:
    """What a whole checkpoint says about itself."""
    found = _manifest(folder)
    return Seal(**{name: found[name] for name in Seal.__dataclass_fields__ if name in found})


def newest_whole(root: Path, warn: Callable[[str], None], below: int | None = None) -> Path | None:
    """The newest checkpoint in `root` that is whole, of a step under `below` if given; None where there is none.

    Each damaged one met on the way, and each whose held-out loss was no number, is passed over with a warning that
    says what is wrong with it.
    """
    for step, folder in sorted(_found(root).items(), reverse=True):
        if below is not None and step >= below:
            continue
        wrong = fault(folder)
        if wrong is None and read_seal(folder).sound:
            return folder
        what = "is of no use (its held-out loss is no number)" if wrong is None else f"is damaged ({wrong})"
        warn(f"warning: {folder} {what}; going on from the checkpoint before it")
    return None


def drop_after(root: Path, step: int) -> None:
    """Discard the checkpoints after `step`: they are damaged, or belong to a course that was given up."""
    for found, folder in _found(root).items():
        if found > step:
            discard(folder)


def rotate(root: Path, keep: int) -> None:
    """Keep the newest `keep` checkpoints and the one of the lowest held-out loss; discard the others."""
    found = _found(root)
    losses = {step: loss for step, folder in found.items() if (loss := _loss(folder)) is not None}
    kept = set(sorted(found)[-keep:])
    if losses:
        kept.add(min(losses, key=lambda step: (losses[step], step)))
    for step, folder in found.items():
        if step not in kept:
            discard(folder)


def discard(folder: Path) -> None:
    """Remove a checkpoint; it loses its name first, so that a kill half-way leaves none with parts missing."""
    shutil.rmtree(_step_aside(folder), ignore_errors=True)


def _step_aside(folder: Path) -> Path:
    """Take its name from a checkpoint; `sweep` removes what is left under the other one."""
    aside = folder.with_name(_DISCARDED + folder.name)
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(folder, aside)
    return aside


def sweep(root: Path) -> None:
    """Remove what a killed process left half-written or half-removed."""
    with disk_errors(root):
        root.mkdir(parents=True, exist_ok=True)
    for path in [root / PARTIAL, *root.glob(_DISCARDED + "*")]:
        shutil.rmtree(path, ignore_errors=True)


def _found(root: Path) -> dict[int, Path]:
    """Step -> folder of everything that is named like a checkpoint and is a folder of its own."""
    found = {}
    for path in root.glob("checkpoint-*"):
        name = _NAME.fullmatch(path.name)
        if name and path.is_symlink():
            raise MomifyError(f"{path} is a link, which no checkpoint of momify is; {_OTHER_NAME}")
        if name and path.is_dir():
            found[int(name.group(1))] = path
    return found


def _loss(folder: Path) -> float | None:
    try:
        loss = _manifest(folder)["held_out_loss"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    number = isinstance(loss, int | float) and not isinstance(loss, bool)
    return float(loss) if number and math.isfinite(loss) else None


def _manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))


def _digest(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _to_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, would survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
