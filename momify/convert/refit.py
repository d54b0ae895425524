"""What stays makes up for what goes, in closed form: output projections refitted to the source's own residual.

When half-layers are left out, the ones behind them read a residual that they were not trained on. Walking through the
network once, each kept module's output projection (attention's out, feed-forward's down) is set to the ridge regression
from its own features, as they are in the compressed model, to what brings the residual to the source's at that depth.
Nothing is added: same parameters, same MACs. The ridge pulls towards the original weights: little text, little change.
"""

from dataclasses import dataclass, replace

import torch
from scipy.linalg import lu_factor, lu_solve
from torch import Tensor

from momify.convert.homes import HomePlan
from momify.convert.importance import KINDS, Progress
from momify.convert.layers import Layers
from momify.convert.network import Network, embed, half_layer_features, output_projection

BATCH_TOKENS = 4096  # features of so many tokens at once, fewer where they are wide
FEATURE_VALUES = 1 << 23  # 32 MB in float32
RESIDUAL_BYTES = 400 << 20  # the source's and ours, all tokens
_ROWS = 1024  # of a moment matrix, summed at once


@dataclass(frozen=True)
class Half:
    """One half-step of the plan: the source half-layer whose place it takes, and the one that it runs."""

    position: int | None  # source half-layer (2 layer + kind) at whose place it stands; None for an added step
    runs: int  # source half-layer whose module is its home
    alone: bool  # whether no other half-step runs that module


@torch.inference_mode()
def refit(
    network: Network,
    plan: HomePlan,
    tokens: Tensor,
    ridge: float = 1e-3,
    progress: Progress | None = None,
    in_place: bool = False,
) -> Layers:
    """The network's layers with the output projections of kept modules refitted on `tokens` (S, T) int64.

    A module that several steps share, or that stands at another layer's place, keeps its weights; so does every module
    in front of the first removed half-layer. `ridge` is relative to the mean variance of the features. `in_place`
    writes into the network's own layers: the source has passed a module for good when it is refitted, so the result
    is the same.
    """
    at_once = min(BATCH_TOKENS, FEATURE_VALUES // network.layers.up_bias.shape[1])
    batches = tokens.split(max(1, at_once // tokens.shape[1]))
    states = [embed(network.frame, batch) for batch in batches]  # the source's residual, (B, T, D) each
    ours = [state.clone() for state in states]
    layers, halves = network.layers if in_place else with_own_outputs(network.layers), half_steps(plan)
    place, drifted = 0, False
    for index, half in enumerate(halves):
        goal = _goal(halves, index, 2 * plan.num_layers)
        if goal is not None:
            drifted |= goal - place > 1  # something between the last half-step and this one's goal is left out
            for passed in range(place, goal):
                _advance(network, network.layers, passed, states)
            place = goal
        if drifted and goal is not None and half.alone and half.runs == half.position:
            _refit_one(network, layers, half.runs, list(zip(ours, states, strict=True)), ridge)
        _advance(network, layers, half.runs, ours)
        if progress is not None:
            progress(index + 1, len(halves))
    return layers


def most_tokens(width: int) -> int:
    """How many tokens at most a source of that width is refitted on: what their residuals take is bounded."""
    return RESIDUAL_BYTES // (2 * 4 * width)


def with_own_outputs(layers: Layers) -> Layers:
    """`layers` with output projections of its own, which may be written to."""
    names = ("out_weight", "out_bias", "down_weight", "down_bias")
    with torch.inference_mode(False):  # they become parameters
        return replace(layers, **{name: getattr(layers, name).clone() for name in names})


def half_steps(plan: HomePlan) -> list[Half]:
    """The half-steps that run a module at home, in the order of execution."""
    found = []
    for step, layer in enumerate(plan.step_layers):
        for offset, kind in enumerate(KINDS):
            home = plan.home_layer(kind, step)
            if home is not None:
                found.append((None if layer is None else 2 * layer + offset, 2 * home + offset))
    runs = [half for _, half in found]
    return [Half(position, half, runs.count(half) == 1) for position, half in found]


def _goal(halves: list[Half], index: int, end: int) -> int | None:
    """How many source half-layers the residual behind a half-step stands for: all up to the next one's place."""
    if halves[index].position is None:
        return None
    return next((half.position for half in halves[index + 1 :] if half.position is not None), end)


def _advance(network: Network, layers: Layers, half: int, residuals: list[Tensor]) -> None:
    """Add what half-layer `half` of `layers` makes of each residual (B, T, D) to it, in place."""
    weight, bias = output_projection(layers, half)
    for x in residuals:
        x += half_layer_features(network, half, x) @ weight + bias


def _refit_one(network: Network, layers: Layers, half: int, pairs: list[tuple[Tensor, Tensor]], ridge: float) -> None:
    """Let `half` of `layers` map its features of our residual to what is missing to the source's, in place."""
    weight, bias = output_projection(layers, half)
    moments = Moments(weight)
    for x, state in pairs:
        moments.add(half_layer_features(network, half, x).flatten(0, 1), (state - x).flatten(0, 1))
    fitted_weight, fitted_bias = moments.solve(weight, ridge)
    weight.copy_(fitted_weight)
    bias.copy_(fitted_bias)


class Moments:
    """Sums for a ridge regression Y ~ X W + b over batches of rows, in float64."""

    def __init__(self, weight: Tensor) -> None:
        """`weight` (F, D) says how many features and outputs there are."""
        features, outputs = weight.shape
        self.rows = 0
        self.x, self.y = torch.zeros(features).double(), torch.zeros(outputs).double()
        self.xx, self.xy = torch.zeros(features, features).double(), torch.zeros(features, outputs).double()

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add rows x (n, F) and y (n, D)."""
        self.rows += x.shape[0]
        self.x += x.sum(0, dtype=torch.float64)
        self.y += y.sum(0, dtype=torch.float64)
        # a batch's product in its own precision, a piece at a time; the sum over batches in float64
        for part, xx, xy in zip(x.split(_ROWS, 1), self.xx.split(_ROWS), self.xy.split(_ROWS), strict=True):
            xx += part.T @ x
            xy += part.T @ y

    def solve(self, prior: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
        """W (F, D), b (D,) that minimise |Y - X W - b|^2 / n + ridge v |W - prior|^2; v: mean variance of a feature.

        Uses up the sums: at 1.5 G parameters F x F values in float64 are 328 MB.
        """
        mean_x, mean_y = self.x / self.rows, self.y / self.rows
        covariance = self.xx.div_(self.rows).addr_(mean_x, mean_x, alpha=-1)
        cross = self.xy.div_(self.rows).addr_(mean_x, mean_y, alpha=-1)
        strength = ridge * covariance.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
        covariance.diagonal().add_(strength)
        cross += strength * prior.double()
        factor = lu_factor(covariance.numpy().T, overwrite_a=True, check_finite=False)  # in place, as its columns lie
        weight = torch.from_numpy(lu_solve(factor, cross.numpy(), overwrite_b=True, check_finite=False))
        return weight.to(prior.dtype), (mean_y - mean_x @ weight).to(prior.dtype)
