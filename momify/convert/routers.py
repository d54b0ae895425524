"""Routers in closed form: run or patch, token by token, under a budget of MACs (`mom.budget`).

At a half-step that may run its home or skip, a linear map of x_hat predicts the logarithm of what skipping would cost
in nats (`measure/stakes.py`): ridge regression on the model's own residuals, then shifted so that the mean of the
predictions is the mean of what is predicted. Less the logarithm of what skipping saves it becomes the logit of the
home; SKIP's logit is 0. A token skips where that costs less than exp(config.router_threshold) nats for all of the
reachable MACs: one number for all half-steps spends the budget where it matters most, and shifting it afterwards gives
other budgets.

In turns with its router, a half-step is fitted to who takes what. Beside the model walks the one that it was, all of
whose tokens run: the patch is the reduced-rank ridge regression, on the tokens that skip, of what brings their residual
to that one's behind the half-step, and the home's output projection the ridge regression of the same on the tokens that
run. So both make up for what was lost before them, where a patch of its own module would repeat it.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from momify.convert.regression import Moments
from momify.convert.walk import Fork, halves, walk
from momify.errors import MomifyError
from momify.measure.budget import Budget, budget_of, check_share, lift, spend
from momify.measure.stakes import Place, loss_metrics, stakes
from momify.model import MomForCausalLM
from momify.model.config import Kind
from momify.model.layout import HalfStep
from momify.model.pool import StackedLinear

FIT_TOKENS = 32_768
_RIDGE = 1e-3
# ridges: ten times as much made patches and routers no better; for homes 1e-2 lies between what little text and more
# text want (docs/log.md)
_PATCH_RIDGE = 1e-2
_HOME_RIDGE = 1e-2  # towards the module's own weights, if all tokens run
_FEWEST = 0.03  # share of the tokens that must skip, or run, for something to be fitted to them alone
_TURNS = 1  # two end at the same ratio (docs/log.md)
_FITS, _SETTLES = 3, 3  # walks in which routers and patches are fitted, and in which the threshold alone is
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class RouterFit:
    """What came of it on the tokens of the fit: the threshold, the share of the reachable MACs spent, who skips."""

    threshold: float
    share: float
    skipping: dict[Place, float]  # share of the tokens

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        skipping = {f"{kind}/{step}": share for (kind, step), share in self.skipping.items()}
        return {"threshold": self.threshold, "share": self.share, "skipping": skipping}


@dataclass(frozen=True)
class Line:
    """A linear prediction of a logarithm."""

    weight: Tensor  # (D,)
    bias: float

    def __call__(self, x_hat: Tensor) -> Tensor:
        """(n, D) -> (n,)."""
        return x_hat @ self.weight + self.bias


def fit_line(x_hat: Tensor, cost: Tensor, ridge: float = _RIDGE) -> Line:
    """The ridge regression of log cost (n,) on x_hat (n, D), shifted so that the mean of its exponential is the cost's.

    Without the shift a half-step whose costs vary much would look too cheap: exp of a mean is below the mean of exp.
    """
    moments = Moments(x_hat.shape[1], 1, x_hat.device)
    moments.add(x_hat, cost.log()[:, None])
    weight, bias = moments.solve(x_hat.new_zeros(x_hat.shape[1], 1), ridge)
    line = Line(weight[:, 0], float(bias))
    shift = cost.double().mean().log() - line(x_hat).double().exp().mean().log()
    return replace(line, bias=line.bias + float(shift))


def fit_routers(
    model: MomForCausalLM,
    tokens: Tensor,
    share: float,
    seed: int = 0,
    modules: bool = True,
    progress: Progress | None = None,
) -> RouterFit:
    """Fit the routers of `model` in place on tokens (S, T) int64 so that `share` of the reachable MACs is spent.

    Routers are fitted where the choices are home and SKIP; patches, and output projections if `modules`, there and
    where there is no choice. The residuals are those that the model has when it skips, so each walk uses the threshold
    of the one before. Raises MomifyError for a model without such half-steps, and for a budget that skipping cannot
    reach.
    """
    places = [(half.kind, half.step) for half in halves(model) if half.forks]
    if not places:
        raise MomifyError("no half-step chooses between its home and SKIP: convert with mom.reach=skip")
    budget = budget_of(model.config, tokens.shape[1])
    check_share(budget, share, places)
    parts = Parts(model, twin(model), modules)
    fitting = _Fitting(parts, loss_metrics(model, tokens, seed), budget)
    goal = budget.full - share
    for number in range(_FITS + _SETTLES):
        fitting.scores = {}
        if number < _FITS:
            walk(model, tokens, fitting.fit, parts.before, parts.fit_fixed)
        else:
            walk(model, tokens, fitting.judge)
        fitting.settle(goal)
        if progress is not None:
            progress(number + 1, _FITS + _SETTLES)
    write_routers(model, fitting.lines, fitting.threshold)
    fitting.scores = {}
    walk(model, tokens, fitting.judge)
    skipping = fitting.skipping()
    return RouterFit(fitting.threshold, budget.spent(skipping), skipping)


def twin(model: MomForCausalLM) -> MomForCausalLM:
    """The model as it is now: what a fit changes is copied, output projections and patches, the rest is shared."""
    body = model.model
    changing = (body.mha.out, body.ffn.down, body.mha_patch, body.ffn_patch)
    own = {id(parameter) for part in changing if part is not None for parameter in part.parameters()}
    return copy.deepcopy(model, {id(one): one for one in model.parameters() if id(one) not in own})


@dataclass(frozen=True)
class Parts:
    """What is fitted in place to who takes it: patches, and output projections where `modules` says so."""

    model: MomForCausalLM
    before: MomForCausalLM  # as it was
    modules: bool = True

    def fit(self, half: HalfStep, sights: list[Fork], skips: list[Tensor]) -> None:
        """Fit a half-step's patch to the tokens of `skips` and its home to the others, where they are enough."""
        skipping = sum(int(skip.sum()) for skip in skips) / sum(map(len, skips))
        if skipping >= _FEWEST:
            fit_patch(self.model, half, sights, skips)
        if 1 - skipping >= _FEWEST and self._refits(half):
            self._fit_home(half, sights, skips)

    def fit_fixed(self, half: HalfStep, sights: list[Fork]) -> None:
        """Fit what a half-step without a choice does to all of its tokens."""
        runs = half.home != half.skip
        self.fit(half, sights, [torch.full((len(fork.x),), not runs, device=fork.x.device) for fork in sights])

    def _refits(self, half: HalfStep) -> bool:
        """Whether no other half-step can run the home of this one, which has one."""
        reach = self.model.config.reach(half.kind)
        return self.modules and half.home != half.skip and sum(half.home in choices for choices in reach) == 1

    @torch.no_grad()
    def _fit_home(self, half: HalfStep, sights: list[Fork], skips: list[Tensor]) -> None:
        now, before = (output_projection(one, half.kind) for one in (self.model, self.before))
        moments = Moments(*now.weight.shape[1:], now.weight.device)
        for fork, skip in zip(sights, skips, strict=True):
            moments.add(fork.features[~skip], fork.goal[~skip])
        # few tokens, little change: the pull towards the own weights is as strong as if all ran
        ridge = _HOME_RIDGE * sum(map(len, skips)) / moments.rows
        now.weight[half.home], now.bias[half.home] = moments.solve(before.weight[half.home], ridge)


