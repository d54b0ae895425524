"""Scores side by side: mean and deviation over seeds, differences, and whether they exceed the spread."""

import math
from dataclasses import dataclass
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
class Spread:
    """The mean of a metric over seeds; `deviation` is the sample's, None for one value or where nothing is random."""

    mean: float
    deviation: float | None
    values: tuple[float, ...]
    random: bool = True


def spread(values: list[float | None], random: bool = True) -> Spread | None:
    """Mean and deviation of a metric's values over seeds; None where one of them is not finite."""
    if any(value is None or not math.isfinite(value) for value in values):
        return None
    return Spread(mean(values), stdev(values) if len(values) > 1 else None, tuple(values), random)


def compare(reference: Spread, other: Spread) -> Json:
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


def summary(outcome: Outcome) -> Json:
    """One task's outcome as plain JSON values: what a table, a report and `--json` show."""
    task = outcome.task
    spreads = {
        role: {name: spread([score.metrics[name] for score in scores], task.seeded) for name in scores[0].metrics}
        for role, scores in outcome.scores.items()
    }
    return {
        "task": task.name,
        "main": task.main,
        "shown": list(task.shown),
        "higher_is_better": task.higher_is_better,
        "limited": task.limited,
        "seeds": list(outcome.seeds),
        "covers": None,
        "models": {
            role: {
                "metrics": {name: _spread_json(found) for name, found in spreads[role].items()},
                "sha256": outcome.sha256[role],
                "protocol": scores[0].protocol,
                "notes": sorted({score.note for score in scores if score.note}),
                "seconds": sum(score.seconds for score in scores),
            }
            for role, scores in outcome.scores.items()
        },
        "differences": _differences(spreads, task.shown),
        "baselines": [{"name": b.name, "how": b.how, "metrics": b.metrics} for b in outcome.baselines],
    }


def _spread_json(found: Spread | None) -> Json | None:
    return None if found is None else {"mean": found.mean, "deviation": found.deviation, "values": list(found.values)}


def _differences(spreads: dict[str, dict[str, Spread | None]], shown: tuple[str, ...]) -> Json:
    """Each other role against the first, metric by metric."""
    first, *others = spreads
    return {
        role: {
            name: compare(spreads[first][name], spreads[role][name])
            for name in shown
            if spreads[first].get(name) and spreads[role].get(name)
        }
        for role in others
    }


def average(outcomes: list[Outcome]) -> Json | None:
    """GLUE's average of the main metrics (but for LEFT_OUT), seed by seed; None for fewer than two tasks.

    `covers` names the tasks: an average over other tasks is another number.
    """
    counted = [one for one in outcomes if one.task.name not in LEFT_OUT]
    if len(counted) < 2:
        return None
    roles = counted[0].scores
    spreads = {
        role: {"average": spread([
            mean(one.scores[role][place].metrics[one.task.main] for one in counted)
            for place in range(len(counted[0].seeds))
        ])}
        for role in roles
    }  # fmt: skip
    names = [b.name for b in counted[0].baselines]
    rows = [
        {"name": name, "how": "mean over the tasks", "metrics": {"average": mean(
            next(b for b in one.baselines if b.name == name).metrics[one.task.main] for one in counted)}}
        for name in names
    ]  # fmt: skip
    return {
        "task": AVERAGE,
        "main": "average",
        "shown": ["average"],
        "higher_is_better": True,
        "limited": any(one.task.limited for one in counted),
        "seeds": list(counted[0].seeds),
        "covers": [one.task.name for one in counted],
        "models": {
            role: {
                "metrics": {"average": _spread_json(found["average"])},
                "sha256": counted[0].sha256[role],
                "protocol": "",
                "notes": [],
                "seconds": 0.0,
            }
            for role, found in spreads.items()
        },
        "differences": _differences(spreads, ("average",)),
        "baselines": rows,
    }
