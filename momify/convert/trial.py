"""A short training of each way's choice: what to keep is told by what comes back, on a copy of the source.

Which way to choose is best differs by source, and neither the start nor any measure of a half-layer tells (docs/
results.md). So the choice of each way is left out of a copy that learns for a short while, and the copy that then
predicts most like the source, on text that no copy learned from, has the choice.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from momify.convert.homes import KINDS, Request, default_steps
from momify.convert.importance import Importance, Progress, Trial
from momify.convert.network import Network, half_weights
from momify.convert.short_training import STEP_TOKENS, NotFiniteError, ShortTraining, divergence, trained_copy
from momify.errors import MomifyError

CANDIDATES = ("cosine", "every_other", "greedy")
"""Methods of `importance.measure_importance` whose choices are tried, the usual one first."""
TRIED_WEIGHTS = 100_000_000
"""Weights of a source's modules up to which trials are the default: gpt2 has 85 M, five times as many take 1.7 GB."""


def tells(request: Request, layers: int) -> bool:
    """Whether trials of a source of `layers` layers try what `request` converts: each module at its own step alone.

    A model with shared, added, fewer or dropped steps, with mixtures (K > 1) or a random start is another than the copy
    that a trial trains.
    """
    own = all(default_steps(request, kind, layers) == request.modules(kind) for kind in KINDS)
    return own and request.depth in (None, layers) and request.modules_per_token == 1 and request.init == "home"


def best_of_trials(
    network: Network,
    candidates: Sequence[Importance],
    lessons: Tensor,
    judged: Tensor,
    training: ShortTraining,
    progress: Progress | None = None,
) -> Importance:
    """The candidate whose copy, after learning on `lessons` (S, T) int64, is nearest to the source on `judged` (S', T).

    The distance is KL(source || copy) in nats, a mean over tokens; of equals the first is taken. All distances are in
    its `trials`, None where a copy's training came to no number. Candidates that leave out the same half-layers share a
    copy. One copy at a time is held, as `trained_copy` says. Raises MomifyError for tokens that the network cannot
    read, and where no copy came to a number.
    """
    distances: dict[frozenset[int], float | None] = {}
    choices = list(dict.fromkeys(candidate.left_out for candidate in candidates))
    for number, gone in enumerate(choices):
        told = None if progress is None else _part_of(progress, number, len(choices))
        distances[gone] = _distance_left(network, gone, lessons, judged, training, told)
    trials = tuple(Trial(one.method, distances[one.left_out], lessons.numel()) for one in candidates)
    finished = [one for one in candidates if distances[one.left_out] is not None]
    if not finished:
        raise MomifyError(
            f"importance trial: no copy came to a number at a learning rate of {training.learning_rate:g}; lower "
            "train.learning_rate, or choose by importance cosine"
        )
    return replace(min(finished, key=lambda one: distances[one.left_out]), trials=trials)


def _distance_left(
    network: Network,
    gone: frozenset[int],
    lessons: Tensor,
    judged: Tensor,
    training: ShortTraining,
    progress: Progress | None,
) -> float | None:
    """KL(source || copy) on `judged` after a copy learned to do without the half-layers `gone`; None for no number."""
    kept = [half for half in range(2 * network.layers.num_layers) if half not in gone]
    try:
        copy = trained_copy(network, lessons, lambda generator: kept, training, progress)
    except NotFiniteError:
        return None
    running = {half: half_weights(copy.layers, half) for half in kept}
    with torch.no_grad():
        batches = judged.split(max(1, STEP_TOKENS // judged.shape[1]))
        distance = sum(float(divergence(network, running, batch)) * len(batch) for batch in batches) / len(judged)
    return distance if math.isfinite(distance) else None


def _part_of(progress: Progress, number: int, count: int) -> Progress:
    """Progress of the `number`-th of `count` equal parts."""
    return lambda done, total: progress(number * total + done, count * total)


def set_apart(tokens: Tensor, rows: int, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (S - n, T) to learn from and n = `rows` others (n, T), evenly spaced, at most half of all: to judge by.

    Of the latter those are left out that candidates were chosen on, `seen` (S', T), unless they are all there is.
    Raises MomifyError for fewer than two rows.
    """
    if len(tokens) < 2:
        raise MomifyError(f"importance trial needs text of 2 blocks or more, this has {len(tokens)}; use cosine")
    rows = min(rows, len(tokens) // 2)
    apart = torch.zeros(len(tokens), dtype=torch.bool)
    apart[[index * len(tokens) // rows for index in range(rows)]] = True
    known = {tuple(row) for row in seen.tolist()}
    unseen = [tuple(row) not in known for row in tokens[apart].tolist()]
    return tokens[~apart], tokens[apart][unseen] if any(unseen) else tokens[apart]