def output_projection(model: MomForCausalLM, kind: Kind) -> StackedLinear:
    """The output projections of a kind's modules."""
    return model.model.mha.out if kind == "mha" else model.model.ffn.down


class _Fitting:
    """The routers so far, and what they said in the last walk."""

    def __init__(self, parts: Parts, metrics: dict[Place, Tensor], budget: Budget) -> None:
        self.parts, self.metrics, self.budget = parts, metrics, budget
        self.threshold = -math.inf
        self.lines: dict[Place, Line] = {}
        self.scores: dict[Place, Tensor] = {}

    def fit(self, half: HalfStep, sights: list[Fork]) -> list[Tensor]:
        """Fit patch, home and router of a half-step to what is before it, in turns, then choose by it."""
        fit_patch(self.parts.model, half, sights, everyone(sights))
        self._fit_line(half, sights)
        skips = self.judge(half, sights)
        for _ in range(_TURNS):
            self.parts.fit(half, sights, skips)
            self._fit_line(half, sights)
            skips = self.judge(half, sights)
        return skips

    def _fit_line(self, half: HalfStep, sights: list[Fork]) -> None:
        place = half.kind, half.step
        x_hat = torch.cat([fork.x_hat for fork in sights])
        cost = torch.cat([stakes(fork.patch - fork.home, fork.x, self.metrics[place]) for fork in sights])
        line = fit_line(x_hat, cost)
        self.lines[place] = replace(line, bias=line.bias - math.log(self.budget.savings[half.kind]))

    def judge(self, half: HalfStep, sights: list[Fork]) -> list[Tensor]:
        """Choose by the router as it is."""
        place = half.kind, half.step
        scores = [self.lines[place](fork.x_hat) for fork in sights]
        self.scores[place] = torch.cat(scores)
        return [one < self.threshold for one in scores]

    def settle(self, goal: float) -> None:
        """The threshold that saves the goal by the last walk's scores; half-steps below their floor are lifted."""
        savings = [self.budget.savings[kind] for kind, _ in self.scores]
        self.threshold = spend(list(self.scores.values()), savings, goal)
        for place, scores in self.scores.items():
            line = self.lines[place]
            self.lines[place] = replace(line, bias=line.bias + lift(scores, self.threshold))

    def skipping(self) -> dict[Place, float]:
        """The share of the tokens that skips, by half-step, in the last walk."""
        return {place: float((scores < self.threshold).float().mean()) for place, scores in self.scores.items()}


