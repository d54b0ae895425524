"""One half-step: normalise, choose, run the modules that were chosen, add the patch for what was skipped."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import Scene, attention_half
from .config import Kind
from .dispatch import Backend, routed
from .layout import HalfStep
from .low_rank import AdaptedStack, StepMap, patch_skipped
from .outputs import RoutingRecord
from .picking import Choosing, Picks, pick
from .plan import static_plan
from .pool import Stack
from .router import StepRouter


@dataclass(frozen=True)
class Pass:
    """What the half-steps of one forward pass share."""

    scene: Scene
    choosing: Choosing
    routers: dict[Kind, tuple[StepRouter, ...]]
    ffn: tuple[Stack, Stack]
    patches: dict[Kind, tuple[StepMap, ...]]
    deltas: dict[Kind, tuple[tuple[StepMap, StepMap], ...]]
    activation: Callable[[Tensor], Tensor]
    epsilon: float
    backend: Backend
    observe: "Observe | None" = None


@dataclass(frozen=True)
class Sight:
    """The residual before a half-step, or behind the last one, for who wants to look.

    The rest is what `home_update` and `patch_update` read; the router is None where tokens have no choice.
    """

    x: Tensor  # (n, D)
    half: HalfStep | None = None  # None behind the last
    x_hat: Tensor | None = None  # (n, D), None behind the last
    router: StepRouter | None = None
    shared: Pass | None = None  # None behind the last


Observe = Callable[[Sight], None]


@dataclass(frozen=True)
class Report:
    """What one executed half-step leaves for the outputs."""

    half: HalfStep
    picks: Picks
    weights: Tensor | None = None
    attended: bool = False
    keys: bool = False


def run_half(x: Tensor, half: HalfStep, shared: Pass) -> tuple[Tensor | None, Report]:
    """What one half-step adds to x (n, D), None for nothing; and what it leaves for the outputs."""
    x_hat = normalise(x, shared)
    router = None if half.route is None else shared.routers[half.kind][half.route]
    if shared.observe is not None:
        shared.observe(Sight(x, half, x_hat, router, shared))
    return execute(x_hat, half, pick(x_hat, half, router, shared.choosing), shared)


def normalise(x: Tensor, shared: Pass) -> Tensor:
    """x_hat of x (n, D), without the affine part: each module's own is folded into its input projection."""
    return F.layer_norm(x, x.shape[-1:], eps=shared.epsilon)


def execute(x_hat: Tensor, half: HalfStep, picks: Picks, shared: Pass) -> tuple[Tensor | None, Report]:
    """What one half-step adds for normalised tokens x_hat (n, D) that picked `picks`; see `run_half`."""
    y, report = (_attend if half.kind == "mha" else _feed)(x_hat, half, picks, shared)
    if half.patch is not None:
        patch = patch_skipped(x_hat, half, picks, shared.patches[half.kind][half.patch], shared.backend)
        y = y + patch if y is not None and patch is not None else (patch if y is None else y)
    return y, report


def home_update(x_hat: Tensor, half: HalfStep, shared: Pass) -> Tensor:
    """What the home module of `half`, no SKIP, adds for x_hat (n, D) if every token goes there: (n, D)."""
    picks = Picks(static_plan(half.home, half.skip, x_hat.shape[0]))
    y, _ = execute(x_hat, half.at_home(), picks, shared)
    assert y is not None
    return y


def patch_update(x_hat: Tensor, half: HalfStep, shared: Pass) -> Tensor:
    """What SKIP adds at `half` for x_hat (n, D) if every token takes it: (n, D), zeros without a patch."""
    return torch.zeros_like(x_hat) if half.patch is None else shared.patches[half.kind][half.patch].apply(x_hat)


def _attend(x_hat: Tensor, half: HalfStep, picks: Picks, shared: Pass) -> tuple[Tensor | None, Report]:
    """The modules' part of an attention half-step: (n, D), None if no token runs."""
    scene = shared.scene
    if half.delta is not None:
        qkv, out = shared.deltas["mha"][half.delta]
        scene = replace(scene, qkv=AdaptedStack(scene.qkv, qkv), out=AdaptedStack(scene.out, out))
    done = attention_half(x_hat, half, picks, scene)
    return done.output, Report(half, picks, done.weights, done.output is not None, done.keys)


def _feed(x_hat: Tensor, half: HalfStep, picks: Picks, shared: Pass) -> tuple[Tensor | None, Report]:
    """The modules' part of a feed-forward half-step: (n, D), None if no token runs."""
    if picks.plan.idle:
        return None, Report(half, picks)
    layers = shared.ffn
    if half.delta is not None:
        layers = tuple(map(AdaptedStack, layers, shared.deltas["ffn"][half.delta]))
    return routed(x_hat, picks.plan, layers, shared.activation, shared.backend), Report(half, picks)


def record(report: Report, embeds: Tensor) -> RoutingRecord:
    """The report in the form that users get, over the tokens of embeds (B, T, D)."""
    half, picks = report.half, report.picks
    modules, gates = picks.modules, picks.gates
    if modules is None:
        modules = torch.full((embeds.shape[0] * embeds.shape[1], 1), half.home, device=embeds.device)
    gates = torch.ones(modules.shape, device=embeds.device) if gates is None else gates.detach()
    return RoutingRecord(
        step=half.step,
        kind=half.kind,
        modules=modules,
        gates=gates,
        routed=half.routed,
        skip=half.skip,
        keeps_keys=half.key_home is not None and report.keys,
        attended=report.attended,
        patched=half.patch is not None,
    )
