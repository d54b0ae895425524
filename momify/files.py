"""Files that appear whole or not at all: write beside the target, then rename (design section 9)."""

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from momify.errors import MomifyError

TEMPORARY = ".momify-"  # opens the name of everything that is not whole yet
_SETTLED = 2.0  # seconds: a file changed twice within a tick of the disk's clock may keep its time stamp
_DISK_WORDS = (
    "No space left",
    "File too large",
    "I/O error",
    "quota",
    "PytorchStreamWriter",
    "enforce fail",
    "iostream error",
)


@contextmanager
def disk_errors(path: Path, also: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Turn an OSError while writing `path` into a MomifyError that names the file and the reason.

    Libraries say the same by errors of their own: those of the kinds `also` are turned too, if they speak of the disk.
    """
    try:
        yield
    except MomifyError:
        raise  # it names the file already
    except (OSError, *also) as error:
        text = " ".join(str(error).split())[:150]
        if not isinstance(error, OSError) and not any(word in text for word in _DISK_WORDS):
            raise
        reason = (error.strerror if isinstance(error, OSError) else None) or text
        if "enforce fail" in text or "iostream" in text:  # torch.save says where, not why
            reason = f"No space left, or the file grew too large ({text})"
        raise MomifyError(
            f"cannot write {path}: {reason}; free space or choose another folder, what was there before is intact"
        ) from error


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` as UTF-8, whole or not at all. Raises MomifyError naming the file."""
    path = Path(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f"{TEMPORARY}{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            os.chmod(temporary, 0o644)  # mkstemp makes it private; a report is for others too
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


def read_text(path: Path) -> str:
    """The content of a user's text file. Raises MomifyError naming the file and the reason."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:150]
        raise MomifyError(f"{path} cannot be read: {reason}; give a UTF-8 text file") from None


def write_json(path: Path, data: Any) -> None:
    """Write `data` as indented JSON, whole or not at all. Raises MomifyError naming the file."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """The content of a JSON file that momify wrote. Raises MomifyError naming the file."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:150]
        raise MomifyError(f"{path} cannot be read: {reason}; remove it, it is made again") from None


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Give a temporary folder beside `target` that takes its place on success and vanishes on an error.

    Raises MomifyError for a full disk, by whatever error the library that writes into the folder says so.
    """
    target = Path(target)
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f"{TEMPORARY}{target.name}."))
    try:
        with disk_errors(target, also=(Exception,)):  # safetensors and tokenizers raise kinds of their own
            yield temporary
            _open_to_all(temporary)
            _replace_folder(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _open_to_all(folder: Path) -> None:
    """Give others the right to read: temporary files and folders are private, and so is what safetensors writes."""
    for path in (folder, *folder.rglob("*")):
        if not path.is_symlink():
            path.chmod(0o755 if path.is_dir() else 0o644)


def _replace_folder(new: Path, target: Path) -> None:
    """Put `new` where `target` is; a folder cannot be renamed over a full one, so the old one steps aside.

    What a kill in between leaves aside, `put_back_folders` puts back.
    """
    if not target.exists():
        os.replace(new, target)
        return
    old = Path(tempfile.mkdtemp(dir=target.parent, prefix=f"{TEMPORARY}{target.name}.old."))
    os.replace(target, old / "old")
    try:
        os.replace(new, target)
    except BaseException:
        os.replace(old / "old", target)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def put_back_folders(folder: Path) -> None:
    """Put those folders back into `folder` that had stepped aside when a process was killed."""
    for aside in Path(folder).glob(f"{TEMPORARY}*.old.*/old"):
        name = aside.parent.name.removeprefix(TEMPORARY).rpartition(".old.")[0]
        if not (folder / name).exists():
            os.replace(aside, folder / name)


def temporaries(folder: Path) -> list[Path]:
    """What a killed process left in `folder` that never became whole."""
    return list(Path(folder).glob(f"{TEMPORARY}*"))


def inside(folder: Path, name: str) -> Path:
    """`folder / name`. Raises MomifyError where that leaves the folder (into a hub cache's blobs it may)."""
    windows = PureWindowsPath(name)
    leaves = PurePosixPath(name).is_absolute() or bool(windows.anchor) or ".." in windows.parts or "\0" in name
    path = folder / name
    if not leaves:
        root, target = folder.resolve(), path.resolve()
        blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else root
        leaves = not (target.is_relative_to(root) or target.is_relative_to(blobs))
    if leaves:
        raise MomifyError(f"file {name!r:.200} leads out of the model folder {folder}; put the file itself there")
    return path


def sha256_of_files(paths: Iterable[Path]) -> str:
    """Hex SHA-256 over the names and contents of `paths`, in the order given.

    Files that did not change are read once a process. Raises MomifyError naming a file that cannot be read.
    """
    paths = tuple(paths)
    stamps = tuple(map(_stamp, paths))
    settled = all(time.time() - changed / 1e9 > _SETTLED for _, _, changed, *_ in stamps)
    return (_sha256_of if settled else _sha256_of.__wrapped__)(paths, stamps)


def _stamp(path: Path) -> tuple[Path, int, int, int, int]:
    """What changes when the content of `path` does."""
    with _reading(path):
        found = path.stat()
        return path.resolve(), found.st_size, found.st_ctime_ns, found.st_mtime_ns, found.st_ino


@cache
def _sha256_of(paths: tuple[Path, ...], stamps: tuple[tuple, ...]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode() + b"\0")
        with _reading(path), open(path, "rb") as stream:
            while piece := stream.read(1 << 20):
                digest.update(piece)
    return digest.hexdigest()


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn an OSError while reading a user's file into a MomifyError that names the file and the reason."""
    try:
        yield
    except OSError as error:
        raise MomifyError(f"{path} cannot be read: {error.strerror or error}; check its rights and its disk") from None
