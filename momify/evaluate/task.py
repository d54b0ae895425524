"""What every task looks like to the loop that runs it, and what that loop gives back."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from momify.evaluate.contestant import Contestant
from momify.evaluate.results import Key, Score

Tick = Callable[[int], None]
"""Told how many more pieces of work (see Task.work) are done."""


@dataclass(frozen=True)
class Baseline:
    """What is reached without a model, by a rule stated in `how`."""

    name: str
    how: str
    metrics: dict[str, float]


@dataclass(frozen=True)
class Incomparable:
    """Metrics of two contestants whose difference would say nothing, and why."""

    metrics: tuple[str, ...]
    why: str


@dataclass(frozen=True)
class Turn:
    """One scoring: with which seed, whom to tell of work done, where a fine-tuned model is kept (None: nowhere)."""

    seed: int
    tick: Tick = lambda pieces: None
    keep: Path | None = None


class Task(Protocol):
    """A task with its data at hand."""

    name: str
    main: str
    """The metric that counts."""
    shown: tuple[str, ...]
    """The metrics of a table, the main one first."""
    seeded: bool
    """Whether a seed changes the score; a task without randomness is scored once."""
    higher_is_better: bool
    limited: bool
    """Whether this is a quick look at a part of the data."""

    def check_fit(self, one: Contestant) -> None:
        """Raise MomifyError where `one` cannot be scored, as far as that shows without its weights."""
        ...

    def key(self, one: Contestant) -> Key:
        """All that decides the score of `one`, but for the seed."""
        ...

    def work(self, one: Contestant) -> int:
        """How many pieces of work one scoring is: steps and batches."""
        ...

    def score(self, one: Contestant, turn: Turn) -> Score:
        """Score `one`, telling `turn.tick` of work done."""
        ...

    def incomparable(self, first: Contestant, other: Contestant) -> Incomparable | None:
        """What of two contestants' scores must not be set against each other; None where everything may."""
        ...

    def baselines(self) -> list[Baseline]:
        """What the same metrics are without a model; empty where nothing is worth saying."""
        ...


@dataclass(frozen=True)
class Outcome:
    """The scores of one task: by role, one a seed; hashes of weights; by role what is not comparable to the first's."""

    task: Task
    seeds: tuple[int | None, ...]
    scores: dict[str, list[Score]]
    baselines: list[Baseline]
    sha256: dict[str, str]
    incomparable: dict[str, Incomparable] = field(default_factory=dict)
