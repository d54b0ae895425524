"""Which kind of module is more redundant: the loss that removing the same amount of each adds (the paper's question).

Attention and feed-forward modules differ in size and cost, so "the same amount" is asked three times: modules,
parameters, MACs. Between cells that were trained the added loss is taken to run straight.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

import numpy as np

from momify.convert.homes import KINDS, NOUNS
from momify.sweep.cells import Scored

MEASURES: dict[str, Callable[[Scored], int]] = {
    "modules": lambda row: row.mha + row.ffn,
    "parameters": lambda row: row.parameters,
    "MACs": lambda row: row.macs,
}


@dataclass(frozen=True)
class Point:
    """A pool of a curve, means over its seeds: modules kept of the kind, and what it has against the whole pool."""

    kept: int
    row: Scored  # of the first seed; what a cell costs does not depend on it
    loss_before: float
    loss_after: float
    added: float  # loss_after over the whole pool's, trained on as much
    spread: float  # standard deviation of loss_after over the seeds; 0 for one


@dataclass(frozen=True)
class Finding:
    """What removing `amount` of a measure adds to the loss, by kind."""

    measure: str
    amount: float
    added: dict[str, float]
    spread: float

    @property
    def more_redundant(self) -> str | None:
        """The kind that adds less; None where they differ by less than twice the spread over seeds."""
        first, second = KINDS
        if abs(self.added[first] - self.added[second]) <= 2 * self.spread:
            return None
        return min(KINDS, key=self.added.__getitem__)


def curve(rows: Sequence[Scored], kind: str, layers: int, others: int | None = None) -> list[Point]:
    """The pools in which `kind` varies and `others` modules of the other kind stay (None: all), fewest first."""
    other = next(name for name in KINDS if name != kind)
    wanted = layers if others is None else others
    pools: dict[int, list[Scored]] = {}
    for row in rows:
        if row.kept(other) == wanted:
            pools.setdefault(row.kept(kind), []).append(row)
    whole = mean(row.loss_after for row in rows if row.mha == row.ffn == layers)
    return [_point(kept, pools[kept], whole) for kept in sorted(pools)]


def _point(kept: int, seeds: list[Scored], whole: float) -> Point:
    after = [row.loss_after for row in seeds]
    return Point(
        kept=kept,
        row=seeds[0],
        loss_before=mean(row.loss_before for row in seeds),
        loss_after=mean(after),
        added=mean(after) - whole,
        spread=stdev(after) if len(after) > 1 else 0.0,
    )


def compare(rows: Sequence[Scored], layers: int) -> list[Finding]:
    """One finding a measure, at the largest amount that was removed of both kinds; none where only one kind varies."""
    curves = {kind: curve(rows, kind, layers) for kind in KINDS}
    if any(len(points) < 2 for points in curves.values()):
        return []
    spread = max(point.spread for points in curves.values() for point in points)
    found = []
    for measure, size in MEASURES.items():
        removed = {kind: [size(points[-1].row) - size(point.row) for point in reversed(points)]
                   for kind, points in curves.items()}  # fmt: skip
        amount = min(amounts[-1] for amounts in removed.values())
        added = {kind: float(np.interp(amount, removed[kind], [point.added for point in reversed(points)]))
                 for kind, points in curves.items()}  # fmt: skip
        found.append(Finding(measure, amount, added, spread))
    return found


def sentence(finding: Finding) -> str:
    """A finding in words."""
    amount, per = _amount(finding.measure, finding.amount)
    parts = [f"{NOUNS[kind]} adds {added:+.4f} nats ({added / per[0]:+.4f} {per[1]})"
             for kind, added in finding.added.items()]  # fmt: skip
    return f"{amount} removed: {', '.join(parts)}; {_verdict(finding)}"


def _verdict(finding: Finding) -> str:
    kind = finding.more_redundant
    if kind is None:
        return f"no difference beyond the spread over seeds ({finding.spread:.4f})"
    if finding.measure != "modules":
        return f"{NOUNS[kind]} is the cheaper to remove"
    paper = "as the paper finds" if kind == "mha" else "unlike the paper's finding"
    return f"{NOUNS[kind]} modules are more redundant, {paper}"


def _amount(measure: str, amount: float) -> tuple[str, tuple[float, str]]:
    """The amount in words, and the unit that one is told per."""
    if measure == "modules":
        return f"{amount:.0f} module{'s' if amount > 1 else ''}", (amount, "a module")
    return f"{amount / 1e6:,.3g} M {measure}", (amount / 1e6, "per M")
