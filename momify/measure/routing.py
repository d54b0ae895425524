"""Which modules the tokens really used, from the routing records that a forward pass returns."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from momify.errors import MomifyError
from momify.measure.cost import HalfStep, Kind, Pool, Shape, shape_of
from momify.measure.mode import evaluating
from momify.model import MomConfig
from momify.model.outputs import RoutingRecord

Counts = dict[tuple[int, Kind], Tensor]


@dataclass(frozen=True)
class StepUse:
    """How one half-step was used: `shares[i]` of the tokens took module i, the last entry SKIP.

    With K picks a token the shares sum to K. `entropy` (bits) is that of the shares, 0 if all tokens agree. `patched`:
    SKIP adds a patch here.
    """

    step: int
    kind: Kind
    home: int
    choices: int
    shares: tuple[float, ...]
    entropy: float
    patched: bool = False

    @property
    def skip_share(self) -> float:
        """Share of the tokens that took SKIP."""
        return self.shares[-1]


@dataclass(frozen=True)
class PoolUse:
    """How one pool was used over all steps: `loads[i]` is module i's part of all module runs.

    `imbalance` is the busiest module's load over the mean load, 1 if even; 0 if nothing ran.
    `dead` lists the modules that no token ran.
    """

    kind: Kind
    loads: tuple[float, ...]
    imbalance: float
    dead: tuple[int, ...]


@dataclass(frozen=True)
class RoutingUse:
    """Use of the modules over `tokens` tokens: each half-step in the order of execution, and each pool."""

    tokens: int
    steps: tuple[StepUse, ...]
    mha: PoolUse
    ffn: PoolUse


def realised(routing: Sequence[RoutingRecord], tokens: int) -> tuple[HalfStep, ...]:
    """What each half-step of one forward pass of n = `tokens` tokens computed, for `cost.mom_macs`."""
    return tuple(
        HalfStep(
            step=record.step,
            kind=record.kind,
            rows=record.rows,
            kept=record.key_rows,
            queries=tokens if record.attended else 0,
            largest=_busiest(record),
            skipped=record.patch_rows,
        )
        for record in routing
    )


def _busiest(record: RoutingRecord) -> int:
    """Rows of the module that most tokens picked; SKIP is the largest index, where anybody skips."""
    counts = torch.bincount(record.modules.flatten()).tolist()
    skipped = record.modules.numel() - record.rows
    return max(counts[:-1] if skipped else counts, default=0)


def collect(model: PreTrainedModel, batches: Iterable[Tensor]) -> RoutingUse:
    """How the modules of a MoM `model` are used on `batches` of ids (B, T), unpadded, without cache.

    Raises MomifyError for a dense model, which has no routing, and for no batches.
    """
    if model.config.model_type != "mom":
        raise MomifyError(f"model_type '{model.config.model_type}' has no routing to look at: give a mom model")
    counts: Counts = {}
    tokens = 0
    with evaluating(model), torch.no_grad():
        for ids in batches:
            routing = model(input_ids=ids.to(model.device), use_cache=False, output_router_logits=True).routing
            _add(counts, routing, shape_of(model.config))
            tokens += ids.numel()
    if tokens == 0:
        raise MomifyError("no tokens to look at the routing of: give at least one batch")
    return use_of(model.config, counts, tokens)


def _add(counts: Counts, routing: Sequence[RoutingRecord], shape: Shape) -> None:
    """Add one forward pass's picks to `counts`: (M+1,) for each step and kind."""
    for record in routing:
        picked = torch.bincount(record.modules.flatten(), minlength=shape.pool(record.kind).modules + 1).cpu()
        place = record.step, record.kind
        counts[place] = counts[place] + picked if place in counts else picked


def use_of(config: MomConfig, counts: Counts, tokens: int) -> RoutingUse:
    """`RoutingUse` from how many of `tokens` tokens picked each choice (M+1,) at each executed step and kind.

    A half-step that does nothing is no entry of `counts`; its use is SKIP for all tokens.
    """
    shape = shape_of(config)
    kinds: tuple[Kind, ...] = ("mha", "ffn")
    steps = tuple(
        _step_use(shape, (step, kind), counts.get((step, kind)), tokens)
        for step in range(shape.steps)
        for kind in kinds
    )
    mha, ffn = (_pool_use(shape.pool(kind), kind, counts) for kind in kinds)
    return RoutingUse(tokens, steps, mha, ffn)


def _step_use(shape: Shape, place: tuple[int, Kind], picked: Tensor | None, tokens: int) -> StepUse:
    step, kind = place
    pool = shape.pool(kind)
    shares = [0.0] * pool.modules + [1.0] if picked is None else [count / tokens for count in picked.tolist()]
    return StepUse(
        step=step,
        kind=kind,
        home=pool.homes[step],
        choices=len(pool.reach[step]),
        shares=tuple(shares),
        entropy=_entropy(shares),
        patched=shape.patched(kind, step),
    )


def _entropy(shares: Sequence[float]) -> float:
    """Bits of the distribution that `shares` are proportional to."""
    total = sum(shares)
    return -sum(share / total * math.log2(share / total) for share in shares if share > 0) + 0.0  # no -0.0


def _pool_use(pool: Pool, kind: Kind, counts: Counts) -> PoolUse:
    runs = torch.zeros(pool.modules, dtype=torch.int64)
    for (_, of_kind), picked in counts.items():
        if of_kind == kind:
            runs += picked[: pool.modules]
    total = int(runs.sum())
    loads = tuple(count / total if total else 0.0 for count in runs.tolist())
    dead = tuple(module for module, count in enumerate(runs.tolist()) if count == 0)
    return PoolUse(kind, loads, max(loads) * pool.modules, dead)
