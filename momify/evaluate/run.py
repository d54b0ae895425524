"""The loop over tasks, seeds and contestants: what is kept is used again, what is missing is scored and written."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from momify.errors import MomifyError
from momify.evaluate.contestant import Contestant
from momify.evaluate.heads import is_kept, note_score
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
    a kept one is used again only for the same weights, data, protocol and seed, and where `place.keep_heads` asks for
    the fine-tuned model besides, only if that is there. Raises MomifyError for a contestant that a task cannot take,
    before anything is scored.
    """
    kept = {task.name: Results(results_file(place.folder, task.name), task.name) for task in tasks}
    units = [
        _Unit(task, one, seed) for task in tasks for seed in (seeds if task.seeded else [None]) for one in contestants
    ]
    missing = [unit for unit in units if not _is_done(unit, kept, place)]
    _check_fit(missing)
    meter = _Meter(sum(unit.task.work(unit.one) for unit in missing), place.watch)
    for unit in missing:
        if not _is_done(unit, kept, place):  # another with the same weights may have been scored meanwhile
            if _find(unit, kept) is not None:
                place.say(f"{unit.words}: the score is kept, but not the fine-tuned model; it is trained again")
            _make(unit, kept[unit.task.name], place, meter)
    for unit in units:
        kept[unit.task.name].share(unit.one.role, unit.seed, unit.task.key(unit.one))
    return [_outcome(task, [unit for unit in units if unit.task is task], kept) for task in tasks]


def results_file(folder: Path, task: str) -> Path:
    """Where the scores of a task are kept; a name with other than plain characters is spelled with hyphens."""
    return folder / f"{_plain(task)}.json"


def _plain(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in name)


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
    return kept[unit.task.name].find(unit.seed, unit.task.key(unit.one))


def _is_done(unit: _Unit, kept: dict[str, Results], place: Place) -> bool:
    """Whether nothing is left to do: there is a score, and the fine-tuned model where that is asked for."""
    head = _head(unit, place)
    return _find(unit, kept) is not None and (head is None or is_kept(head, unit.task.key(unit.one)))


def _head(unit: _Unit, place: Place) -> Path | None:
    """Where to keep the fine-tuned model of a unit; a task without seeds fine-tunes nothing."""
    if not (place.keep_heads and unit.task.seeded):
        return None
    return place.folder / "heads" / unit.task.name / f"{_plain(unit.one.role)}-seed{unit.seed}"


def _check_fit(units: list[_Unit]) -> None:
    """Raise MomifyError, naming the contestant, where one cannot be scored."""
    for unit in units:
        try:
            unit.task.check_fit(unit.one)
        except MomifyError as error:
            raise MomifyError(f"{unit.one.role}: {error}") from None


def _make(unit: _Unit, results: Results, place: Place, meter: _Meter) -> None:
    """Score one unit, write it, and say so."""
    meter.doing = unit.words
    meter.tick(0)
    keep, key = _head(unit, place), unit.task.key(unit.one)
    since = time.monotonic()
    score = unit.task.score(unit.one, Turn(unit.seed or 0, meter.tick, keep))
    score = replace(score, seconds=round(time.monotonic() - since, 1))
    if keep:
        note_score(keep, key)
    results.add(Entry(unit.one.role, unit.seed, key, score))
    found = score.metrics[unit.task.main]
    value = "not finite" if found is None else f"{found:.2f}"
    place.say(f"{unit.words}: {unit.task.main} {value} ({score.seconds:,.0f} s)")


def _outcome(task: Task, units: list[_Unit], kept: dict[str, Results]) -> Outcome:
    scores: dict[str, list[Score]] = {}
    for unit in units:
        scores.setdefault(unit.one.role, []).append(_find(unit, kept))
    ones = {unit.one.role: unit.one for unit in units}
    first, *others = ones.values()
    apart = {one.role: found for one in others if (found := task.incomparable(first, one))}
    weights, seeds = {role: one.sha256 for role, one in ones.items()}, dict.fromkeys(unit.seed for unit in units)
    return Outcome(task, tuple(seeds), scores, task.baselines(), weights, apart)
