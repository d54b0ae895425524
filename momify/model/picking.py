"""From normalised tokens to a plan: ask the half-step's router, choose, sort by module."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .dispatch import Backend
from .layout import HalfStep
from .plan import Plan, make_plan, static_plan
from .router import StepRouter, choose, router_logits


@dataclass(frozen=True)
class Choosing:
    """How one forward pass chooses: K modules a token, temperature, share of tokens that explore; who executes."""

    k: int
    tau: float
    explore: float
    backend: Backend

    @property
    def weighted(self) -> bool:
        """Whether gates differ from 1 and carry a gradient."""
        return self.k > 1 or self.explore > 0


@dataclass(frozen=True)
class Picks:
    """What the tokens of one half-step picked, and the plan to execute it."""

    plan: Plan
    modules: Tensor | None = None  # (n, K), M for SKIP; None where there is one choice, the home
    gates: Tensor | None = None  # (n, K); None for all ones
    logits: Tensor | None = None  # (n, M+1); None if there is no choice
    scores: Tensor | None = None  # (n, K), of which gates are the softmax; None for K = 1

    def key_modules(self, half: HalfStep) -> Tensor:
        """(n, K): whose key and value each pick takes; the home's for the part of a token that lies on SKIP.

        A SKIP without any share, which goes with tokens that do not explore, stays SKIP.
        """
        skips = self.modules == half.skip
        if self.gates is not None:
            skips = skips & (self.gates > 0)
        return self.modules.masked_fill(skips, half.key_home)


def pick(x_hat: Tensor, half: HalfStep, router: StepRouter | None, choosing: Choosing) -> Picks:
    """Picks of the tokens x_hat (n, D) at `half`; without a router all take the one choice there is."""
    if router is None:
        return Picks(static_plan(half.home, half.skip, x_hat.shape[0]))
    logits = router_logits(x_hat, router)
    wait = choosing.backend.wait
    if not choosing.weighted:
        modules = logits.argmax(dim=1, keepdim=True)  # K = 1: the gate is the constant 1
        return Picks(make_plan(modules, None, half.skip, wait), modules, None, logits)
    choice = choose(logits, min(choosing.k, len(half.reach)), choosing.tau, choosing.explore)
    plan = make_plan(choice.modules, choice.gates, half.skip, wait)
    scores = None if choosing.explore else logits.gather(1, choice.modules) / choosing.tau
    return Picks(plan, choice.modules, choice.gates, logits, scores)


def module_shares(picks: Picks, skip: int) -> Tensor | None:
    """Gates (n, K) renormalised over the picks other than SKIP, for queries, keys, values; None for all ones.

    A token that picked one module gets exactly 1: its gate cancels, and so does its gradient.
    """
    if picks.gates is None:
        return None
    live = picks.modules != skip
    shares = picks.gates  # two that explore are 1 together
    if picks.scores is not None:  # gates beside a far likelier SKIP may be 0, all of them: nothing to divide by
        shares = torch.softmax(picks.scores.masked_fill(~live, torch.finfo(picks.scores.dtype).min), dim=1)
    alone = live.sum(dim=1, keepdim=True) <= 1
    return torch.where(alone, live.to(shares.dtype), shares)
