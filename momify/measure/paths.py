"""The path of each token of one text through the modules, and what the text's loss becomes without one of them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from momify.errors import MomifyError
from momify.measure.cost import Kind
from momify.measure.mode import evaluating

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class HalfPath:
    """What the tokens picked at one half-step: for each of T tokens its (module, gate) pairs, the pool's size for SKIP.

    `fixed`: there was no choice. `patched`: SKIP adds a patch.
    """

    step: int
    kind: Kind
    home: int
    fixed: bool
    picks: tuple[tuple[tuple[int, float], ...], ...]
    patched: bool = False


@dataclass(frozen=True)
class Paths:
    """The halves in the order of execution, and how well each token was predicted.

    `losses`: nats for each token, None for the first, which nothing predicts; `loss`: their mean, None for one token.
    """

    halves: tuple[HalfPath, ...]
    losses: tuple[float | None, ...]

    @property
    def loss(self) -> float | None:
        """Mean over the predicted tokens."""
        scored = [loss for loss in self.losses if loss is not None]
        return sum(scored) / len(scored) if scored else None

    def used(self, kind: Kind) -> set[int]:
        """Modules, and SKIP, that some token picked with a gate above 0."""
        return {
            module
            for half in self.halves
            if half.kind == kind
            for picks in half.picks
            for module, gate in picks
            if gate > 0
        }


def trace_paths(model: PreTrainedModel, ids: Tensor) -> Paths:
    """The paths of the tokens `ids` (1, T) of one text.

    Raises MomifyError for a dense model, no tokens, or more than the model has positions.
    """
    _check(model, ids)
    with evaluating(model), torch.no_grad():
        out = model(input_ids=ids.to(model.device), use_cache=False, output_router_logits=True)
    config = model.config
    halves = []
    for record in out.routing:
        gates = record.gates.float().tolist()
        picks = zip(record.modules.tolist(), gates, strict=True)
        halves.append(
            HalfPath(
                step=record.step,
                kind=record.kind,
                home=config.homes(record.kind)[record.step],
                fixed=not record.routed,
                picks=tuple(tuple(zip(modules, shares, strict=True)) for modules, shares in picks),
                patched=record.patched,
            )
        )
    return Paths(tuple(halves), _losses(out.logits, ids.to(model.device)))


def leave_one_out(
    model: PreTrainedModel, ids: Tensor, paths: Paths, progress: Progress | None = None
) -> dict[tuple[Kind, int], float]:
    """How much the mean loss (nats) of `ids` (1, T) rises without each module that `paths` use.

    A token that picked the module takes its next best choice; a step that has no other choice skips. Raises MomifyError
    for a single token, which has no loss.
    """
    if paths.loss is None:
        raise MomifyError("one token has no loss to compare; give a longer text")
    kinds: tuple[Kind, ...] = ("mha", "ffn")
    places = [(kind, module) for kind in kinds for module in sorted(paths.used(kind) - {_skip(model, kind)})]
    rises = {}
    for number, (kind, module) in enumerate(places):
        if progress:
            progress(number, len(places))
        with without(model, kind, module):
            rises[kind, module] = trace_paths(model, ids).loss - paths.loss
    return rises


@contextmanager
def without(model: PreTrainedModel, kind: Kind, module: int) -> Iterator[None]:
    """Take one module out for as long as the block lasts: no router can pick it, and where it is fixed it adds nothing.

    The keys that it makes for tokens which skip attention stay.
    """
    body = model.model
    router, delta = getattr(body, f"{kind}_router"), getattr(body, f"{kind}_delta")
    last = body.mha.out if kind == "mha" else body.ffn.down
    silenced = [last.weight[module], last.bias[module]]
    if delta is not None:  # what steps that are fixed to the module add to it
        of_steps = delta.out if kind == "mha" else delta.down
        for row, step in enumerate(model.config.adapted(kind)):
            if model.config.homes(kind)[step] == module:
                silenced += [of_steps.weight_out[row], of_steps.bias[row]]
    closed = [] if router is None else [router.bias[:, module]]
    places = [*silenced, *closed]
    before = [place.detach().clone() for place in places]
    try:
        with torch.no_grad():
            for place in silenced:
                place.zero_()
            for place in closed:
                place.fill_(float("-inf"))
        yield
    finally:
        with torch.no_grad():
            for place, value in zip(places, before, strict=True):
                place.copy_(value)


def _skip(model: PreTrainedModel, kind: Kind) -> int:
    return model.config.num_modules(kind)


def _losses(logits: Tensor, ids: Tensor) -> tuple[float | None, ...]:
    """Nats of each token given those before it, for logits (1, T, V)."""
    losses = F.cross_entropy(logits[0, :-1].float(), ids[0, 1:], reduction="none")
    return (None, *losses.tolist())


def _check(model: PreTrainedModel, ids: Tensor) -> None:
    if model.config.model_type != "mom":
        raise MomifyError(f"model_type '{model.config.model_type}' has no routing to look at: give a mom model")
    tokens, positions = ids.shape[1], model.config.max_position_embeddings
    if tokens == 0:
        raise MomifyError("the text is empty: give some with --text")
    if tokens > positions:
        raise MomifyError(f"the text has {tokens} tokens, the model {positions} positions; shorten it")