def everyone(sights: list[Fork]) -> list[Tensor]:
    """All tokens, (n,) bool for each batch."""
    return [torch.ones(len(fork.x), dtype=torch.bool, device=fork.x.device) for fork in sights]


@torch.no_grad()
def fit_patch(model: MomForCausalLM, half: HalfStep, sights: list[Fork], skips: list[Tensor]) -> None:
    """Fit the half-step's patch, where it has one, to the tokens of `skips`, in place.

    To their goals, or to what the home adds where there are none.
    """
    if half.patch is None:
        return
    patches, width = model.model.mha_patch if half.kind == "mha" else model.model.ffn_patch, model.config.hidden_size
    moments = Moments(width, width, patches.bias.device)
    for fork, skip in zip(sights, skips, strict=True):
        moments.add(fork.x_hat[skip], (fork.home if fork.goal is None else fork.goal)[skip])
    nothing = patches.bias.new_zeros(width, width)
    fitted = moments.solve_low_rank(nothing, nothing, model.config.patch_rank, _PATCH_RIDGE)
    for name in ("weight_in", "weight_out", "bias"):
        getattr(patches, name)[half.patch] = getattr(fitted, name)


@torch.no_grad()
def write_routers(model: MomForCausalLM, lines: dict[Place, Line], threshold: float) -> None:
    """Give a model these predictions as the logits of its homes, 0 for SKIP, and the threshold."""
    for (kind, step), line in lines.items():
        router = model.model.mha_router if kind == "mha" else model.model.ffn_router
        row, home = model.config.routed(kind).index(step), model.config.homes(kind)[step]
        assert router.w_in is None, "conversion makes linear routers"
        router.weight[row], router.bias[row] = 0.0, 0.0
        router.weight[row, :, home], router.bias[row, home] = line.weight, line.bias
    model.config.router_threshold = threshold
