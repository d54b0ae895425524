"""From normalised tokens to a plan: ask the half-step's router, choose, sort by module."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .dispatch import Plan, make_plan, static_plan
from .layout import HalfStep
from .router import StepRouter, choose, router_logits


@dataclass(frozen=True)
class Choosing:
    """How one forward pass chooses: K modules a token, temperature, and the share of tokens that explore."""

    k: int
    tau: float
    explore: float

    @property
    def weighted(self) -> bool:
        """Whether gates differ from 1 and carry a gradient."""
        return self.k > 1 or self.explore > 0


@dataclass(frozen=True)
class Picks:
    """What the tokens of one half-step picked, and the plan to execute it."""

    modules: Tensor  # (n, K), M for SKIP
    gates: Tensor  # (n, K)
    plan: Plan
    logits: Tensor | None  # (n, M+1); None if there is no choice
    weighted: bool


def pick(x_hat: Tensor, half: HalfStep, router: StepRouter | None, choosing: Choosing) -> Picks:
    """Picks of the tokens x_hat (n, D) at `half`; without a router all take the one choice there is."""
    if router is None:
        n = x_hat.shape[0]
        modules = torch.full((n, 1), half.home, dtype=torch.int64, device=x_hat.device)
        gates = torch.ones((n, 1), device=x_hat.device)
        return Picks(modules, gates, static_plan(half.home, half.skip, n), logits=None, weighted=False)
    logits = router_logits(x_hat, router)
    k = min(choosing.k, len(half.reach))
    choice = choose(logits, k, choosing.tau, choosing.explore)
    plan = make_plan(choice.modules, choice.gates if choosing.weighted else None, half.skip)
    return Picks(choice.modules, choice.gates, plan, logits, choosing.weighted)


def module_shares(picks: Picks, skip: int) -> Tensor | None:
    """Gates (n, K) renormalised over the picks other than SKIP, for queries, keys, values; None for all ones.

    A token that picked one module gets exactly 1: its gate cancels, and so does its gradient.
    """
    if not picks.weighted:
        return None
    live = picks.modules != skip
    gates = picks.gates * live
    total = gates.sum(dim=1, keepdim=True).clamp_min(torch.finfo(gates.dtype).tiny)
    alone = live.sum(dim=1, keepdim=True) <= 1
    return torch.where(alone, live.to(gates.dtype), gates / total)


def skip_share(picks: Picks, skip: int) -> Tensor:
    """(n,): the part of a token's gates that lies on SKIP; 1 for a token that skips."""
    return (picks.gates * (picks.modules == skip)).sum(dim=1)
