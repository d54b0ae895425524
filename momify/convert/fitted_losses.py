"""Losses of the source with half-layers left out and everything that a conversion fits in place (`refit.py`).

A removal is judged by what it leaves once kept modules and patches make up for it, on text that they were not fitted
to: the loss without it says what it costs before that, and another set of half-layers may be the better one afterwards
(docs/log.md).
"""

from collections.abc import Set

import torch
from torch import Tensor

from momify.convert.importance import ANCHOR_BYTES, KINDS, check_tokens, set_key
from momify.convert.network import Network, token_losses
from momify.convert.refit import Fitting, Half, Ranks, Walk, goal_behind
from momify.errors import MomifyError

PARTS = 4  # every fourth row is scored, the others are fitted to


class FittedLosses:
    """As `importance.PrunedLosses`, after the fit: each half-layer of the removed is left out, or is its patch.

    Half-layers are numbered in the order they run: 2 l is the attention of layer l, 2 l + 1 its feed-forward.
    """

    def __init__(
        self,
        network: Network,
        tokens: Tensor,
        fitting: Fitting,
        patch_rank: int = 0,
        anchor_bytes: int = ANCHOR_BYTES,
        known: dict[str, float] | None = None,
    ) -> None:
        """`tokens`: (S, T) int64 rows of text, every fourth of which is scored and the others fitted to, as `fitting`
        says of modules and ridges; nothing is merged, and the network's layers are read only.

        known: losses measured before in the same way, by `set_key`; new ones are added to it. Raises MomifyError for
        tokens that the network cannot read, and for fewer than 4 rows.
        """
        check_tokens(network, tokens)
        if len(tokens) < PARTS:
            raise MomifyError(
                f"calibration text has {len(tokens)} rows, of which one in {PARTS} is scored; give {PARTS}"
            )
        to_score = torch.arange(len(tokens)) % PARTS == PARTS - 1
        self.known = {} if known is None else known
        self.scored = int(to_score.sum()) * (tokens.shape[1] - 1)
        self.removed: set[int] = set()
        self.evaluations = 0
        self.halves = 2 * network.layers.num_layers
        self.patch_rank = patch_rank
        with torch.inference_mode():
            start = Walk(network, tokens[~to_score], fitting, Ranks(patch_rank), others=tokens[to_score])
        state_bytes = 2 * sum(x.numel() * x.element_size() for x in start.ours)  # the source's and ours
        self.stride = -(-self.halves * state_bytes // anchor_bytes)  # an anchor before every stride-th half-layer
        self.anchors = {-1: start}  # before the first half-layer that runs, whichever that is

    @torch.inference_mode()
    def loss_without(self, half: int | None = None) -> float:
        """Mean loss in nats with the half-layers removed so far and, if given, `half` left out."""
        removed = self.removed if half is None else self.removed | {half}
        key = set_key(removed)
        if key not in self.known:
            self.evaluations += 1
            self.known[key] = self._measure(removed, self.halves if half is None else half)
        return self.known[key]

    def remove(self, half: int) -> None:
        """Leave `half` out from now on; anchors behind the module before it are void, as it has another goal now."""
        self.removed.add(half)
        last = self._module_before(half)
        self.anchors = {at: walk for at, walk in self.anchors.items() if at <= last}

    def _measure(self, removed: Set[int], changed: int) -> float:
        """The loss without `removed`, which differ from what is removed so far from half-layer `changed` on."""
        at = self._module_before(changed)
        walk = self._before(at)
        self._go_on(walk, removed, at, self.halves)
        scored = list(zip(walk.ours, walk.batches, strict=True))[walk.fitted_to :]
        return sum(token_losses(walk.network, *pair) for pair in scored) / self.scored

    def _module_before(self, half: int) -> int:
        """The last half-layer before `half` that runs, which makes up for what goes behind it; -1: none."""
        return max((at for at in range(half) if at not in self.removed), default=-1)

    def _before(self, at: int) -> Walk:
        """A walk through what is not removed so far, before the module of half-layer `at`; to be gone on with."""
        near = max(place for place in self.anchors if place <= at)
        walk = self.anchors[near].fork()
        if at <= 0:
            return walk
        for stop in [*range(max(near, 0) + 1, at), at]:
            if stop in self.removed or (stop != at and stop % self.stride):
                continue
            self._go_on(walk, self.removed, near, stop)
            near = stop
            if stop % self.stride == 0 and stop not in self.anchors:
                self.anchors[stop] = walk.fork()
        return walk

    def _go_on(self, walk: Walk, removed: Set[int], start: int, stop: int) -> None:
        """Take the half-layers from `start` to before `stop`, of which `removed` are left out."""
        found = (self._half(at, removed) for at in range(self.halves))
        halves = [half for half in found if half is not None]
        for index, half in enumerate(halves):
            if start <= half.position < stop:
                walk.take(half, goal_behind(halves, index, self.halves))

    def _half(self, at: int, removed: Set[int]) -> Half | None:
        """Half-layer `at` as its step has it: at home, a patch, or None where it is left out without one."""
        gone = at in removed
        if gone and not self.patch_rank:
            return None
        return Half(at // 2, KINDS[at % 2], at, None if gone else at, alone=True, patched=gone, adapted=False)
