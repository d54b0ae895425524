"""Routers learn what skipping costs, while everything else learns (`train.supervise`).

On a sample of half-steps both choices are computed for all tokens, without a gradient, and the router is told what
the patch in the module's place would have cost (`measure/stakes.py`). Only routers learn from it: what they read is
detached.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from momify.measure.stakes import Place, stakes
from momify.model.config import Kind
from momify.model.half import Sight, home_update, patch_update
from momify.model.router import router_logits

SAMPLE = 0.125
"""The share of the half-steps that a forward pass looks at."""
_MOST = math.log(8.0)  # a cost counts up to 8 times what was expected; beyond, its pull grows no more


def expectation_loss(said: Tensor, cost: Tensor) -> Tensor:
    """Mean of c / m - log(c / m) - 1, m = exp(said), for said and log costs (n,): least where m is the mean of c.

    The divergence of Itakura and Saito, which is the likelihood of a gamma distribution; linear beyond c = 8 m.
    """
    z = cost - said
    ratio = torch.where(z < _MOST, z.clamp_max(_MOST).exp(), math.exp(_MOST) * (1 + z - _MOST))
    return (ratio - z - 1).mean()


class Supervision:
    """What routers are told: the metric of each half-step's cost, and what skipping saves."""

    def __init__(self, metrics: Mapping[Place, Tensor], savings: Mapping[Kind, float]) -> None:
        self.metrics, self.savings = metrics, savings

    def draw(self) -> "Lesson":
        """The half-steps of one forward pass, by torch's generator."""
        places = list(self.metrics)
        count = max(1, round(SAMPLE * len(places)))
        return Lesson(self, {places[index] for index in torch.randperm(len(places))[:count].tolist()})


class Lesson:
    """An observer of one forward pass. Checkpointed steps are shown twice: the second time replaces the first."""

    def __init__(self, about: Supervision, places: set[Place]) -> None:
        self.about, self.places = about, places
        self._losses: dict[Place, Tensor] = {}
        self._untouched: dict[Place, Tensor] = {}

    def __call__(self, sight: Sight) -> None:
        """Compare what the router says with what it would cost, at the half-steps drawn that have one."""
        if sight.router is None:
            return
        place = sight.half.kind, sight.half.step
        if place in self.places:
            self._losses[place] = self._compare(place, sight)
        else:  # several processes wait for a gradient of each router, be it zero
            self._untouched[place] = 0.0 * (sight.router.weight.sum() + sight.router.bias.sum())

    def loss(self) -> Tensor:
        """Mean over the half-steps drawn, ()."""
        return torch.stack(list(self._losses.values())).mean() + sum(self._untouched.values())

    def _compare(self, place: Place, sight: Sight) -> Tensor:
        with torch.no_grad():
            change = patch_update(sight.x_hat, sight.half, sight.shared) - home_update(
                sight.x_hat, sight.half, sight.shared
            )
            cost = stakes(change.float(), sight.x.float(), self.about.metrics[place].to(change.device)).log()
        said = router_logits(sight.x_hat.detach(), sight.router)[:, sight.half.home]
        return expectation_loss(said, cost - math.log(self.about.savings[sight.half.kind]))
