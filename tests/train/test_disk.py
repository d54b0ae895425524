"""A full disk: one line that names the file, everything older intact, and the run goes on once there is space."""

import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from momify.train.checkpoints import fault


def started(place, until: str = "checkpoint-14"):
    """A run that was stopped after its second checkpoint."""
    process = place.start("train", "tiny.yaml")
    while process.poll() is None and not (place.checkpoints / until).exists():
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 1, place.err
    return place


def checkpoints(place) -> list[str]:
    found = sorted(place.checkpoints.iterdir())
    assert all(fault(folder) is None for folder in found)
    return [folder.name for folder in found]


def assert_one_line(place, words: str) -> None:
    lines = place.err.splitlines()
    assert len(lines) == 1, place.err
    assert lines[0].startswith(f"momify: cannot write runs/tiny/{words}"), lines


# metrics.jsonl and log.txt are small: only a limit below their size meets them
LIMITS = [
    pytest.param(1600, "metrics.jsonl", marks=pytest.mark.slow),
    pytest.param(20_000, "checkpoints/checkpoint-", marks=pytest.mark.slow),
    (300_000, "checkpoints/checkpoint-"),
]


@pytest.mark.parametrize(("limit", "words"), LIMITS)
def test_file_that_may_not_grow(new_place: Callable, undisturbed, limit: int, words: str) -> None:
    place = started(new_place())
    before = checkpoints(place)
    no_more = f"import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))"
    code = place.finish("train", "tiny.yaml", "--resume", first=no_more)
    assert code == 2
    assert_one_line(place, words)
    assert checkpoints(place) == before
    assert place.finish("train", "tiny.yaml", "--resume") == 0, place.err
    assert place.rows() == undisturbed.rows()
    models = [where.run / "model" / "model.safetensors" for where in (place, undisturbed)]
    assert models[0].read_bytes() == models[1].read_bytes()


@pytest.fixture
def small_disk(tmp_path: Path):
    """A file system of its own that a test can fill; needs the right to mount one."""
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("left", [0, 1000, 50_000, 230_000, 500_000])
def test_full_disk(new_place: Callable, undisturbed, small_disk: Path, left: int) -> None:
    place = new_place()
    (place.folder / "runs").symlink_to(small_disk)
    started(place)
    before = checkpoints(place)
    fill = small_disk / "fill"
    with open(fill, "wb") as stream:
        stream.write(b"\0" * (shutil.disk_usage(small_disk).free - left))
    code = place.finish("train", "tiny.yaml", "--resume")
    assert code == 2, (code, place.err)
    assert_one_line(place, "")
    assert "No space left" in place.err
    assert checkpoints(place) == before
    fill.unlink()
    assert place.finish("train", "tiny.yaml", "--resume") == 0, place.err
    assert place.rows() == undisturbed.rows()
