"""A copy of the source that has learned to do without any of its half-layers: what removals are judged by.

The loss without a half-layer, measured on the source, says what its removal costs now, not what training will leave of
that. So a copy is trained for a short while to predict what the source predicts, with half-layers dropped at random in
every step (LayerDrop, Fan et al. 2019, arXiv 1909.11556, for half-layers). Its losses with a set left out stand for
those of any set after recovery, as the weights of a one-shot search do for the networks in it (docs/results.md).
"""

import torch
from torch import Tensor

from momify.convert.importance import Progress
from momify.convert.network import Network
from momify.convert.short_training import ShortTraining, trained_copy


def trained_with_drops(
    network: Network,
    tokens: Tensor,
    quotas: tuple[int, int],
    training: ShortTraining,
    progress: Progress | None = None,
) -> Network:
    """A copy of `network` as `trained_copy`, while `quotas` (attention, feed-forward) of its half-layers, others in
    each step, are left out of what it learns on `tokens` (S, T) int64.
    """
    layers = network.layers.num_layers
    return trained_copy(network, tokens, lambda generator: drawn(layers, quotas, generator), training, progress)


def drawn(num_layers: int, quotas: tuple[int, int], generator: torch.Generator) -> list[int]:
    """The half-layers that run in one step, ascending: all but `quotas` of each kind, drawn with equal chances."""
    kept = []
    for offset, quota in enumerate(quotas):
        layers = torch.randperm(num_layers, generator=generator)[quota:]
        kept += (2 * layers + offset).tolist()
    return sorted(kept)
