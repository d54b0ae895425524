"""What --overwrite replaces waits beside the new run until that can train, and comes back if it cannot.

A kill at any moment leaves either the earlier run or what `put_back` makes it from.
"""

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from momify.files import TEMPORARY, disk_errors

ASIDE = ".earlier-run"


def set_aside(folder: Path, names: Sequence[str]) -> None:
    """Move the parts `names` of a run folder out of the way; the last of them says that all are."""
    with disk_errors(folder / ASIDE):
        (folder / ASIDE).mkdir()
        for name in names:
            if (folder / name).exists():
                os.replace(folder / name, folder / ASIDE / name)


def waits(folder: Path) -> bool:
    """Whether an earlier run waits in `folder`."""
    return (folder / ASIDE).is_dir()


def put_back(folder: Path, names: Sequence[str]) -> None:
    """Undo `set_aside`, finished or not: what a new run has made goes, the earlier one comes back."""
    aside = folder / ASIDE
    with disk_errors(aside):
        if (aside / names[-1]).exists():  # all of the earlier run is aside, so what lies here is of the new one
            remove(folder, names)
        for name in reversed(names):
            if (aside / name).exists():
                remove(folder, [name])  # what could not be removed above, or came since
                os.replace(aside / name, folder / name)
        aside.rmdir()


def forget(folder: Path) -> None:
    """Remove the earlier run, which from the first moment on nothing brings back."""
    if waits(folder):
        gone = Path(tempfile.mkdtemp(dir=folder, prefix=f"{TEMPORARY}earlier-run."))
        os.replace(folder / ASIDE, gone / "run")
        shutil.rmtree(gone, ignore_errors=True)


def clear_away(folder: Path) -> None:
    """Remove a folder under another name, so that it is there or not; what a kill left of one goes the next time."""
    gone = folder.with_name(f"{TEMPORARY}{folder.name}.replaced")
    shutil.rmtree(gone, ignore_errors=True)
    with disk_errors(folder):
        os.replace(folder, gone)
    shutil.rmtree(gone, ignore_errors=True)


def remove(folder: Path, names: Sequence[str]) -> None:
    """Remove the files and folders `names`, and nothing else."""
    for name in names:
        if (folder / name).is_dir() and not (folder / name).is_symlink():
            shutil.rmtree(folder / name, ignore_errors=True)
        else:
            (folder / name).unlink(missing_ok=True)
