"""What routed tokens may spend: a model's reachable MACs, what skipping saves of them, and thresholds for a budget."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from momify.errors import MomifyError
from momify.measure.cost import HalfStep, Kind, mom_macs, planned_usage, shape_of
from momify.model import MomConfig

FLOOR = 0.05
"""The share of the tokens that a half-step keeps, so that SKIP never swallows it."""


@dataclass(frozen=True)
class Budget:
    """Shares of the reachable MACs: those of the half-steps, head and routers left out, if every token goes home."""

    full: float  # what is spent when nobody skips: 1 and the routers
    savings: Mapping[Kind, float]  # by kind, what it saves if every token skips one half-step

    def spent(self, skipping: Mapping[tuple[Kind, int], float]) -> float:
        """The share that is spent where these shares of the tokens skip, by routed half-step."""
        return self.full - sum(self.savings[kind] * share for (kind, _), share in skipping.items())


def budget_of(config: MomConfig, block: int) -> Budget:
    """The budget of a MoM on sequences of `block` tokens.

    A token that skips saves its module and pays for its patch; for attention its key and value are paid for where they
    are kept, and the core is, since the others need it.
    """
    planned = mom_macs(config, 1, block, planned_usage(config, 1, block))
    reachable = planned.total - planned.head - planned.routers
    savings = {kind: _saving(config, kind, block) / reachable for kind in ("mha", "ffn") if config.routed(kind)}
    return Budget(1 + planned.routers / reachable, savings)


def _saving(config: MomConfig, kind: Kind, block: int) -> float:
    """MACs that a block saves if all of its tokens skip one routed half-step of a kind."""
    step, kept = config.routed(kind)[0], kind == "mha" and config.skipped_keys == "home"
    patched = shape_of(config).patched(kind, step)
    runs = HalfStep(step, kind, rows=block)
    skips = HalfStep(step, kind, rows=0, kept=block if kept else 0, skipped=block if patched else 0)
    return mom_macs(config, 1, block, [runs]).total - mom_macs(config, 1, block, [skips]).total


def check_budget(config: MomConfig, block: int, share: float) -> None:
    """As `check_share`, for a model all of whose half-steps with a choice may skip."""
    places = [(kind, step) for kind in ("mha", "ffn") for step in config.routed(kind)]
    check_share(budget_of(config, block), share, places)


def check_share(budget: Budget, share: float, places: Sequence[tuple[Kind, int]], floor: float = FLOOR) -> None:
    """Raise MomifyError for a share of the reachable MACs that skipping cannot reach, down to the floor, and where it
    saves nothing."""
    check_savings(budget)
    least = budget.spent(dict.fromkeys(places, 1 - floor))
    if not least <= share:
        raise MomifyError(
            f"budget {share:g} of the reachable MACs is out of reach: with every routed half-step kept for {floor:.0%} "
            f"of the tokens {least:.3f} are spent; use at least that, or a smaller pool"
        )


def check_savings(budget: Budget) -> None:
    """Raise MomifyError where a token that skips saves nothing, as its patch costs what the module does."""
    for kind, saving in budget.savings.items():
        if saving <= 0:
            raise MomifyError(
                f"a token that skips {'attention' if kind == 'mha' else 'feed-forward'} saves no MACs, as its patch "
                "costs as much; lower mom.patch_rank"
            )


def spend(scores: Sequence[Tensor], savings: Sequence[float], goal: float, floor: float = FLOOR) -> float:
    """The threshold below which scores skip so that the goal is saved, to the token: one fewer would not do.

    scores: (n,) of each half-step, what running is worth; savings: what each half-step saves if all its tokens skip.
    The floor's share of a half-step's tokens, those of the highest scores, never skip. Below all scores for nothing to
    save, above all that may skip where the goal is out of reach.
    """
    if goal <= 0:
        return min(float(one.min()) for one in scores) - 1.0
    allowed = [one.double().sort().values[: len(one) - kept_tokens(len(one), floor)] for one in scores]
    flat = torch.cat(allowed)
    gains = torch.cat([torch.full_like(a, s / len(one)) for a, s, one in zip(allowed, savings, scores, strict=True)])
    flat, order = flat.sort(stable=True)
    place = int(torch.searchsorted(gains[order].cumsum(0), goal - 1e-12))
    if place >= len(flat):
        return float(flat[-1]) + 1.0
    above = flat[place + 1 :]
    higher = above[above > flat[place]]  # scores that are equal skip together
    return float((flat[place] + higher[0]) / 2) if len(higher) else float(flat[place]) + 1.0


def kept_tokens(tokens: int, floor: float) -> int:
    """How many of `tokens` a half-step keeps at least."""
    return -int(-tokens * floor // 1)


def lift(scores: Tensor, threshold: float, floor: float = FLOOR) -> float:
    """What must be added to a half-step's scores (n,) so that at most 1 - floor of them lie below the threshold."""
    kept = kept_tokens(len(scores), floor)
    if not kept:
        return 0.0
    lowest_kept = float(scores.double().topk(kept).values[-1])
    return max(0.0, threshold - lowest_kept)
