"""Which rows go through which module: the picks sorted by module, SKIPs left out."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

FEW = 64
"""Up to so many picks are sorted by Python, which takes less time than a handful of operators."""


@dataclass(frozen=True)
class Plan:
    """Rows sorted by module, with where they came from and where they go.

    Three kinds. One module for all rows: `module` is set and nothing is gathered. Sizes known on the host: `sizes`
    is set, and there are as many rows as picks other than SKIP. Sizes known on the device only, so that the host
    need not wait for it: `ends` is set, and the picks that are SKIP are rows too, after all others.
    """

    width: int = 1
    """K: picks a token."""
    sizes: tuple[int, ...] | None = None  # M: rows per module
    ends: Tensor | None = None  # (M,) int32: where each module's rows end
    tokens: Tensor | None = None  # (m,) int64: token of each row; None if `module` is set
    picks: Tensor | None = None  # (m,) int64: where each row stands in the flattened (n, K) choices
    gates: Tensor | None = None  # (m,) factor of each row; None for all ones
    module: int | None = None

    @property
    def rows(self) -> int:
        """m: module applications, SKIPs left out. A plan of the device kind waits for the device here."""
        return int(self.ends[-1]) if self.sizes is None else sum(self.sizes)

    @property
    def idle(self) -> bool:
        """Whether all picks are SKIP, as far as the host knows without waiting."""
        return self.sizes is not None and not any(self.sizes)

    def weighted(self, gates: Tensor | None) -> "Plan":
        """The same plan with other gates (n, K), or None for all ones."""
        if gates is None:
            return self if self.gates is None else replace(self, gates=None)
        flat = gates.reshape(-1)
        return replace(self, gates=flat if self.picks is None else flat.index_select(0, self.picks))


def static_plan(module: int, num_modules: int, rows: int) -> Plan:
    """All rows through `module`; none through any where it is SKIP."""
    return Plan(sizes=tuple(int(rows) if index == module else 0 for index in range(num_modules)), module=module)


def make_plan(modules: Tensor, gates: Tensor | None, num_modules: int, wait: bool = True) -> Plan:
    """Sort the picks `modules` (n, K) by module, num_modules being SKIP; gates (n, K), None for ones.

    With `wait` the host learns the sizes, which a GPU makes it wait for, once a plan.
    """
    n, k = modules.shape
    flat = modules.reshape(-1)
    if not wait:
        return _device_plan(flat, k, num_modules).weighted(gates)
    if n * k <= FEW:
        return _few_plan(flat, n, k, num_modules).weighted(gates)
    sizes = tuple(torch.bincount(flat, minlength=num_modules + 1)[:num_modules].tolist())
    if k == 1 and max(sizes) == n:  # all tokens agree, as they do at the start: nothing to gather
        return Plan(sizes=sizes, module=sizes.index(n)).weighted(gates)
    picks = torch.argsort(flat, stable=True)[: sum(sizes)]  # SKIP, the largest index, is sorted to the end
    return Plan(k, sizes, tokens=picks if k == 1 else picks // k, picks=picks).weighted(gates)


def _few_plan(flat: Tensor, n: int, k: int, num_modules: int) -> Plan:
    """The plan of a handful of picks (n*K,), sorted on the host."""
    chosen = flat.tolist()
    first = chosen[0] if chosen else num_modules
    if k == 1 and first != num_modules and chosen.count(first) == n:
        return static_plan(first, num_modules, n)
    order = sorted((at for at, module in enumerate(chosen) if module != num_modules), key=chosen.__getitem__)
    sizes = [0] * num_modules
    for at in order:
        sizes[chosen[at]] += 1
    picks = torch.tensor(order, dtype=torch.int64, device=flat.device)
    return Plan(k, tuple(sizes), tokens=picks if k == 1 else picks // k, picks=picks)


def _device_plan(flat: Tensor, k: int, num_modules: int) -> Plan:
    """The plan of picks (n*K,) without a word to the host (bincount would wait for its largest entry)."""
    ordered, picks = flat.sort(stable=True)
    modules = torch.arange(num_modules, device=flat.device, dtype=flat.dtype)
    ends = torch.searchsorted(ordered, modules, right=True, out_int32=True)
    return Plan(k, ends=ends, tokens=picks if k == 1 else picks // k, picks=picks)
