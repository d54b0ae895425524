"""The loop over tasks, seeds and contestants: what is kept is used again, what is missing is scored and written."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from momify.evaluate.contestant import Contestant
from momify.evaluate.results import Entry, Results, Score
from momify.evaluate.task import Outcome, Task, Turn

Watch = Callable[[int, int, str], None]
"""Told of pieces of work done, of all, and what is being done."""


@dataclass(frozen=True)
class Place:
    """Where results go (one JSON file a task), whether fine-tuned models are kept there, and who hears of it."""

    folder: Path
    keep_heads: bool = False
    say: Callable[[str], None] = lambda line: None
    watch: Watch = lambda done, total, doing: None


@dataclass(frozen=True)
class _Unit:
    """One score to be made."""

    task: Task
    one: Contestant
    seed: int | None

    @property
    def words(self) -> str:
        seed = "" if self.seed is None else f", seed {self.seed}"
        return f"{self.task.name}, {self.one.role}{seed}"


def evaluate(tasks: list[Task], contestants: list[Contestant], seeds: list[int], place: Place) -> list[Outcome]:
    """Each task's scores of each contestant, one a seed (one in all where nothing is random).

    A score is written to `place.folder` as soon as it is made, so that a killed evaluation goes on with the next one;
    a kept one is used again only for the same weights, data, protocol and seed.
    """
    kept = {task.name: Results(results_file(place.folder, task.name), task.name) for task in tasks}
    units = [
        _Unit(task, one, seed) for task in tasks for seed in (seeds if task.seeded else [None]) for one in contestants
    ]
    missing = [unit for unit in units if _find(unit, kept) is None]
    meter = _Meter(sum(unit.task.work(unit.one) for unit in missing), place.watch)
    for unit in missing:
        if _find(unit, kept) is None:  # another with the same weights may have been scored meanwhile
            _make(unit, kept[unit.task.name], place, meter)
    return [_outcome(task, [unit for unit in units if unit.task is task], kept) for task in tasks]


def results_file(folder: Path, task: str) -> Path:
    """Where the scores of a task are kept; a name with other than plain characters is spelled with hyphens."""
    return folder / ("".join(c if c.isalnum() or c in "-_." else "-" for c in task) + ".json")


@dataclass
class _Meter:
    """Pieces of work done, of all."""

    total: int
    watch: Watch
    done: int = 0
    doing: str = ""

    def tick(self, pieces: int) -> None:
        self.done += pieces
        self.watch(self.done, self.total, self.doing)


def _find(unit: _Unit, kept: dict[str, Results]) -> Score | None:
    return kept[unit.task.name].find(unit.one.role, unit.seed, unit.task.key(unit.one))


def _make(unit: _Unit, results: Results, place: Place, meter: _Meter) -> None:
    """Score one unit, write it, and say so."""
    meter.doing = unit.words
    meter.tick(0)
    keep = place.folder / "heads" / unit.task.name / f"{unit.one.role}-seed{unit.seed}" if place.keep_heads else None
    since = time.monotonic()
    score = unit.task.score(unit.one, Turn(unit.seed or 0, meter.tick, keep))
    score = replace(score, seconds=round(time.monotonic() - since, 1))
    results.add(Entry(unit.one.role, unit.seed, unit.task.key(unit.one), score))
    found = score.metrics[unit.task.main]
    value = "not finite" if found is None else f"{found:.2f}"
    place.say(f"{unit.words}: {unit.task.main} {value} ({score.seconds:,.0f} s)")


def _outcome(task: Task, units: list[_Unit], kept: dict[str, Results]) -> Outcome:
    scores: dict[str, list[Score]] = {}
    for unit in units:
        scores.setdefault(unit.one.role, []).append(_find(unit, kept))
    weights = {unit.one.role: unit.one.sha256 for unit in units}
    return Outcome(task, tuple(dict.fromkeys(unit.seed for unit in units)), scores, task.baselines(), weights)
