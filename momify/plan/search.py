"""Which pools, steps and K fit a budget: the configurations that keep most of the source within it."""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial

from momify.convert.homes import Request, with_step_rank
from momify.errors import MomifyError
from momify.measure.cost import Pool, Shape, dense_macs, kv_bytes_per_token, mom_macs, parameters
from momify.plan.figures import Figures, figures_of, most_usage, planned_shape

LIMITS = {"flops": "macs_at_most", "kv": "kv_bytes", "params": "parameters"}
ATTENTION, FEED_FORWARD = 1, 2  # what keeping a module or a step of each kind is held to be worth, see `worth`
DEEPER = 1.5  # the most steps looked at, over the source's layers


@dataclass(frozen=True)
class Ceilings:
    """The most that each quantity may be, as a part of the source's: 0.84 of its FLOPs. None: no limit."""

    flops: float | None = None
    kv: float | None = None
    params: float | None = None


def parse_budget(text: str) -> Ceilings:
    """The budget in "flops<=0.84,kv<=0.5,params<=0.75". Raises MomifyError naming what is wrong."""
    found: dict[str, float] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\w+)\s*<=?\s*(\d*\.?\d+)\s*", part)
        if not match or match[1] not in LIMITS or float(match[2]) <= 0:
            raise MomifyError(
                f"--budget '{part.strip()}' is not understood; write {', '.join(LIMITS)} as parts of the source's, "
                "as in flops<=0.84,kv<=0.5,params<=0.75"
            )
        if match[1] in found:
            raise MomifyError(f"--budget limits {match[1]} twice; give one number")
        found[match[1]] = float(match[2])
    return Ceilings(**found)


@dataclass(frozen=True)
class Candidate:
    """A request that fits, and its figures."""

    request: Request
    figures: Figures


def search(dense: Shape, budget: Ceilings, tokens: int, few: int = 5) -> list[Candidate]:
    """The best `few` requests within `budget`, for sequences of `tokens` tokens; at least one with K = 2 if any fits.

    FLOPs are held to their most, whatever the routers choose. Nothing is known of the source's layers here: what to
    prefer is a rule of thumb (`worth`), and only `momify convert` measures. Raises MomifyError where nothing fits.
    """
    best = _best(_largest(dense, budget, tokens, picks=1), dense.steps)
    second = _best(_largest(dense, budget, tokens, picks=2), dense.steps)[:1]
    chosen = [*best[: few - len(second)], *second]
    if not chosen:
        raise MomifyError(f"nothing fits {budget_text(budget)}: embeddings and head alone take their part; allow more")
    return [_with_deltas(dense, request, budget, tokens) for request in chosen]


def _with_deltas(dense: Shape, request: Request, budget: Ceilings, tokens: int) -> Candidate:
    """The request with step deltas of the usual rank, or of the largest that the budget has room for."""
    usual = with_step_rank(request, dense.width).step_rank
    for asked in (request, *(replace(request, step_rank=rank) for rank in reversed(range(usual)))):
        found = Candidate(asked, figures_of(planned_shape(dense, asked), tokens))
        if within(budget, dense, found.figures):
            break
    return found


def _best(requests: Iterable[Request], layers: int) -> list[Request]:
    """The requests of most worth, the best first, one for each number of feed-forward modules: real alternatives."""
    found: dict[int, Request] = {}
    for request in requests:
        rival = found.get(request.ffn)
        if rival is None or worth(request, layers) > worth(rival, layers):
            found[request.ffn] = request
    return sorted(found.values(), key=lambda request: -worth(request, layers))


def worth(request: Request, layers: int) -> float:
    """How much of the source is kept: modules and steps, a feed-forward one held twice as dear as an attention one.

    In the paper (arXiv 2407.06677, section 5) and in calibrations of GPT-2s most attention modules can go before the
    loss moves, and few feed-forward ones.
    """
    attention = request.mha + min(request.mha_steps, layers)
    forward = request.ffn + min(request.ffn_steps, layers)
    return ATTENTION * attention + FEED_FORWARD * forward


