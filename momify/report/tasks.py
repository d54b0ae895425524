"""Scores of tasks in words: the table that the command, report.md and report.html show."""

from collections.abc import Sequence

from momify.evaluate.compare import RULE
from momify.report.words import Json

Table = tuple[Sequence[str], list[list[str]]]


def comparison_table(summaries: list[Json]) -> Table:
    """Columns and rows for summaries of `momify.evaluate.compare`: a row a task and metric.

    Models are columns, the first is what the others are compared with; baselines stand at the end.
    """
    roles = list(dict.fromkeys(role for one in summaries for role in one["models"]))
    baselines = list(dict.fromkeys(b["name"] for one in summaries for b in one["baselines"]))
    others = roles[1:]
    columns = ["task", "metric", *roles]
    for role in others:
        columns += ["difference", "over seeds"] if len(others) == 1 else [f"{role} - {roles[0]}", "over seeds"]
    rows = [
        _row(one, metric, roles, others, baselines)
        for one in summaries
        for metric in one["shown"]
        if any(found["metrics"].get(metric) for found in one["models"].values())
    ]
    return [*columns, *baselines], rows


def protocol_lines(summaries: list[Json]) -> list[str]:
    """How each number was taken: one line a task (and model, where they differ), notes, the rule, what was averaged."""
    lines = []
    for one in summaries:
        protocols = {role: found["protocol"] for role, found in one["models"].items() if found["protocol"]}
        same = len(set(protocols.values())) == 1
        shown = {"": next(iter(protocols.values()))} if same else protocols
        seeds = [str(seed) for seed in one["seeds"] if seed is not None]
        tail = f"; seeds {', '.join(seeds)}" if seeds and protocols else ""
        lines += [f"{one['task']}{', ' + role if role else ''}: {text}{tail}" for role, text in shown.items()]
        for role, found in one["models"].items():
            lines += [f"{one['task']}, {role}: {note}" for note in found["notes"]]
        if one["covers"]:
            lines.append(f"{one['task']} average: the mean of the main metrics of {', '.join(one['covers'])}")
    hows = dict.fromkeys(f"{b['name']}: {b['how']}" for one in summaries for b in one["baselines"] if not one["covers"])
    if hows:
        lines.append("baselines: " + "; ".join(hows))
    if any(one["differences"] for one in summaries):
        lines.append(f"over seeds: {RULE}")
    return lines


def _row(one: Json, metric: str, roles: list[str], others: list[str], baselines: list[str]) -> list[str]:
    name = one["task"] + (" (limited)" if one["limited"] else "") if metric == one["main"] else ""
    cells = [name, metric]
    for role in roles:
        found = one["models"].get(role)
        cells.append(_spread(found["metrics"].get(metric)) if found else "")
    for role in others:
        found = one["differences"].get(role, {}).get(metric)
        means = [one["models"][name]["metrics"][metric] for name in (roles[0], role)] if found else []
        size = max((abs(spread["mean"]) for spread in means), default=0.0)
        sign = "+" if found and found["difference"] >= 0 else ""
        cells += [f"{sign}{_decimals(found['difference'], size)}", found["verdict"]] if found else ["", ""]
    values = {b["name"]: b["metrics"].get(metric) for b in one["baselines"]}
    return cells + ["" if values.get(name) is None else f"{values[name]:.2f}" for name in baselines]


def _spread(found: Json | None) -> str:
    if found is None:
        return "not finite"
    deviation = "" if found["deviation"] is None else f" ± {_decimals(found['deviation'], found['mean'])}"
    return f"{_decimals(found['mean'], found['mean'])}{deviation}"


def _decimals(value: float, beside: float) -> str:
    """A number with as many decimals as one of the size of `beside` needs: 53.07, 1.183."""
    return f"{value:.{2 if abs(beside) >= 5 else 3}f}"
