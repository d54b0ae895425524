"""The training curves of a run, from metrics.jsonl: thinned out to what a picture can show."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Json = dict[str, Any]
POINTS = 300  # of a curve; more cannot be told apart on a page
CURVES = {  # name in report.json: name in metrics.jsonl
    "loss": "loss",
    "next_token_loss": "cross_entropy",
    "distillation_loss": "distill",
    "hidden_loss": "hidden",
    "held_out_loss": "eval_loss",
    "router_entropy": "router_entropy",
}


def read_training(path: Path, splice: int = 1) -> Json | None:
    """Curves by name, each a list of [step, value], and what the training took; None where nothing was trained.

    splice: of how many pieces its blocks were, which is on another scale than held-out text where it is more than one.
    Lines that are cut or no JSON objects, and values that are not finite, are passed over: a picture of the rest is
    worth having.
    """
    rows = list(_rows(path)) if path.is_file() else []
    curves = {name: _thin(list(_curve(rows, key))) for name, key in CURVES.items()}
    if not curves["loss"]:
        return None
    speeds = sorted(value for _, value in _curve(rows, "tokens_per_second"))
    last = rows[-1]
    return {
        "steps": last["step"],
        "splice": splice,
        "tokens": last.get("tokens"),
        "tokens_per_second": speeds[len(speeds) // 2] if speeds else None,
        "curves": curves,
    }


def _rows(path: Path) -> Iterator[Json]:
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and _number(row.get("step")):
            yield row


def _curve(rows: list[Json], key: str) -> Iterator[list[float]]:
    yield from ([row["step"], row[key]] for row in rows if _number(row.get(key)))


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _thin(points: list[list[float]]) -> list[list[float]]:
    """Every so-manieth point, the first and the last among them."""
    if len(points) <= POINTS:
        return points
    places = {round(index * (len(points) - 1) / (POINTS - 1)) for index in range(POINTS)}
    return [points[place] for place in sorted(places)]
