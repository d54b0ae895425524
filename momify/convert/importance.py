"""Which half-layers the source can do without: its loss on calibration text with sets of them left out.

A half-layer is one attention or feed-forward block: (kind, layer). Losses are mean cross-entropies per token
in nats. Residuals before half-layers are kept ("anchors"): a candidate at depth l costs the layers from l on.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from momify.convert.homes import KINDS
from momify.convert.network import Network, embed, half_layer_update, token_losses
from momify.convert.scores import SCORES, half_layer_scores
from momify.errors import MomifyError

METHODS = ("greedy", "layerdrop", "leave_one_out", *SCORES)  # and "fitted" (fitted_losses.py), "trial" (trial.py)
_GREEDY = ("greedy", "layerdrop", "fitted")
HalfLayer = tuple[str, int]  # ("mha" or "ffn", layer)
Progress = Callable[[int, int], None]  # done, total
ANCHOR_BYTES = 256 << 20  # all anchors of all batches together
BATCH_TOKENS = 1024  # a batch's activations stay in a core's cache at small widths


@dataclass(frozen=True)
class Removal:
    """One half-layer left out: what it added to the loss, and the loss after it (None where not measured)."""

    kind: str
    layer: int
    increase: float
    loss: float | None


@dataclass(frozen=True)
class Trial:
    """What was left of one way's choice after a short training (trial.py)."""

    method: str
    divergence: float | None  # KL(source || copy) in nats, a mean over tokens; None: no number
    tokens: int  # that the copy learned from


