"""files.py: whole or not at all."""

import errno
import hashlib
import os
import time
from pathlib import Path

import pytest
from safetensors import SafetensorError

from momify import files
from momify.errors import MomifyError
from momify.files import read_json, sha256_of_files, whole_folder, write_json, write_text


def test_write_text_replaces_and_leaves_nothing_beside(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "a.txt"
    write_text(target, "one")
    write_text(target, "zwei ü")
    assert target.read_text(encoding="utf-8") == "zwei ü"
    assert [p.name for p in target.parent.iterdir()] == ["a.txt"]


def test_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "a.txt"
    write_text(target, "old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MomifyError, match=r"a\.txt: No space left"):
        write_text(target, "new")
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_write_json_refuses_nan_and_keeps_the_old(tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    write_json(target, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(target, {"a": float("nan")})
    assert read_json(target) == {"a": 1}


def test_read_json_names_a_damaged_file(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": ')
    with pytest.raises(MomifyError, match=r"a\.json cannot be read"):
        read_json(tmp_path / "a.json")


def test_whole_folder_replaces_only_on_success(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with whole_folder(target) as folder:
        (folder / "x").write_text("1")

    def fail_halfway() -> None:
        with whole_folder(target) as folder:
            (folder / "x").write_text("2")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_halfway()
    assert (target / "x").read_text() == "1"
    with whole_folder(target) as folder:
        (folder / "y").write_text("3")
    assert [p.name for p in target.iterdir()] == ["y"]  # replaced, not merged
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_full_disk_is_told_whatever_the_library_raises(tmp_path: Path) -> None:
    """safetensors, tokenizers and torch.save each have an error of their own; what says nothing of a disk stays."""
    target = tmp_path / "model"

    def write_and_fail(error: Exception) -> None:
        with whole_folder(target):
            raise error

    for error in (SafetensorError("I/O error: File too large"), Exception("No space left on device (os error 28)")):
        with pytest.raises(MomifyError, match=r"^cannot write .*model: .*; free space"):
            write_and_fail(error)
    for error in (MomifyError("cannot write x: No space left"), ValueError("a mistake")):
        with pytest.raises(type(error), match=f"^{error}$"):
            write_and_fail(error)
    assert list(tmp_path.iterdir()) == []


def test_others_can_read_what_is_whole(tmp_path: Path) -> None:
    """safetensors writes files that its user alone can read; a model on a shared disk is for all."""
    with whole_folder(tmp_path / "model") as folder:
        (folder / "inner").mkdir(mode=0o700)
        (folder / "inner" / "weights").touch(mode=0o600)
    modes = [path.stat().st_mode & 0o777 for path in (tmp_path / "model", *sorted((tmp_path / "model").rglob("*")))]
    assert modes == [0o755, 0o755, 0o644]


def test_hash_depends_on_names_contents_and_order(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_text("1")
    b.write_text("2")
    first = sha256_of_files([a, b])
    assert first == hashlib.sha256(b"a\0" + b"1" + b"b\0" + b"2").hexdigest()
    assert first != sha256_of_files([b, a])
    b.write_text("3")
    assert sha256_of_files([a, b]) != first
    assert sha256_of_files([a]) != sha256_of_files([b])


def test_files_are_hashed_once_until_they_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []

    def watched(*given: object) -> object:
        opened.append(given)
        return open(*given)

    monkeypatch.setattr(files, "open", watched, raising=False)
    path, other = tmp_path / "a", tmp_path / "b"
    path.write_text("1")
    other.write_text("1")
    stamp = path.stat()
    now = time.time
    monkeypatch.setattr("time.time", lambda: now() + 60)  # as if nothing had been written in this minute
    first = sha256_of_files([path])
    assert sha256_of_files([path]) == first
    assert len(opened) == 1
    assert sha256_of_files([other]) != first  # by its name
    time.sleep(0.05)  # longer than a tick of the disk's clock
    path.write_text("2")
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # as rsync and cp -p do
    assert sha256_of_files([path]) == hashlib.sha256(b"a\0" + b"2").hexdigest()


def test_a_file_rewritten_within_a_tick_is_hashed_again(tmp_path: Path) -> None:
    path = tmp_path / "a"
    for content in "0123456789" * 9:
        path.write_text(content)
        assert sha256_of_files([path]) == hashlib.sha256(b"a\0" + content.encode()).hexdigest()


@pytest.mark.parametrize(("name", "words"), [("gone", "No such file"), ("folder", "Is a directory")])
def test_a_file_that_cannot_be_hashed_is_named(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(MomifyError, match=f"{name} cannot be read: {words}"):
        sha256_of_files([tmp_path / name])
