"""train/checkpoints.py: a damaged checkpoint is known by its hashes and passed over; the best one is kept."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from momify.errors import MomifyError
from momify.train import checkpoints
from momify.train.checkpoints import (
    MANIFEST,
    Seal,
    drop_after,
    fault,
    newest_whole,
    put_in_place,
    read_seal,
    rotate,
    seal,
    sweep,
)

FILES = ("model.safetensors", "optimizer.pt", "trainer_state.json")


def make(root: Path, step: int, loss: float | None = None) -> Path:
    folder = root / ".partial" / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    for name in FILES:
        (folder / name).write_bytes(random.Random(f"{step}{name}").randbytes(500))
    seal(folder, Seal(step, loss))
    put_in_place(folder, root / folder.name)
    return root / folder.name


def steps(root: Path) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in root.glob("checkpoint-*"))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def add_file(folder: Path, name: str) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"] = {name: {"sha256": "0", "bytes": 0}, **manifest["files"]}
    (folder / MANIFEST).write_text(json.dumps(manifest))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "bit": (lambda f: flip(f / "model.safetensors"), "model.safetensors is not what was written"),
    "bit in the optimizer": (lambda f: flip(f / "optimizer.pt"), "optimizer.pt is not what was written"),
    "cut": (lambda f: (f / "optimizer.pt").write_bytes(b"\0" * 100), "optimizer.pt has 100 bytes instead of 500"),
    "emptied": (lambda f: (f / "model.safetensors").write_bytes(b""), "has 0 bytes"),
    "file gone": (lambda f: (f / "trainer_state.json").unlink(), "trainer_state.json is missing"),
    "no manifest": (lambda f: (f / MANIFEST).unlink(), "manifest.json is missing"),
    "cut manifest": (lambda f: (f / MANIFEST).write_bytes((f / MANIFEST).read_bytes()[:50]), "cannot be read"),
    "manifest of nothing": (lambda f: (f / MANIFEST).write_text("{}"), "cannot be read"),
    "manifest of no object": (lambda f: (f / MANIFEST).write_text("[1]"), "cannot be read"),
    "manifest too deep": (lambda f: (f / MANIFEST).write_text("[" * 100_000), "cannot be read"),
    "manifest in bytes": (lambda f: (f / MANIFEST).write_bytes(b"\xff\xfe"), "cannot be read"),
    "path out of it": (lambda f: add_file(f, "../checkpoint-3/optimizer.pt"), "names a file that no checkpoint has"),
    "endless file": (lambda f: add_file(f, "/dev/zero"), "names a file that no checkpoint has"),
    "name of two lines": (lambda f: add_file(f, "a\nb"), "names a file that no checkpoint has"),
    "folder for a file": (lambda f: ((f / "optimizer.pt").unlink(), (f / "optimizer.pt").mkdir()), "optimizer.pt"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_one_is_passed_over_with_a_warning(tmp_path: Path, name: str) -> None:
    damage, words = DAMAGE[name]
    older, newer = make(tmp_path, 3), make(tmp_path, 6)
    said: list[str] = []
    assert newest_whole(tmp_path, said.append) == newer
    damage(newer)
    assert newest_whole(tmp_path, said.append) == older
    assert len(said) == 1
    assert words in said[0]
    assert str(newer) in said[0]
    damage(older)
    assert newest_whole(tmp_path, said.append) is None


def test_every_single_bit_counts(tmp_path: Path) -> None:
    """A bit flipped anywhere in any file of a checkpoint is noticed, or was in the manifest's own white space."""
    folder, draw = make(tmp_path, 1), random.Random(0)
    for _ in range(300):
        path = folder / draw.choice(FILES)
        whole = path.read_bytes()
        broken = bytearray(whole)
        broken[draw.randrange(len(broken))] ^= 1 << draw.randrange(8)
        path.write_bytes(broken)
        assert fault(folder) is not None
        path.write_bytes(whole)
    assert fault(folder) is None


def test_seal_comes_back(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-9"
    folder.mkdir()
    (folder / "a").write_text("x")
    content = Seal(9, 1.25, 0.3, 2)
    seal(folder, content)
    assert read_seal(folder) == content
    assert fault(folder) is None


def test_what_was_in_its_place_goes_once_the_new_one_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, removed = make(tmp_path, 3), []
    before, remove = (target / "optimizer.pt").read_bytes(), checkpoints.shutil.rmtree

    def look(path: Path, **how: object) -> None:
        if path.exists():
            removed.append(((path / "optimizer.pt").read_bytes(), fault(target)))
        remove(path, **how)

    monkeypatch.setattr(checkpoints.shutil, "rmtree", look)
    (target / "mark").write_text("of the earlier one")
    make(tmp_path, 3)
    assert removed == [(before, None)]
    assert not (target / "mark").exists()
    assert [path.name for path in tmp_path.iterdir()] == [".partial", "checkpoint-3"]


def test_the_last_ones_and_the_best_are_kept(tmp_path: Path) -> None:
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, None), (5, 1.0), (6, 4.0)):
        make(tmp_path, step, loss)
        rotate(tmp_path, 2)
    assert steps(tmp_path) == [2, 5, 6]
    make(tmp_path, 7, 0.5)
    rotate(tmp_path, 2)
    assert steps(tmp_path) == [6, 7]
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == [".partial"]


def test_a_loss_that_is_no_number_is_never_the_best(tmp_path: Path) -> None:
    make(tmp_path, 1, 2.0)
    manifest = json.loads((make(tmp_path, 2) / MANIFEST).read_text())
    for loss in (float("nan"), "low", True, None, [1]):
        (tmp_path / "checkpoint-2" / MANIFEST).write_text(json.dumps({**manifest, "held_out_loss": loss}))
        make(tmp_path, 3, 9.0)
        rotate(tmp_path, 2)
        assert 1 in steps(tmp_path)


def test_one_whose_loss_was_no_number_is_passed_over(tmp_path: Path) -> None:
    make(tmp_path, 1, 2.0)
    folder = make(tmp_path, 2)
    seal(folder, Seal(2, sound=False))
    said: list[str] = []
    assert newest_whole(tmp_path, said.append) == tmp_path / "checkpoint-1"
    assert said == [
        f"warning: {folder} is of no use (its held-out loss is no number); going on from the checkpoint before it"
    ]


def test_one_that_does_not_say_its_step_is_damaged(tmp_path: Path) -> None:
    folder = make(tmp_path, 2)
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["step"]
    (folder / MANIFEST).write_text(json.dumps(manifest))
    assert newest_whole(tmp_path, lambda line: None) is None


def test_same_step_again_replaces_and_later_ones_are_dropped(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        make(tmp_path, step)
    make(tmp_path, 4, 0.5)
    assert read_seal(tmp_path / "checkpoint-4").held_out_loss == 0.5
    drop_after(tmp_path, 4)
    assert steps(tmp_path) == [2, 4]
    assert newest_whole(tmp_path, print, below=4) == tmp_path / "checkpoint-2"


def test_sweep_removes_what_a_kill_left(tmp_path: Path) -> None:
    make(tmp_path, 2)
    (tmp_path / ".partial" / "checkpoint-4").mkdir()
    (tmp_path / ".discarded-checkpoint-1").mkdir()
    (tmp_path / "checkpoint-junk").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    sweep(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-junk", "notes.txt"]
    assert newest_whole(tmp_path, print) == tmp_path / "checkpoint-2"


def test_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "else").mkdir()
    (tmp_path / "checkpoint-5").symlink_to(tmp_path / "else")
    with pytest.raises(MomifyError, match="is a link"):
        newest_whole(tmp_path, print)
