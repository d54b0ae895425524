"""Where token files are kept, and making one of their folders: one process at a time, whole or not at all."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from momify.files import disk_errors


def cache_folder() -> Path:
    """Where token files are kept: MOMIFY_CACHE, else the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("MOMIFY_CACHE") or Path(base) / "momify")


@contextmanager
def making(folder: Path, keep: bool) -> Iterator[Path | None]:
    """A folder beside `folder` to work in, which takes its place at the end; None where it is there already.

    Another process that makes the same waits for this one. After an error or a kill the work stays if `keep`, for the
    next process to go on with, else it is removed (after a kill: by the next).
    """
    part = folder.with_name(folder.name + ".part")
    with disk_errors(part):
        part.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(part.with_suffix(".lock"), os.O_CREAT | os.O_RDWR, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.exists():
            yield None
            return
        yield from _work(part, folder, keep)
    finally:
        os.close(lock)


def _work(part: Path, folder: Path, keep: bool) -> Iterator[Path]:
    if not keep:
        shutil.rmtree(part, ignore_errors=True)
    with disk_errors(part):
        part.mkdir(exist_ok=True)
    try:
        yield part
        with disk_errors(folder):
            os.replace(part, folder)
    except BaseException:
        if not keep:
            shutil.rmtree(part, ignore_errors=True)
        raise
