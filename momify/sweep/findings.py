"""Which kind of module is more redundant: the loss that removing the same amount of each adds (the paper's question).

Attention and feed-forward modules differ in size and cost, so "the same amount" is asked three times: modules,
parameters, MACs. Between cells that were trained the loss is taken to run straight. Whether two kinds differ is told
by the rule of evaluate/compare.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean

import numpy as np

from momify.convert.homes import KINDS, NOUNS
from momify.evaluate.compare import EXCEEDS, WITHIN, spread
from momify.evaluate.compare import compare as compare_seeds
from momify.sweep.cells import Scored

MEASURES: dict[str, Callable[[Scored], int]] = {
    "modules": lambda row: row.mha + row.ffn,
    "parameters": lambda row: row.parameters,
    "MACs": lambda row: row.macs,
}
_NOT_FINITE = {"standard_error": None, "verdict": "a loss is not finite"}


@dataclass(frozen=True)
class Point:
    """A pool of a curve, means over its seeds: modules kept of the kind, and what it has against the whole pool."""

    kept: int
    row: Scored  # of the first seed; what a cell costs does not depend on it
    loss_before: float
    loss_after: float
    added: float  # loss_after over the whole pool's, trained on as much


@dataclass(frozen=True)
class Finding:
    """What removing `amount` of a measure adds to the loss, by kind."""

    measure: str
    amount: float
    added: dict[str, float]
    standard_error: float | None
    """Of the difference between the kinds, over seeds; None for one seed."""
    verdict: str

    @property
    def more_redundant(self) -> str | None:
        """The kind that adds less; None unless they differ by more than the spread over seeds."""
        return min(KINDS, key=self.added.__getitem__) if self.verdict == EXCEEDS else None


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
    after = mean(row.loss_after for row in seeds)
    before = mean(row.loss_before for row in seeds)
    return Point(kept=kept, row=seeds[0], loss_before=before, loss_after=after, added=after - whole)


def compare(rows: Sequence[Scored], layers: int) -> list[Finding]:
    """One finding a measure, at the largest amount that was removed of both kinds; none where only one kind varies.

    Of a sweep that is not finished, the seeds that have been through every pool so far.
    """
    rows = _of_whole_seeds([row for row in rows if layers in (row.mha, row.ffn)])
    curves = {kind: curve(rows, kind, layers) for kind in KINDS}
    if any(len(points) < 2 for points in curves.values()):
        return []
    seeds = [[row for row in rows if row.seed == seed] for seed in sorted({row.seed for row in rows})]
    found = []
    for measure, size in MEASURES.items():
        removed = {kind: [size(points[-1].row) - size(point.row) for point in reversed(points)]
                   for kind, points in curves.items()}  # fmt: skip
        amount = min(amounts[-1] for amounts in removed.values())
        losses = {kind: [_loss(curve(one, kind, layers), removed[kind], amount) for one in seeds] for kind in KINDS}
        added = {kind: mean(losses[kind]) - curves[kind][-1].loss_after for kind in KINDS}
        first, second = (spread(losses[kind]) for kind in KINDS)
        told = compare_seeds(first, second) if first and second else _NOT_FINITE
        found.append(Finding(measure, amount, added, told["standard_error"], told["verdict"]))
    return found


def _of_whole_seeds(rows: Sequence[Scored]) -> list[Scored]:
    """The rows of those seeds that every pool has."""
    pools: dict[tuple[int, int], set[int]] = {}
    for row in rows:
        pools.setdefault((row.mha, row.ffn), set()).add(row.seed)
    seeds = set.intersection(*pools.values())
    return [row for row in rows if row.seed in seeds]


def _loss(points: list[Point], removed: list[int], amount: float) -> float:
    """The trained loss with `amount` removed, on a curve at the amounts `removed`, the whole pool's 0 first."""
    return float(np.interp(amount, removed, [point.loss_after for point in reversed(points)]))


def sentence(finding: Finding) -> str:
    """A finding in words."""
    amount, per = _amount(finding.measure, finding.amount)
    parts = [f"{NOUNS[kind]} adds {added:+.4f} nats ({added / per[0]:+.4f} {per[1]})"
             for kind, added in finding.added.items()]  # fmt: skip
    return f"{amount} removed: {', '.join(parts)}; {_verdict(finding)}"


def _verdict(finding: Finding) -> str:
    kind = finding.more_redundant
    if finding.verdict == WITHIN:
        return f"no difference beyond the spread over seeds (2 standard errors: {2 * finding.standard_error:.4f})"
    if kind is None:
        return finding.verdict
    if finding.measure != "modules":
        return f"{NOUNS[kind]} is the cheaper to remove"
    paper = "as the paper finds" if kind == "mha" else "unlike the paper's finding"
    return f"{NOUNS[kind]} modules are more redundant, {paper}"


def _amount(measure: str, amount: float) -> tuple[str, tuple[float, str]]:
    """The amount in words, and the unit that one is told per."""
    if measure == "modules":
        return f"{amount:.0f} module{'s' if amount > 1 else ''}", (amount, "a module")
    return f"{amount / 1e6:,.3g} M {measure}", (amount / 1e6, "per M")
