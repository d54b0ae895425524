"""A model run half-step by half-step on all tokens at once, with a say in what each token does.

Beside it a second model may walk, whose tokens all run: what the residual behind a half-step should be.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from momify.model import MomForCausalLM
from momify.model.attention import attention_half
from momify.model.dispatch import make_plan, static_plan
from momify.model.half import Pass, execute, home_update, normalise, patch_update, run_half
from momify.model.layout import HalfStep
from momify.model.picking import Picks
from momify.model.pool import Stack, stack_of

BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Fork:
    """The tokens of a batch before a half-step where they run or skip, or do one of the two: residual and choices."""

    half: HalfStep
    shared: Pass
    x: Tensor  # (n, D)
    x_hat: Tensor  # (n, D)
    features: Tensor | None  # (n, D or I), what enters the home's output projection; None without a home
    goal: Tensor | None  # (n, D), what the half-step should add to reach the other model's residual behind it

    @property
    def home(self) -> Tensor:
        """(n, D), what the home adds, by its output projection as it is now."""
        assert self.features is not None
        return _projection(self.half, self.shared).apply(self.features, self.half.home)

    @property
    def patch(self) -> Tensor:
        """(n, D), what SKIP adds, by the patch as it is now."""
        return patch_update(self.x_hat, self.half, self.shared)

    def take(self, skip: Tensor) -> Tensor:
        """The residual (n, D) behind the half-step where `skip` (n,) says who takes the patch."""
        if self.features is None:
            return self.x + self.patch
        if not self.half.masks_keys:  # the others see the keys of all: nobody's update depends on who runs
            return self.x + torch.where(skip[:, None], self.patch, self.home)
        modules = torch.where(skip, self.half.skip, self.half.home)[:, None]
        picks = Picks(make_plan(modules, None, self.half.skip), modules)
        y, _ = execute(self.x_hat, self.half, picks, self.shared)
        return self.x if y is None else self.x + y


Decide = Callable[[HalfStep, list[Fork]], list[Tensor]]
"""Which tokens skip, (n,) bool for each batch."""
Prepare = Callable[[HalfStep, list[Fork]], None]
"""A look at the tokens before a half-step without a choice, to change what it is about to do."""


@torch.inference_mode()
def walk(
    model: MomForCausalLM,
    tokens: Tensor,
    decide: Decide,
    beside: MomForCausalLM | None = None,
    prepare: Prepare | None = None,
) -> list[Tensor]:
    """The last residuals (n, D), a batch each, of tokens (S, T) that skip where `decide` says so.

    It is asked at the half-steps whose choices are one module and SKIP; the others run as the model has them, after
    `prepare` has seen those that have one choice. `beside`: a model of the same steps, all of whose tokens run; it sets
    the goals.
    """
    ours, other = _Stream(model, tokens), None if beside is None else _Stream(beside, tokens)
    for half in halves(model):
        goals = None if other is None else other.run(half)
        alone = prepare is not None and len(half.reach) == 1 and half.delta is None
        if not half.forks and not alone:
            ours.run(half)
            continue
        forks = ours.forks(half, goals)
        if half.forks:
            skips = decide(half, forks)
        else:
            prepare(half, forks)
            skips = [torch.zeros(len(fork.x), dtype=torch.bool, device=fork.x.device) for fork in forks]
        ours.states = [fork.take(skip) for fork, skip in zip(forks, skips, strict=True)]
    return ours.states


def split(tokens: Tensor) -> tuple[Tensor, ...]:
    """tokens (S, T) as the batches of a walk."""
    return tokens.split(max(1, BATCH_TOKENS // tokens.shape[1]))


def halves(model: MomForCausalLM) -> Iterator[HalfStep]:
    """The half-steps of a model in the order of execution."""
    return (half for step in model.model.steps for half in step)


def home_features(x_hat: Tensor, half: HalfStep, shared: Pass) -> Tensor:
    """What enters the output projection of the home of `half` for x_hat (n, D): values (n, D) or inner (n, I).

    All tokens run; the module is as it is in the pool.
    """
    if half.kind == "ffn":
        return shared.activation(shared.ffn[0].apply(x_hat, half.home))
    width = x_hat.shape[1]
    same = torch.eye(width, dtype=x_hat.dtype, device=x_hat.device).expand(half.skip, width, width)
    scene = replace(shared.scene, out=stack_of(same, x_hat.new_zeros(half.skip, width)))
    values = attention_half(x_hat, half.at_home(), Picks(static_plan(half.home, half.skip, len(x_hat))), scene).output
    assert values is not None
    return values


class _Stream:
    """The residuals of all batches on their way through one model."""

    def __init__(self, model: MomForCausalLM, tokens: Tensor) -> None:
        batches = [model.model.begin(batch) for batch in split(tokens)]
        self.states, self.passes = [x for x, _ in batches], [shared for _, shared in batches]

    def run(self, half: HalfStep) -> list[Tensor]:
        """All tokens through a half-step, at home where they might choose; the residuals behind it."""
        self.states = [_advance(x, half, shared) for x, shared in zip(self.states, self.passes, strict=True)]
        return self.states

    def forks(self, half: HalfStep, goals: list[Tensor] | None) -> list[Fork]:
        """The tokens before a half-step; goals: the residuals that should be behind it."""
        behind = goals or [None] * len(self.states)
        return [_fork(x, half, *rest) for x, *rest in zip(self.states, self.passes, behind, strict=True)]


def _advance(x: Tensor, half: HalfStep, shared: Pass) -> Tensor:
    if half.forks:
        return x + home_update(normalise(x, shared), half, shared)
    y, _ = run_half(x, half, shared)
    return x if y is None else x + y


def _fork(x: Tensor, half: HalfStep, shared: Pass, behind: Tensor | None) -> Fork:
    x_hat = normalise(x, shared)
    features = None if half.home == half.skip else home_features(x_hat, half, shared)
    return Fork(half, shared, x, x_hat, features, None if behind is None else behind - x)


def _projection(half: HalfStep, shared: Pass) -> Stack:
    """The output projections of a kind, as one pass sees them; those of forks have no delta."""
    stack = shared.scene.out if half.kind == "mha" else shared.ffn[1]
    assert isinstance(stack, Stack)
    return stack
