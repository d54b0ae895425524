"""A model run half-step by half-step on all tokens at once, with a say in what each token does."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from momify.model import MomForCausalLM
from momify.model.dispatch import make_plan
from momify.model.half import Pass, execute, home_update, normalise, patch_update, run_half
from momify.model.layout import HalfStep
from momify.model.picking import Picks

BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Fork:
    """The tokens of a batch before a half-step where they run or skip: residual, and what either would add."""

    half: HalfStep
    shared: Pass
    x: Tensor  # (n, D)
    x_hat: Tensor  # (n, D)
    home: Tensor  # (n, D)

    @property
    def patch(self) -> Tensor:
        """(n, D), by the patch as it is now."""
        return patch_update(self.x_hat, self.half, self.shared)

    def take(self, skip: Tensor) -> Tensor:
        """The residual (n, D) behind the half-step where `skip` (n,) says who takes the patch."""
        if not self.half.masks_keys:  # the others see the keys of all: nobody's update depends on who runs
            return self.x + torch.where(skip[:, None], self.patch, self.home)
        modules = torch.where(skip, self.half.skip, self.half.home)[:, None]
        picks = Picks(make_plan(modules, None, self.half.skip), modules)
        y, _ = execute(self.x_hat, self.half, picks, self.shared)
        return self.x if y is None else self.x + y


Decide = Callable[[HalfStep, list[Fork]], list[Tensor]]
"""Which tokens skip, (n,) bool for each batch."""


@torch.inference_mode()
def walk(model: MomForCausalLM, tokens: Tensor, decide: Decide) -> list[Tensor]:
    """The last residuals (n, D), a batch each, of tokens (S, T) that skip where `decide` says so.

    It is asked at the half-steps whose choices are one module and SKIP; the others run as the model has them.
    """
    batches = [model.model.begin(batch) for batch in split(tokens)]
    states, passes = [x for x, _ in batches], [shared for _, shared in batches]
    for half in halves(model):
        if not half.forks:
            states = [_advance(x, half, shared) for x, shared in zip(states, passes, strict=True)]
            continue
        sights = [_fork(x, half, shared) for x, shared in zip(states, passes, strict=True)]
        states = [fork.take(skip) for fork, skip in zip(sights, decide(half, sights), strict=True)]
    return states


def split(tokens: Tensor) -> tuple[Tensor, ...]:
    """tokens (S, T) as the batches of a walk."""
    return tokens.split(max(1, BATCH_TOKENS // tokens.shape[1]))


def halves(model: MomForCausalLM) -> Iterator[HalfStep]:
    """The half-steps of a model in the order of execution."""
    return (half for step in model.model.steps for half in step)


def _advance(x: Tensor, half: HalfStep, shared: Pass) -> Tensor:
    y, _ = run_half(x, half, shared)
    return x if y is None else x + y


def _fork(x: Tensor, half: HalfStep, shared: Pass) -> Fork:
    x_hat = normalise(x, shared)
    return Fork(half, shared, x, x_hat, home_update(x_hat, half, shared))
