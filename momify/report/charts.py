"""The geometry of a line chart: points in per cent of a box, and round numbers for its axes. The template draws it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Points = Sequence[Sequence[float]]


@dataclass(frozen=True)
class Tick:
    """A mark on an axis: where (per cent of the box, from the left or from the bottom) and what stands there."""

    place: float
    label: str


@dataclass(frozen=True)
class Line:
    """One curve: the points of an SVG polyline in a box of 100 x 100, and its last value."""

    name: str
    points: str
    last: float


@dataclass(frozen=True)
class Chart:
    """A line chart; `level` is a horizontal reference line, from the bottom, with its name."""

    lines: tuple[Line, ...]
    across: tuple[Tick, ...]
    up: tuple[Tick, ...]
    level: Tick | None = None


def line_chart(curves: Mapping[str, Points], level: tuple[str, float] | None = None) -> Chart | None:
    """A chart of `curves` ([x, y] each, by name), empty ones left out; None where all are. `level`: name and y."""
    shown = {name: points for name, points in curves.items() if points}
    if not shown:
        return None
    right = max(x for points in shown.values() for x, _ in points) or 1
    heights = [y for points in shown.values() for _, y in points] + ([level[1]] if level else [])
    bottom, top = _padded(min(heights), max(heights))

    def place(value: float) -> float:
        return round(100 * (value - bottom) / (top - bottom), 2)

    return Chart(
        lines=tuple(
            Line(name, " ".join(f"{100 * x / right:.2f},{100 - place(y):.2f}" for x, y in points), points[-1][1])
            for name, points in shown.items()
        ),
        across=tuple(Tick(100 * value / right, f"{value:,.0f}") for value in round_numbers(0, right)),
        up=tuple(Tick(place(value), f"{value:g}") for value in round_numbers(bottom, top)),
        level=Tick(place(level[1]), level[0]) if level else None,
    )


def _padded(low: float, high: float) -> tuple[float, float]:
    """A little air below and above; a box for a curve that is flat."""
    air = 0.06 * (high - low) or 0.05 * abs(high) or 0.5
    return low - air, high + air


def round_numbers(low: float, high: float, about: int = 5) -> list[float]:
    """Some `about` multiples of 1, 2 or 5 times a power of ten between `low` and `high`."""
    raw = (high - low) / about
    power = 10 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 10) for index in range(first, math.floor(high / step + 1e-9) + 1)]
