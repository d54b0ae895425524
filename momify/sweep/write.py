"""sweep.csv, sweep.md and sweep.svg from the rows of a sweep, each written whole."""

import csv
import io
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from momify.amounts import amount
from momify.convert.homes import KINDS, NOUNS
from momify.files import write_text
from momify.report.charts import Chart, Tick, line_chart
from momify.sweep.cells import Scored
from momify.sweep.findings import Point, compare, curve, sentence

HEAD = ("attention", "ffn", "weights", "MACs", "KV bytes", "converted", "trained", "added", "per module")
COLOURS = {"mha": "#1769aa", "ffn": "#c4541a"}
_LEGEND = "Added: over the whole pool, trained on as much. MACs: one sequence of a block, each token at its home."
WIDTH, HEIGHT = 360, 240  # of a panel's box, in pixels
_MARKS = 13  # numbers that have room under a panel


@dataclass(frozen=True)
class Dots:
    """One curve of a panel in pixels of its box, in the colour of its kind; `faint` where the other kind is pruned."""

    name: str
    colour: str
    faint: bool
    places: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Panel:
    """One chart: what it shows, its axes, its curves."""

    title: str
    chart: Chart
    curves: tuple[Dots, ...]


def write_sweep(folder: Path, title: str, rows: Sequence[Scored], layers: int) -> None:
    """Write all three to `folder`."""
    write_text(folder / "sweep.csv", as_csv(rows))
    write_text(folder / "sweep.svg", as_svg(title, rows, layers))
    write_text(folder / "sweep.md", as_markdown(title, rows, layers))


def as_csv(rows: Sequence[Scored]) -> str:
    """A line a cell, losses in full."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([field.name for field in fields(Scored)])
    writer.writerows(astuple(row) for row in rows)
    return text.getvalue()


def table(rows: Sequence[Scored], layers: int) -> list[tuple[str, ...]]:
    """Under HEAD: a row a cell; losses in nats, the added one over the whole pool trained on as much."""
    whole = {row.seed: row.loss_after for row in rows if row.mha == row.ffn == layers}
    shown = []
    for row in rows:
        added, gone = row.loss_after - whole[row.seed], 2 * layers - row.mha - row.ffn
        sizes = (str(row.mha), str(row.ffn), amount(row.parameters), amount(row.macs), f"{row.kv_bytes_per_token:,}")
        losses = (f"{row.loss_before:.4f}", f"{row.loss_after:.4f}")
        shown.append((*sizes, *losses, *((f"{added:+.4f}", f"{added / gone:+.4f}") if gone else ("-", "-"))))
    return shown


def conclusions(rows: Sequence[Scored], layers: int) -> list[str]:
    """What the sweep says: a sentence a measure, or why there is none."""
    found = [sentence(finding) for finding in compare(rows, layers)]
    return found or ["only one kind of module was removed, so there is nothing to compare"]


def as_markdown(title: str, rows: Sequence[Scored], layers: int) -> str:
    """A page to paste: the table, what it says, and how it was measured."""
    first, rule = rows[0], "|" + "---:|" * len(HEAD)
    head = f"{first.tokens:,} tokens of training a cell; the source's held-out loss is {first.source_loss:.4f} nats."
    foot = f"Losses: {first.protocol}. {_LEGEND}"
    lines = [f"# {title}", "", head, "", f"| {' | '.join(HEAD)} |", rule]
    lines += [f"| {' | '.join(row)} |" for row in table(rows, layers)]
    lines += ["", *(f"- {line}" for line in conclusions(rows, layers)), "", foot, ""]
    return "\n".join([*lines, "![held-out loss against modules kept](sweep.svg)", ""])


def as_svg(title: str, rows: Sequence[Scored], layers: int) -> str:
    """Held-out loss against modules kept, as trained and as converted: one curve a kind."""
    env = Environment(loader=PackageLoader("momify.sweep", "templates"), autoescape=True, undefined=StrictUndefined,
                      trim_blocks=True, lstrip_blocks=True)  # fmt: skip
    curves = _curves(rows, layers)
    source = ("source", rows[0].source_loss)
    trained = {name: [(p.kept, p.loss_after) for p in points] for name, (_, points) in curves.items()}
    converted = {name: [(p.kept, p.loss_before) for p in points] for name, (_, points) in curves.items()}
    titles = {f"after {rows[0].tokens:,} tokens of training": trained, "as converted": converted}
    panels = [_panel(name, line_chart(points, source), curves) for name, points in titles.items() if points]
    return env.get_template("sweep.svg.j2").render(title=title, panels=panels, width=WIDTH, height=HEIGHT)


def _curves(rows: Sequence[Scored], layers: int) -> dict[str, tuple[str, list[Point]]]:
    """Kind and points of each curve by name: first those with all modules of the other kind."""
    found = {}
    for kind, other in zip(KINDS, reversed(KINDS), strict=True):
        for count in sorted({row.kept(other) for row in rows}, reverse=True):
            points = curve(rows, kind, layers, count)
            kept = "" if count == layers else f", {count} {NOUNS[other]}"
            if len(points) > 1:
                found[f"{NOUNS[kind]} kept{kept}"] = (kind, points)
    return dict(sorted(found.items(), key=lambda item: "," in item[0]))


def _panel(title: str, chart: Chart, curves: dict[str, tuple[str, list[Point]]]) -> Panel:
    """The chart of a panel with its curves in pixels, and marks where something was measured if they have room."""
    dots = []
    for line in chart.lines:
        pairs = [pair.split(",") for pair in line.points.split()]
        places = tuple((round(float(x) * WIDTH / 100, 1), round(float(y) * HEIGHT / 100, 1)) for x, y in pairs)
        dots.append(Dots(line.name, COLOURS[curves[line.name][0]], "," in line.name, places))
    counts = sorted({point.kept for _, points in curves.values() for point in points})
    if len(counts) <= _MARKS:
        chart = replace(chart, across=tuple(Tick(100 * count / counts[-1], str(count)) for count in counts))
    return Panel(title, chart, tuple(dots))
