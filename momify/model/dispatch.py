"""Routed execution: tokens grouped by module, each group through its own. The reference for later kernels."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .pool import Stack


@dataclass(frozen=True)
class Plan:
    """Which rows go through which module, SKIPs left out.

    Routed: `tokens` holds the rows sorted by module, `sizes[i]` of them for module i. One module for all
    rows: `module` is set and nothing is gathered.
    """

    sizes: tuple[int, ...]  # M: rows per module, on the host
    counts: Tensor | None = None  # (M,) int64: the same on the device; None if `module` is set
    tokens: Tensor | None = None  # (m,) int64; None if `module` is set
    gates: Tensor | None = None  # (m,) factor of each row; None for all ones
    picks: Tensor | None = None  # (m,) int64: where each row stands in the flattened (n, K) choices
    module: int | None = None

    @property
    def rows(self) -> int:
        """m: module applications in this plan."""
        return sum(self.sizes)

    def weighted(self, gates: Tensor | None) -> "Plan":
        """The same plan with other gates (n, K), or None for all ones."""
        if gates is None or self.picks is None:
            return replace(self, gates=None if gates is None else gates.reshape(-1))
        return replace(self, gates=gates.reshape(-1).index_select(0, self.picks))


def static_plan(module: int, num_modules: int, rows: int) -> Plan:
    """All rows through `module`."""
    return Plan(tuple(int(rows) if index == module else 0 for index in range(num_modules)), module=module)


def subset_plan(module: int, num_modules: int, tokens: Tensor, gates: Tensor | None = None) -> Plan:
    """The rows `tokens` (m,) through `module`, with gates (m,) or None for ones."""
    sizes = static_plan(module, num_modules, tokens.shape[0]).sizes
    return Plan(sizes, tokens=tokens, gates=gates)


def make_plan(modules: Tensor, gates: Tensor | None, num_modules: int) -> Plan:
    """Sort the picks `modules` (n, K) by module, num_modules being SKIP; gates (n, K), None for ones.

    The sizes are the one thing that the host has to wait for, once a plan.
    """
    n, k = modules.shape
    flat = modules.reshape(-1)
    counts = torch.bincount(flat, minlength=num_modules + 1)[:num_modules]
    sizes = tuple(counts.tolist())
    if k == 1 and n and max(sizes) == n:  # all tokens agree, as they do at the start: nothing to gather
        return Plan(sizes, module=sizes.index(n)).weighted(gates)
    picks = torch.argsort(flat, stable=True)[: sum(sizes)]  # SKIP, the largest index, is sorted to the end
    return Plan(sizes, counts, tokens=picks // k, picks=picks).weighted(gates)


def routed(
    x: Tensor, plan: Plan, layers: Sequence[Stack], activation: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Sum over each token's picks of gate * chain(x): x (n, D) -> (n, E), zero for tokens without a pick.

    The chain is one stacked matrix, or two with the activation between. Groups are added one after the other,
    so the result does not depend on the order in which a device happens to add.
    """
    if plan.module is not None:
        return _weigh(_chain(x, plan.module, layers, activation), plan.gates)
    rows = x.index_select(0, plan.tokens)  # (m, D)
    out = None
    gates = [None] * len(plan.sizes) if plan.gates is None else plan.gates.split(plan.sizes)
    groups = zip(rows.split(plan.sizes), plan.tokens.split(plan.sizes), gates, strict=True)
    for module, (group, tokens, gate) in enumerate(groups):
        if plan.sizes[module]:
            y = _weigh(_chain(group, module, layers, activation), gate)
            out = y.new_zeros(x.shape[0], y.shape[1]) if out is None else out
            out.index_add_(0, tokens, y)
    return x.new_zeros(x.shape[0], layers[-1].out_features) if out is None else out


def _chain(x: Tensor, module: int, layers: Sequence[Stack], activation: Callable[[Tensor], Tensor] | None) -> Tensor:
    """Rows x (m, D) through one module: (m, E)."""
    y = layers[0].apply(x, module)
    for layer in layers[1:]:
        y = layer.apply(y if activation is None else activation(y), module)
    return y


def _weigh(y: Tensor, gates: Tensor | None) -> Tensor:
    return y if gates is None else y * gates.unsqueeze(1).to(y.dtype)
