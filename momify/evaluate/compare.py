"""Scores side by side: mean and deviation over seeds, differences, and whether they exceed the spread."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import mean, stdev
from typing import Any

from momify.evaluate.task import Outcome

Json = dict[str, Any]

RULE = (
    "a difference exceeds the spread over seeds if it is more than 2 standard errors (of both means, pooled); "
    "with one seed, or where all seeds agree, the spread is unknown"
)
EXACT, ONE_SEED, AGREE = "no seeds in it: exact", "one seed, spread unknown", "seeds agree, spread unknown"
EXCEEDS, WITHIN = "exceeds the spread", "within the spread"
AVERAGE = "glue"
LEFT_OUT = ("wnli",)
"""GLUE tasks that its average leaves out, as BERT's paper does (section 4.1): WNLI's dev set is adversarial."""


@dataclass(frozen=True)
class OverSeeds:
    """The mean of a metric over seeds; `deviation` is the sample's, None for one value or where nothing is random."""

    mean: float
    deviation: float | None
    values: tuple[float, ...]
    random: bool = True


def spread(values: list[float | None], random: bool = True) -> OverSeeds | None:
    """Mean and deviation of a metric's values over seeds; None where one of them is not finite."""
    if any(value is None or not math.isfinite(value) for value in values):
        return None
    return OverSeeds(mean(values), stdev(values) if len(values) > 1 else None, tuple(values), random)


def compare(reference: OverSeeds, other: OverSeeds) -> Json:
    """The difference of two means and whether it exceeds the spread over seeds, by RULE."""
    difference = other.mean - reference.mean
    error = None
    if not other.random:
        verdict = EXACT
    elif reference.deviation is None or other.deviation is None:
        verdict = ONE_SEED
    else:
        error = math.sqrt(sum(s.deviation**2 / len(s.values) for s in (reference, other)))
        verdict = AGREE if not error else EXCEEDS if abs(difference) > 2 * error else WITHIN
    return {"difference": difference, "standard_error": error, "verdict": verdict}


@dataclass(frozen=True)
class _Summary:
    """One task as it is kept and shown: docs/report-schema.md has the words."""

    task: str
    main: str
    shown: list[str]
    higher_is_better: bool
    limited: bool
    seeds: list[int | None]
    covers: list[str] | None
    models: dict[str, Json]
    differences: Json
    baselines: list[Json]


def summary(outcome: Outcome) -> Json:
    """One task's outcome as plain JSON values: what a table, a report and `--json` show."""
    task = outcome.task
    spreads = {
        role: {name: spread([score.metrics[name] for score in scores], task.seeded) for name in scores[0].metrics}
        for role, scores in outcome.scores.items()
    }
    models = {
        role: _model(
            spreads[role],
            outcome.sha256[role],
            scores[0].protocol,
            [*sorted({score.note for score in scores if score.note}), *_apart(outcome, role)],
            sum(score.seconds for score in scores),
        )
        for role, scores in outcome.scores.items()
    }
    apart = {role: found.metrics for role, found in outcome.incomparable.items()}
    compared = {role: [name for name in task.shown if name not in apart.get(role, ())] for role in spreads}
    return asdict(
        _Summary(
            task=task.name,
            main=task.main,
            shown=list(task.shown),
            higher_is_better=task.higher_is_better,
            limited=task.limited,
            seeds=list(outcome.seeds),
            covers=None,
            models=models,
            differences=_differences(spreads, compared),
            baselines=[{"name": b.name, "how": b.how, "metrics": b.metrics} for b in outcome.baselines],
        )
    )


def _apart(outcome: Outcome, role: str) -> list[str]:
    """A note on what of a role's scores is not set against the first's."""
    found, first = outcome.incomparable.get(role), next(iter(outcome.scores))
    return [f"{', '.join(found.metrics)}: not compared with {first}, {found.why}"] if found else []


def _model(
    spreads: dict[str, OverSeeds | None],
    sha256: str,
    protocol: str = "",
    notes: Sequence[str] = (),
    seconds: float = 0.0,
) -> Json:
    """One model's part of a summary."""
    metrics = {
        name: found and {"mean": found.mean, "deviation": found.deviation, "values": list(found.values)}
        for name, found in spreads.items()
    }
    return {"metrics": metrics, "sha256": sha256, "protocol": protocol, "notes": list(notes), "seconds": seconds}


def _differences(spreads: dict[str, dict[str, OverSeeds | None]], compared: dict[str, list[str]]) -> Json:
    """Each other role against the first, in the metrics that are `compared`."""
    first, *others = spreads
    return {
        role: {
            name: compare(spreads[first][name], spreads[role][name])
            for name in compared[role]
            if spreads[first].get(name) and spreads[role].get(name)
        }
        for role in others
    }


def weights(one: Json) -> dict[str, str]:
    """The hash of each model's weights in a summary."""
    return {role: found["sha256"] for role, found in one["models"].items()}


def average(tasks: list[Json]) -> Json | None:
    """GLUE's average of the main metrics (but for LEFT_OUT), seed by seed, from the summaries of its tasks.

    None for fewer than two, and where they are not of the same seeds and weights. `covers` names the tasks: an average
    over other tasks is another number.
    """
    counted = [one for one in tasks if one["task"] not in LEFT_OUT]
    if len(counted) < 2 or any(
        (one["seeds"], weights(one)) != (counted[0]["seeds"], weights(counted[0])) for one in counted
    ):
        return None
    sha256, seeds = weights(counted[0]), counted[0]["seeds"]
    spreads = {role: {"average": spread(_means(counted, role, len(seeds)))} for role in sha256}
    guesses = [{b["name"]: b["metrics"][one["main"]] for b in one["baselines"]} for one in counted]
    rows = [
        {"name": name, "how": "mean over the tasks", "metrics": {"average": mean(found[name] for found in guesses)}}
        for name in guesses[0]
        if all(name in found for found in guesses)
    ]
    return asdict(
        _Summary(
            task=AVERAGE,
            main="average",
            shown=["average"],
            higher_is_better=True,
            limited=any(one["limited"] for one in counted),
            seeds=list(seeds),
            covers=[one["task"] for one in counted],
            models={role: _model(spreads[role], sha256[role]) for role in sha256},
            differences=_differences(spreads, {role: ["average"] for role in sha256}),
            baselines=rows,
        )
    )


def _means(tasks: list[Json], role: str, seeds: int) -> list[float | None]:
    """The mean over tasks of a role's main metrics, seed by seed; None where one is not finite."""
    found = [one["models"][role]["metrics"][one["main"]] for one in tasks]
    return [mean(f["values"][place] for f in found) if all(found) else None for place in range(seeds)]