def budget_text(budget: Ceilings) -> str:
    """The budget as it is written."""
    return ", ".join(f"{name}<={value:g}" for name, value in vars(budget).items() if value is not None) or "no limit"


@dataclass(frozen=True)
class _Unit:
    """What one kind costs: parameters of its pool, of a step's router, and MACs of a step at most."""

    pool: int
    router: int
    macs: float


@dataclass(frozen=True)
class _Room:
    """What a budget leaves for pools, routers and steps, and how many attention steps it allows."""

    parameters: float
    macs: float
    attention_steps: int


def _largest(dense: Shape, budget: Ceilings, tokens: int, picks: int) -> Iterator[Request]:
    """For each number of attention modules and steps the most feed-forward modules and steps that still fit."""
    room, layers = _room(dense, budget, tokens), dense.steps
    for depth in _depths(layers, budget):
        static = picks == 1 and depth <= layers  # as `reach_of` says: no routers
        unit = cache(partial(_unit, dense, tokens=tokens, picks=picks, static=static))
        for steps in range(1, min(depth, room.attention_steps) + 1):
            for mha in range(picks, min(layers, steps) + 1):
                attention = unit("mha", mha)
                left = (
                    room.parameters - attention.pool - steps * attention.router,
                    room.macs - steps * attention.macs,
                )
                found = _feed_forward(left, depth, range(layers, picks - 1, -1), partial(unit, "ffn"))
                if found:
                    yield Request(mha, found[0], depth, picks, steps, found[1])


def _feed_forward(
    left: tuple[float, float], depth: int, sizes: Iterable[int], unit: Callable[[int], _Unit]
) -> tuple[int, int] | None:
    """The most modules, then the most steps, that (parameters, MACs) leave room for; no module without a step."""
    for modules in sizes:
        one = unit(modules)
        steps = int(min(depth, left[1] / one.macs))
        if steps >= modules and one.pool + steps * one.router <= left[0]:
            return modules, steps
    return None


def _depths(layers: int, budget: Ceilings) -> list[int]:
    """More steps than layers only where more FLOPs than the source's are allowed (MoM-P)."""
    if budget.flops is not None and budget.flops <= 1:
        return [layers]
    return sorted({layers, round(1.25 * layers), round(DEEPER * layers)})


def _room(dense: Shape, budget: Ceilings, tokens: int) -> _Room:
    """The limits, less what every MoM of this source has: embeddings, last norm, head."""
    counts, macs = parameters(dense), dense_macs(dense, 1, tokens)
    fixed = counts.embeddings + counts.head + 2 * dense.width
    unlimited = float("inf")
    kv = unlimited if budget.kv is None else budget.kv
    return _Room(
        parameters=unlimited if budget.params is None else budget.params * counts.total - fixed,
        macs=unlimited if budget.flops is None else budget.flops * macs.total - macs.head,
        attention_steps=int(min(kv * dense.steps + 1e-9, DEEPER * dense.steps + 1)),
    )


def _unit(dense: Shape, kind: str, modules: int, tokens: int, picks: int, static: bool) -> _Unit:
    """The costs of one kind from the formulas themselves, on a model with one step of it and none of the other."""
    skip, routed = Pool(1, (1,), ((1,),)), Pool(modules, (0,), ((0,) if static else tuple(range(modules + 1)),))
    pools = {"mha": skip, "ffn": skip, kind: routed}
    shape = replace(dense, layer_norms=1, picks=picks, **pools)
    counts, macs = parameters(shape), mom_macs(shape, 1, tokens, most_usage(shape, tokens))
    return _Unit(counts.attention if kind == "mha" else counts.ffn, counts.routers, macs.total - macs.head)


def within(budget: Ceilings, dense: Shape, figures: Figures) -> bool:
    """Whether `figures` keep to the budget."""
    tokens = figures.tokens
    parts = {
        "flops": figures.macs_at_most / dense_macs(dense, 1, tokens).total,
        "kv": figures.kv_bytes_per_token / kv_bytes_per_token(dense),
        "params": figures.parameters["total"] / parameters(dense).total,
    }
    return all(parts[name] <= limit + 1e-9 for name, limit in vars(budget).items() if limit is not None)
