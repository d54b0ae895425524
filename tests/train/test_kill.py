"""A run that is killed with SIGKILL again and again ends with the same bits as one that is left in peace."""

import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

MOMENTS = ("starting", "training", "saving", "evaluating", "removing", "finishing")


def appears(folder: Path, pattern: str) -> bool:
    try:
        return any(folder.glob(pattern))
    except OSError:  # it went while we looked
        return True


def has_come(place, moment: str, metrics_before: int) -> bool:
    """Whether the process in `place` is at `moment` now."""
    metrics = place.run / "metrics.jsonl"
    if moment == "starting":
        return True
    if moment == "saving":  # with a checkpoint to go back to
        return appears(place.checkpoints, ".partial/checkpoint-*") and appears(place.checkpoints, "checkpoint-*")
    if moment == "later":
        return appears(place.checkpoints, "checkpoint-14")
    if moment == "removing":
        return appears(place.checkpoints, ".discarded-*")
    if moment == "finishing":
        return appears(place.run, ".momify-model.*")
    grown = metrics.exists() and metrics.stat().st_size != metrics_before
    return grown and (moment == "training" or b"eval_loss" in metrics.read_bytes()[metrics_before:])


def kill_at(place, moment: str, draw: random.Random) -> bool:
    """Start or go on with the run and SIGKILL it at `moment`; False if it ended before the moment came."""
    metrics = place.run / "metrics.jsonl"
    before = metrics.stat().st_size if metrics.exists() else 0
    resume = ["--resume"] if (place.run / "recipe.yaml").exists() else []
    process = place.start("train", "tiny.yaml", *resume)
    wait = {"starting": 3.0, "training": 1.5, "later": 0.2}.get(moment, 0.03)
    while process.poll() is None and not has_come(place, moment, before):
        time.sleep(0.0005)
    time.sleep(draw.uniform(0, wait))
    alive = process.poll() is None
    process.send_signal(signal.SIGKILL)
    assert process.wait() in ((-signal.SIGKILL,) if alive else (0, -signal.SIGKILL)), place.err
    return alive


def assert_same(place, whole) -> None:
    """Weights, optimizer, random states and metrics of two finished runs are equal to the bit."""
    assert place.rows() == whole.rows()
    ours, theirs = place.weights(), whole.weights()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert (place.run / "model/model.safetensors").read_bytes() == (whole.run / "model/model.safetensors").read_bytes()
    names = sorted(path.name for path in whole.checkpoints.glob("checkpoint-*"))
    assert sorted(path.name for path in place.checkpoints.glob("checkpoint-*")) == names
    for name in names:
        for part in ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "tally_0.pt"):
            pair = [where.checkpoints / name / part for where in (place, whole)]
            assert pair[0].read_bytes() == pair[1].read_bytes(), (name, part)


def assert_tidy(place) -> None:
    """No half-written or half-removed thing is left in the run."""
    left = [path for path in place.run.rglob(".*") if path.name.startswith((".momify-", ".partial", ".discarded"))]
    assert [path for path in left if path.name != ".partial" or any(path.iterdir())] == []


def disturb(place, moments: list[str], draw: random.Random) -> int:
    """Kill a run at each of `moments`, then let it finish; how many kills met it alive."""
    kills = sum(kill_at(place, moment, draw) for moment in moments)
    resume = ["--resume"] if (place.run / "recipe.yaml").exists() else []
    assert place.finish("train", "tiny.yaml", *resume) == 0, place.err
    return kills


def test_killed_run_ends_with_the_same_bits(new_place: Callable, undisturbed) -> None:
    place = new_place()
    assert disturb(place, ["later", "saving"], random.Random(1)) == 2
    assert_same(place, undisturbed)
    assert_tidy(place)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_killed_at_many_random_moments(new_place: Callable, undisturbed) -> None:
    draw, kills, count = random.Random(20241124), 0, dict.fromkeys(MOMENTS, 0)
    rounds = 0
    while kills < 24 or min(count.values()) == 0:
        place, rounds = new_place(str(rounds)), rounds + 1
        moments = draw.choices(MOMENTS[:5], k=draw.randint(1, 4)) + draw.choices(["finishing", "saving"], k=1)
        for moment in moments:
            if kill_at(place, moment, draw):
                kills, count[moment] = kills + 1, count[moment] + 1
        disturb(place, [], draw)
        assert_same(place, undisturbed)
        assert_tidy(place)
    print(f"{kills} kills in {rounds} runs: {count}")


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_signals_save_first_and_say_how_to_go_on(new_place: Callable, undisturbed, number: signal.Signals) -> None:
    place = new_place()
    process: subprocess.Popen = place.start("train", "tiny.yaml")
    while process.poll() is None and not has_come(place, "training", 0):
        time.sleep(0.005)
    process.send_signal(number)
    assert process.wait() == 1, place.err
    line = place.err.splitlines()[-1]
    assert line.startswith(f"momify: stopped by {number.name} at step ")
    assert line.endswith("saved; go on with: momify train runs/tiny/recipe.yaml --resume")
    step = int(line.split("at step ")[1].split(",")[0])
    assert (place.checkpoints / f"checkpoint-{step}" / "manifest.json").exists()
    assert place.finish("train", "runs/tiny/recipe.yaml", "--resume") == 0, place.err
    assert place.rows() == undisturbed.rows()
    models = [where.run / "model" / "model.safetensors" for where in (place, undisturbed)]
    assert models[0].read_bytes() == models[1].read_bytes()
