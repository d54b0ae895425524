"""What stays and what stands in make up for what goes, in closed form, from the source's own residual.

When half-layers are left out, the ones behind them read a residual that they were not trained on. Walking through the
network once, half-step by half-step, on the residual that the compressed model has there:

- a kept module's output projection (attention's out, feed-forward's down) is set to the ridge regression from its own
  features to what brings the residual to the source's at that depth: nothing is added, and the ridge pulls towards the
  original weights (little text, little change);
- the patch of a removed half-layer is the best map of its rank from x_hat to what is still missing then; where a token
  may choose between a module and the patch, the best map to what the module adds;
- a module that several steps share gets a low-rank change of its own at each of them: of its input projection towards
  the layer that the step replaces, with heads or neurons aligned, and of its output projection to what is missing.

What is missing is told by the place of the next half-step that runs a module: a kept module with removed ones behind it
makes up for those too, and a patch for what remains (docs/log.md: better than leaving it to the patch).
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

from momify.convert.align import aligned
from momify.convert.homes import HomePlan
from momify.convert.importance import KINDS, Progress
from momify.convert.layers import Layers
from momify.convert.merge import merged_modules, write_modules
from momify.convert.network import HalfWeights, Network, embed, half_features, half_weights, normalised
from momify.convert.regression import Factors, Moments
from momify.convert.stand_ins import StandIns

BATCH_TOKENS = 4096  # features of so many tokens at once, fewer where they are wide
FEATURE_VALUES = 1 << 23  # 32 MB in float32
RESIDUAL_BYTES = 400 << 20  # the source's and ours, all tokens


@dataclass(frozen=True)
class Half:
    """One half-step of the plan: the source half-layer whose place it takes, and the one that it runs."""

    step: int
    kind: str
    position: int | None  # source half-layer (2 layer + kind) at whose place it stands; None for an added step
    runs: int | None  # source half-layer whose module is its home; None for SKIP
    alone: bool  # whether no other half-step runs that module
    patched: bool  # whether SKIP is in reach and adds a patch
    adapted: bool  # whether the module has a low-rank change of this step's own


@dataclass(frozen=True)
class Fitting:
    """How the walk fits; ridges are relative to the mean variance of the features.

    A weak pull on kept modules gives the best start, but their weights may grow five times as large, and training then
    ends no better, or worse, than from the weights they had; a ridge of 1 to 10 keeps them near (docs/log.md).
    """

    ridge: float = 1e-3  # of kept modules, towards their own weights
    stand_in_ridge: float = 1e-3  # of patches and step deltas
    modules: bool = True  # whether kept modules are refitted, besides what stands in
    merge: bool = False  # whether a module that several steps share starts as the mean of the layers it stands for
    in_place: bool = False  # write into the network's own layers, which gives the same and takes less memory


@dataclass(frozen=True)
class Fitted:
    """Layers of which some are refitted, and the low-rank maps of single steps."""

    layers: Layers
    stand_ins: StandIns = field(default_factory=dict)

    def to(self, device: torch.device | str) -> "Fitted":
        """The same on a device."""
        return Fitted(self.layers.to(device), {place: one.to(device) for place, one in self.stand_ins.items()})


@torch.inference_mode()
def refit(
    network: Network,
    plan: HomePlan,
    tokens: Tensor,
    fitting: Fitting | None = None,
    progress: Progress | None = None,
) -> Fitted:
    """Fit on `tokens` (S, T) int64 what the plan keeps of the network, and what stands in for the rest.

    A module that several steps share (unless it is merged), or that stands at another layer's place, keeps its own
    weights; so does every module in front of the first removed half-layer.
    """
    fitting = fitting or Fitting()
    halves = half_steps(plan)
    layers = network.layers if fitting.in_place else own_layers(network.layers)
    merged = merged_modules(network, plan) if fitting.merge else {}  # written when the source is done
    walk = Walk(network, tokens, fitting, Ranks(plan.patch_rank, plan.step_rank), layers, merged)
    for index, half in enumerate(halves):
        walk.take(half, goal_behind(halves, index, 2 * plan.num_layers))
        if progress is not None:
            progress(index + 1, len(halves))
    write_modules(layers, merged)
    return Fitted(layers, walk.stand_ins)


def unfitted(network: Network, plan: HomePlan, fitting: Fitting) -> Fitted:
    """What `refit` starts from, for a conversion that has no text to fit to."""
    layers = network.layers if fitting.in_place else own_layers(network.layers)
    if fitting.merge:
        write_modules(layers, merged_modules(network, plan))
    return Fitted(layers)


def has_to_fit(plan: HomePlan, fitting: Fitting) -> bool:
    """Whether `refit` would change or find anything."""
    halves = half_steps(plan)
    as_the_source = [half.runs for half in halves] == list(range(2 * plan.num_layers))
    fitted = any(half.patched or half.adapted for half in halves)
    return fitted or (fitting.modules and not as_the_source)


def most_tokens(width: int) -> int:
    """How many tokens at most a source of that width is refitted on: what their residuals take is bounded."""
    return RESIDUAL_BYTES // (2 * 4 * width)


def half_steps(plan: HomePlan) -> list[Half]:
    """The half-steps that add something, a module at home or a patch, in the order of execution."""
    found = []
    for step, layer in enumerate(plan.step_layers):
        for offset, kind in enumerate(KINDS):
            home = plan.home_layer(kind, step)
            position = None if layer is None else 2 * layer + offset
            patched = step in plan.patched(kind)
            if home is not None or patched:
                runs, adapted = None if home is None else 2 * home + offset, step in plan.adapted(kind)
                found.append(Half(step, kind, position, runs, True, patched, adapted))
    runs = [half.runs for half in found]
    return [replace(half, alone=runs.count(half.runs) == 1) for half in found]


def own_layers(layers: Layers) -> Layers:
    """A copy of `layers` that may be written to."""
    with torch.inference_mode(False):  # they become parameters
        return Layers(*(getattr(layers, part.name).clone() for part in fields(layers)))


def goal_behind(halves: list[Half], index: int, end: int) -> int | None:
    """How many source half-layers the residual behind a half-step stands for: all up to the next module's place."""
    if halves[index].position is None:
        return None
    later = [half.position for half in halves[index + 1 :] if half.position is not None and half.runs is not None]
    return later[0] if later else end


