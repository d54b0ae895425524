"""Scores of tasks in words: the table that the command, report.md and report.html show."""

from collections.abc import Sequence

from momify.evaluate.compare import AGREE, EXACT, EXCEEDS, ONE_SEED, RULE, WITHIN
from momify.report.words import Json

Table = tuple[Sequence[str], list[list[str]]]
SHORT = {EXCEEDS: "exceeds", WITHIN: "within", ONE_SEED: "one seed", AGREE: "seeds agree", EXACT: "exact"}
"""A verdict as it stands in the column `spread`."""


def comparison_table(summaries: list[Json]) -> Table:
    """Columns and rows for summaries of `momify.evaluate.compare`: a row a task and metric.

    Models are columns, the first is what the others are compared with; baselines stand at the end.
    """
    roles = list(dict.fromkeys(role for one in summaries for role in one["models"]))
    baselines = list(dict.fromkeys(b["name"] for one in summaries for b in one["baselines"]))
    others = roles[1:]
    columns = ["task", "metric", *roles]
    for role in others:
        columns += ["difference" if len(others) == 1 else f"{role} - {roles[0]}", "spread"]
    rows = [
        _row(one, metric, place == 0, roles, others, baselines)
        for one in summaries
        for place, metric in enumerate(_shown(one))
    ]
    return [*columns, *baselines], rows


def protocol_lines(summaries: list[Json]) -> list[str]:
    """How each number was taken: a line a task (and model, where they differ), notes, averages, baselines, the rule."""
    lines = [line for one in summaries for line in _task_lines(one)]
    hows: dict[str, list[str]] = {}
    for one in summaries:
        for baseline in one["baselines"] if not one["covers"] else []:
            hows.setdefault(f"{baseline['name']}: {baseline['how']}", []).append(one["task"])
    lines += [f"{how} ({', '.join(tasks)})" for how, tasks in hows.items()]
    if any(one["differences"] for one in summaries):
        lines.append(f"spread: {RULE}")
    return lines


def _task_lines(one: Json) -> list[str]:
    protocols = {role: found["protocol"] for role, found in one["models"].items() if found["protocol"]}
    same = len(set(protocols.values())) == 1
    shown = {"": next(iter(protocols.values()))} if same else protocols
    seeds = [str(seed) for seed in one["seeds"] if seed is not None]
    tail = f"; seeds {', '.join(seeds)}" if seeds and protocols else ""
    lines = [f"{one['task']}{', ' + role if role else ''}: {text}{tail}" for role, text in shown.items()]
    for role, found in one["models"].items():
        lines += [f"{one['task']}, {role}: {note}" for note in found["notes"]]
    if one["covers"]:
        lines.append(f"{one['task']} average: the mean of the main metrics of {', '.join(one['covers'])}")
    return lines


def _shown(one: Json) -> list[str]:
    """Metrics that any model has a number for, and the main one in any case: that it is not finite must be seen."""
    taken = [found["metrics"] for found in one["models"].values()]
    return [metric for metric in one["shown"] if metric == one["main"] or any(found.get(metric) for found in taken)]


def _row(one: Json, metric: str, first: bool, roles: list[str], others: list[str], baselines: list[str]) -> list[str]:
    name = one["task"] + (" (limited)" if one["limited"] else "") if first else ""
    taken = {role: found["metrics"] for role, found in one["models"].items()}
    spreads = {role: metrics[metric] for role, metrics in taken.items() if metric in metrics}
    places = _places([found["mean"] for found in spreads.values() if found], one["seeds"] != [None])
    cells = [name, metric]
    for role in roles:
        cells.append(_spread(spreads[role], places) if role in spreads else "")
    for role in others:
        found = one["differences"].get(role, {}).get(metric)
        cells += (
            [f"{found['difference']:+.{places}f}", SHORT.get(found["verdict"], found["verdict"])] if found else ["", ""]
        )
    values = {b["name"]: b["metrics"].get(metric) for b in one["baselines"]}
    return cells + ["" if values.get(name) is None else f"{values[name]:.{places}f}" for name in baselines]


def _places(means: list[float], percents: bool) -> int:
    """Decimals of a row: two where numbers are times 100 or large (53.07), three for the rest (1.183 bits)."""
    return 2 if percents or max(map(abs, means), default=0.0) >= 5 else 3


def _spread(found: Json | None, places: int) -> str:
    if found is None:
        return "not finite"
    deviation = "" if found["deviation"] is None else f" ± {found['deviation']:.{places}f}"
    return f"{found['mean']:.{places}f}{deviation}"