@dataclass(frozen=True)
class Importance:
    """What was measured: losses in nats per token, half-layers in the order of their removal."""

    method: str  # one of METHODS, fitted or none
    num_layers: int
    tokens: int  # predictions scored
    base_loss: float
    mha_increase: tuple[float, ...]  # (L,) loss increase when that attention alone is left out, or the method's score
    ffn_increase: tuple[float, ...]  # (L,)
    removals: tuple[Removal, ...] = ()
    evaluations: int = 0  # passes over the calibration tokens, full or from an anchor on
    trials: tuple[Trial, ...] = ()  # among which `method` came out best; none where it was asked for

    @property
    def left_out(self) -> frozenset[int]:
        """The half-layers of all removals, numbered as they run: 2 l attention, 2 l + 1 feed-forward."""
        return frozenset(2 * removal.layer + KINDS.index(removal.kind) for removal in self.removals)

    @property
    def measure(self) -> str:
        """What the numbers are, as the head of a column."""
        return SCORES.get(self.method, "loss +")

    def increases(self, kind: str) -> tuple[float, ...]:
        """Leave-one-out loss increases of one kind, per layer."""
        return self.mha_increase if kind == "mha" else self.ffn_increase

    def order(self, kind: str) -> list[int]:
        """Layers of one kind from the first to remove to the one needed most, all L of them."""
        removed = [removal.layer for removal in self.removals if removal.kind == kind]
        rest = sorted(set(range(self.num_layers)) - set(removed), key=lambda i: (self.increases(kind)[i], i))
        return removed + rest

    def cost(self, kind: str, layer: int) -> float:
        """Loss increase at the layer's removal, or its leave-one-out increase where it was never removed."""
        for removal in self.removals:
            if (removal.kind, removal.layer) == (kind, layer):
                return removal.increase
        return self.increases(kind)[layer]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, which has no infinity: None stands for it."""
        data = asdict(self)
        for name in ("mha_increase", "ffn_increase"):
            data[name] = tuple(map(_finite, data[name]))
        for removal in data["removals"]:
            removal |= {name: _finite(removal[name]) for name in ("increase", "loss")}
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Importance":
        """The inverse of `to_dict`, also after a round trip through JSON."""
        fixed = {name: tuple(map(_cost, data[name])) for name in ("mha_increase", "ffn_increase")}
        removals = tuple(Removal(**{**removal, "increase": _cost(removal["increase"])}) for removal in data["removals"])
        trials = tuple(Trial(**trial) for trial in data.get("trials", ()))
        return cls(**{**data, **fixed, "removals": removals, "trials": trials})

    @classmethod
    def unmeasured(cls, num_layers: int) -> "Importance":
        """For a conversion that removes nothing and so needs no calibration."""
        zeros = (0.0,) * num_layers
        return cls("none", num_layers, 0, 0.0, zeros, zeros)


class Losses(Protocol):
    """Losses with half-layers left out, one by one and for good; half-layers are numbered in the order they run."""

    halves: int
    scored: int  # predictions
    evaluations: int  # passes over the tokens so far

    def loss_without(self, half: int | None = None) -> float:
        """Mean loss in nats with those removed so far and, if given, `half` left out."""

    def remove(self, half: int) -> None:
        """Leave `half` out from now on."""


class PrunedLosses:
    """Losses of a network on fixed tokens with half-layers left out, one by one and for good.

    Half-layers are numbered in the order they run: 2 l is the attention of layer l, 2 l + 1 its feed-forward.
    """

    def __init__(
        self,
        network: Network,
        tokens: Tensor,
        batch_tokens: int = BATCH_TOKENS,
        anchor_bytes: int = ANCHOR_BYTES,
        known: dict[str, float] | None = None,
    ) -> None:
        """`tokens`: (S, T) int64 rows of text, the first token of each row is not scored.

        known: losses measured before on the same network and tokens, by `set_key`; new ones are added to it.
        """
        self.network = network
        self.known = {} if known is None else known
        self.batches = tokens.split(max(1, batch_tokens // tokens.shape[1]))
        self.scored = tokens.shape[0] * (tokens.shape[1] - 1)
        self.removed: set[int] = set()
        self.evaluations = 0
        self.halves = 2 * network.layers.num_layers
        state_bytes = tokens.numel() * network.frame.wte.shape[1] * network.frame.wte.element_size()
        self.stride = -(-self.halves * state_bytes // anchor_bytes)  # an anchor before every stride-th half-layer
        self.anchors: list[dict[int, Tensor]] = [{} for _ in self.batches]

    @torch.inference_mode()
    def loss_without(self, half: int | None = None) -> float:
        """Mean loss with the half-layers removed so far and, if given, `half` left out."""
        key = set_key(self.removed if half is None else self.removed | {half})
        if key not in self.known:
            self.known[key] = self._measure(half)
        return self.known[key]

    def _measure(self, half: int | None) -> float:
        self.evaluations += 1
        start = self.halves if half is None else half
        total = 0.0
        for batch, anchors in zip(self.batches, self.anchors, strict=True):
            x = self._residual_before(start, batch, anchors)
            for later in range(start + 1, self.halves):
                x = self._after(later, x)
            total += token_losses(self.network, x, batch)
        return total / self.scored

    def remove(self, half: int) -> None:
        """Leave `half` out from now on; anchors behind it are void."""
        self.removed.add(half)
        self.anchors = [{at: x for at, x in anchors.items() if at <= half} for anchors in self.anchors]

    def _residual_before(self, half: int, batch: Tensor, anchors: dict[int, Tensor]) -> Tensor:
        """The residual (B, T, D) that half-layer `half` reads, from the nearest anchor on."""
        at = max((place for place in anchors if place <= half), default=0)
        x = anchors[at] if at in anchors else embed(self.network.frame, batch)
        for place in range(at, half + 1):
            if place % self.stride == 0:
                anchors[place] = x
            if place < half:
                x = self._after(place, x)
        return x

    def _after(self, half: int, x: Tensor) -> Tensor:
        """The residual behind half-layer `half`, which does nothing if it was removed."""
        return x if half in self.removed else x + half_layer_update(self.network, half, x)


def set_key(halves: Iterable[int]) -> str:
    """The name of a set of half-layers left out, in a store of losses: "2 9 11"; "" for none."""
    return " ".join(map(str, sorted(halves)))


def pruned_loss(network: Network, tokens: Tensor, removed: Iterable[HalfLayer]) -> float:
    """Mean loss of the network on `tokens` (S, T) with the half-layers `removed` left out."""
    losses = PrunedLosses(network, tokens)
    for kind, layer in removed:
        losses.remove(2 * layer + KINDS.index(kind))
    return losses.loss_without()


def measure_importance(
    network: Network,
    tokens: Tensor,
    quotas: tuple[int, int],
    method: str = "greedy",
    progress: Progress | None = None,
    known: dict[str, float] | None = None,
) -> Importance:
    """Measure every half-layer and choose which `quotas` = (attention, feed-forward) of them to remove.

    leave_one_out: the cheapest by the loss without it alone. Methods of `scores.py`: the lowest of each kind, with the
    loss measured before and after only. greedy: see `judged`; layerdrop is the same, with the copy that `layerdrop.py`
    trains as `network`.
    `tokens` is (S, T) int64; `progress` is told how many measurements and removals of how many are done. `known` holds
    losses by `set_key` from earlier measurements of the same network on the same tokens, and gets the new ones.
    Raises MomifyError for tokens that the network cannot read and for an unknown method.
    """
    check_tokens(network, tokens)
    if method not in METHODS:
        raise MomifyError(f"importance method {method!r} is unknown; use one of {', '.join(METHODS)}")
    losses = PrunedLosses(network, tokens, known=known)
    scores = half_layer_scores(network, losses.batches, quotas, method) if method in SCORES else None
    return judged(losses, quotas, method, progress, scores)


def judged(
    losses: Losses,
    quotas: tuple[int, int],
    method: str,
    progress: Progress | None = None,
    scores: Sequence[float] | None = None,
) -> Importance:
    """Measure every half-layer by its loss, or its score, and choose which `quotas` of them to remove.

    greedy, layerdrop, fitted: leave-one-out losses first; then again and again the cheapest candidate of both kinds
    goes, measured beside all that went before it. Only the cheapest stale candidate is measured anew until the cheapest
    is fresh (lazy greedy). What the loss is of they leave to `losses`. Raises MomifyError where the source itself comes
    to no number.
    """
    steps = _Steps(losses.halves + sum(quotas), progress)
    base = losses.loss_without()
    if not math.isfinite(base):
        raise MomifyError(f"the source's loss on the calibration text is {base}, no number: its weights are broken")
    increases = []
    for half in range(losses.halves):
        increases.append(_cost(scores[half] if scores else losses.loss_without(half) - base))
        steps.advance()
    choose = _remove_lazily if method in _GREEDY else _remove_at_once
    removals = choose(losses, base, increases, quotas, steps)
    return Importance(
        method=method,
        num_layers=losses.halves // 2,
        tokens=losses.scored,
        base_loss=base,
        mha_increase=tuple(increases[0::2]),
        ffn_increase=tuple(increases[1::2]),
        removals=tuple(removals),
        evaluations=losses.evaluations,
    )


class _Steps:
    """Counts what is done for a progress callback."""

    def __init__(self, total: int, report: Progress | None) -> None:
        self.done, self.total, self.report = 0, total, report

    def advance(self) -> None:
        self.done += 1
        if self.report is not None:
            self.report(self.done, self.total)


def _remove_lazily(
    losses: Losses, base: float, increases: list[float], quotas: tuple[int, int], steps: _Steps
) -> list[Removal]:
    """Lazy greedy over both kinds until each quota is met."""
    left, loss, removals = list(quotas), base, []
    stale = dict(enumerate(increases))
    fresh = set(stale)  # measured beside exactly what has been removed so far
    while sum(left):
        half = min((h for h in stale if left[h % 2]), key=lambda h: (stale[h], h))
        if half not in fresh:
            stale[half] = _cost(losses.loss_without(half) - loss)
            fresh.add(half)
            continue
        increase = stale.pop(half)
        loss += increase
        left[half % 2] -= 1
        losses.remove(half)
        fresh.clear()
        removals.append(Removal(KINDS[half % 2], half // 2, increase, loss))
        steps.advance()
    return removals


def _remove_at_once(
    losses: Losses, base: float, increases: list[float], quotas: tuple[int, int], steps: _Steps
) -> list[Removal]:
    """The cheapest of each kind by leave-one-out increase or score; the loss without all of them is measured."""
    chosen = []
    for kind, quota in enumerate(quotas):
        chosen += sorted(range(kind, losses.halves, 2), key=lambda h: (increases[h], h))[:quota]
    chosen.sort(key=lambda h: (increases[h], h))
    for half in chosen:
        losses.remove(half)
        steps.advance()
    after = _cost(losses.loss_without()) if chosen else base
    return [Removal(KINDS[h % 2], h // 2, increases[h], after if h == chosen[-1] else None) for h in chosen]


def _cost(measured: float | None) -> float:
    """What was measured, infinite where it is no number: what breaks a model is never the cheapest to remove."""
    return measured if measured is not None and math.isfinite(measured) else math.inf


def _finite(value: float | None) -> float | None:
    """A number that JSON has a word for; None for infinity."""
    return value if value is not None and math.isfinite(value) else None


def check_tokens(network: Network, tokens: Tensor) -> None:
    """Raise MomifyError unless `tokens` are rows that the network can read."""
    rows, length = tokens.shape
    positions, vocabulary = network.frame.wpe.shape[0], network.frame.wte.shape[0]
    if rows < 1 or not 2 <= length <= positions:
        raise MomifyError(
            f"calibration text has {rows} rows x {length} tokens; give at least 1 row of 2 to {positions}"
        )
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocabulary:
        raise MomifyError(f"calibration token {high if low >= 0 else low} is outside the vocabulary of {vocabulary}")
