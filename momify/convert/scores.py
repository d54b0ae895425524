"""The classic measures of what a half-layer is worth, to set beside losses: none looks at the loss.

A score is comparable within one kind (attention, feed-forward) only; the lowest are removed first.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from momify.convert.layers import Layers
from momify.convert.network import Network, embed, half_layer_update

SCORES = {"cosine": "1 - cos", "magnitude": "norm", "every_other": "stays"}
"""Name of the method, and the head of its column."""


@torch.inference_mode()
def half_layer_scores(network: Network, batches: Sequence[Tensor], quotas: tuple[int, int], method: str) -> list[float]:
    """A score for each of the 2 L half-layers, from `batches` of tokens (B, T) each.

    cosine: 1 - cos(residual before, behind), a mean over tokens: the block influence of ShortGPT (arXiv 2403.03853,
    section 3.2) for half-layers. magnitude: Frobenius norm of the module's matrices with the norm's scale folded in.
    every_other: 0 for `quotas` = (attention, feed-forward) evenly spaced layers, 1 for the rest: DistilGPT2's student
    took every other layer of its teacher.
    """
    halves = 2 * network.layers.num_layers
    if method == "cosine":
        return _block_influence(network, batches)
    if method == "magnitude":
        return [_norm(network.layers, half) for half in range(halves)]
    gone = [_spread(network.layers.num_layers, quota) for quota in quotas]
    return [float(half // 2 not in gone[half % 2]) for half in range(halves)]


def _block_influence(network: Network, batches: Sequence[Tensor]) -> list[float]:
    sums = [0.0] * (2 * network.layers.num_layers)
    for batch in batches:
        x = embed(network.frame, batch)
        for half in range(len(sums)):
            after = x + half_layer_update(network, half, x)
            sums[half] += float((1 - F.cosine_similarity(x, after, dim=-1)).double().sum())
            x = after
    return [total / sum(batch.numel() for batch in batches) for total in sums]


def _norm(layers: Layers, half: int) -> float:
    names = ("up_weight", "down_weight") if half % 2 else ("qkv_weight", "out_weight")
    return float(sum(getattr(layers, name)[half // 2].double().square().sum() for name in names).sqrt())


def _spread(num_layers: int, quota: int) -> set[int]:
    """`quota` layers at equal distances: for 6 of 12 every other one, 1, 3, .. 11; for 3 of 12: 2, 6, 10."""
    return {(2 * i + 1) * num_layers // (2 * quota) for i in range(quota)}