@dataclass(frozen=True)
class Ranks:
    """Of patches and of step deltas."""

    patch: int = 0
    step: int = 0


class Walk:
    """The source's residual and the compressed model's, on the way through both.

    What is fitted to a kept module is written to `layers`, if there are any to write to, and used once in any case.
    `others` (S, T) int64 are more tokens, which walk along and are not fitted to: the last of `batches`.
    """

    def __init__(
        self,
        network: Network,
        tokens: Tensor,
        fitting: Fitting,
        ranks: Ranks,
        layers: Layers | None = None,
        merged: Mapping[int, HalfWeights] | None = None,
        others: Tensor | None = None,
    ) -> None:
        at_once = min(BATCH_TOKENS, FEATURE_VALUES // network.layers.up_bias.shape[1])
        rows = max(1, at_once // tokens.shape[1])
        self.batches = tokens.split(rows)
        self.fitted_to = len(self.batches)
        self.batches += () if others is None else others.split(rows)
        self.network, self.fitting, self.ranks, self.layers = network, fitting, ranks, layers
        self.states = [embed(network.frame, batch) for batch in self.batches]  # the source's residual, (B, T, D) each
        self.ours = [state.clone() for state in self.states]
        self.merged = {} if merged is None else merged
        self.place, self.drifted = 0, False
        self.stand_ins: dict[tuple[str, int], Factors] = {}

    def fork(self) -> "Walk":
        """The same walk up to here, which may go on another way."""
        other = copy.copy(self)
        other.states, other.ours = ([x.clone() for x in part] for part in (self.states, self.ours))
        other.stand_ins = dict(self.stand_ins)
        return other

    def take(self, half: Half, goal: int | None) -> None:
        """Fit and run one half-step; `goal`: how many source half-layers the residual behind it stands for."""
        if goal is not None:
            # something is left out between the last half-step and this one's goal, or is not what was there
            self.drifted |= goal - self.place > 1 or half.runs != half.position or half.runs in self.merged
            self._advance_source(goal)
        if half.runs is None:
            self._stand_in(half, goal)
        else:
            self._run(half, goal)

    def _advance_source(self, goal: int) -> None:
        for half in range(self.place, goal):
            weights = half_weights(self.network.layers, half)
            for x in self.states:
                x += half_features(self.network, half, weights, x).matmul(weights.out).add_(weights.out_bias)
        self.place = goal

    def _stand_in(self, half: Half, goal: int | None) -> None:
        """The patch in a removed half-layer's place; an added step's adds nothing yet."""
        if goal is None:
            return
        width = self.ours[0].shape[-1]
        moments = Moments(width, width, self.ours[0].device)
        for x, state in self._to_fit_to():
            moments.add(normalised(self.network, x).flatten(0, 1), (state - x).flatten(0, 1))
        patch = self._patch(half, moments)
        for x in self.ours:
            x += normalised(self.network, x) @ patch.weight_in @ patch.weight_out + patch.bias

    def _run(self, half: Half, goal: int | None) -> None:
        """A module at home: refitted where that can be, and its patch beside it."""
        assert half.runs is not None
        own = half.alone and half.runs == half.position
        layers, width = self.layers or self.network.layers, self.ours[0].shape[-1]
        weights = self.merged.get(half.runs) or half_weights(layers, half.runs)
        if half.adapted and goal is not None:
            weights = self._adapt(half, weights)
        elif self.fitting.modules and self.drifted and own and goal is not None:
            weights = self._refit(half.runs, weights)
        moments = Moments(width, width, self.ours[0].device) if half.patched else None
        for number, x in enumerate(self.ours):
            update = half_features(self.network, half.runs, weights, x).matmul(weights.out).add_(weights.out_bias)
            if moments is not None and number < self.fitted_to:
                moments.add(normalised(self.network, x).flatten(0, 1), update.flatten(0, 1))
            x += update
        if moments is not None:
            self._patch(half, moments)

    def _patch(self, half: Half, moments: Moments) -> Factors:
        """The patch of a half-step, from the sums over x_hat and what it stands in for."""
        nothing = self.ours[0].new_zeros(moments.xy.shape)
        patch = moments.solve_low_rank(nothing, nothing, self.ranks.patch, self.fitting.stand_in_ridge)
        self.stand_ins[f"{half.kind}_patch", half.step] = patch
        return patch

    def _refit(self, half: int, weights: HalfWeights) -> HalfWeights:
        """Let `half` map its features of our residual to what is missing to the source's."""
        out, out_bias = self._missing(half, weights).solve(weights.out, self.fitting.ridge)
        if self.layers is None:
            return replace(weights, out=out, out_bias=out_bias)
        weights.out.copy_(out)
        weights.out_bias.copy_(out_bias)
        return weights

    def _adapt(self, half: Half, base: HalfWeights) -> HalfWeights:
        """A shared module as it is at one step: its projections plus low-rank changes, towards the layer replaced."""
        assert half.position is not None
        name = f"{half.kind}_delta"
        own, rank = half_weights(self.network.layers, half.position), self.ranks.step
        if half.position != half.runs:
            own = aligned(own, base, None if half.position % 2 else self.network.num_heads)
        elif not self.drifted:
            return base  # as it is in the source
        into = self._inputs().truncated(own.into - base.into, own.into_bias - base.into_bias, rank)
        changed = replace(base, into=base.into + into.product(), into_bias=base.into_bias + into.bias)
        out = self._missing(half.position, changed).solve_low_rank(base.out, own.out, rank, self.fitting.stand_in_ridge)
        out = replace(out, bias=out.bias - base.out_bias)
        inner, outer = ("up", "down") if half.position % 2 else ("qkv", "out")
        self.stand_ins[f"{name}.{inner}", half.step] = into
        self.stand_ins[f"{name}.{outer}", half.step] = out
        return replace(changed, out=base.out + out.product(), out_bias=base.out_bias + out.bias)

    def _to_fit_to(self) -> list[tuple[Tensor, Tensor]]:
        """Our residual and the source's, (B, T, D) each, of the batches that are fitted to."""
        return list(zip(self.ours, self.states, strict=True))[: self.fitted_to]

    def _inputs(self) -> Moments:
        """Sums over x_hat of our residual alone."""
        moments = Moments(self.ours[0].shape[-1], 0, self.ours[0].device)
        for x, _ in self._to_fit_to():
            rows = normalised(self.network, x).flatten(0, 1)
            moments.add(rows, rows[:, :0])
        return moments

    def _missing(self, half: int, weights: HalfWeights) -> Moments:
        """Sums over the features of our residual, and over what is missing from it to the source's."""
        moments = Moments(*weights.out.shape, self.ours[0].device)
        for x, state in self._to_fit_to():
            features = half_features(self.network, half, weights, x)
            moments.add(features.flatten(0, 1), (state - x).flatten(0, 1))
        return moments
