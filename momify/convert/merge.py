"""Modules that stand for several layers start as their mean, heads and neurons aligned (`align.py`).

With step deltas, as the module from which those layers differ least beyond what the deltas take over.
"""

from scipy.linalg import eigh
from torch import Tensor, from_numpy

from momify.convert.align import aligned
from momify.convert.homes import KINDS, HomePlan
from momify.convert.layers import Layers
from momify.convert.network import HalfWeights, Network, half_weights

_NAMES = ("into", "into_bias", "out", "out_bias")
_SWEEPS = 6  # over the layers that a module stands for


def shared_modules(plan: HomePlan) -> dict[int, list[int]]:
    """Each module that several steps have as their home, and the layers whose places those take, as half-layers.

    A half-layer is 2 layer + kind; added steps take no layer's place.
    """
    found: dict[int, list[int]] = {}
    for offset, kind in enumerate(KINDS):
        for step, layer in enumerate(plan.step_layers):
            home = plan.home_layer(kind, step)
            if home is not None and layer is not None:
                found.setdefault(2 * home + offset, []).append(2 * layer + offset)
    return {module: halves for module, halves in found.items() if len(halves) > 1}


def merged_modules(network: Network, plan: HomePlan) -> dict[int, HalfWeights]:
    """Each shared module made of all the half-layers that it stands for. The network is only read.

    All are brought into the order of the module's own layer first.
    """
    ranks = [plan.step_rank if plan.adapted(kind) else 0 for kind in KINDS]
    shared = shared_modules(plan)
    return {module: _merged(network, module, halves, ranks[module % 2]) for module, halves in shared.items()}


def common_base(weights: list[Tensor], rank: int) -> Tensor:
    """The B (F, E) with the smallest sum of |W_s - B - C_s|^2 over C_s of that rank, found by turns; rank 0: the mean.

    The best C_s beside the others' is the nearest of its rank to W_s less the mean of the other W_t - C_t. Of two
    matrices the first turn finds the optimum; at the mean all C_s would take over the same directions.
    """
    rest = [weight.double() for weight in weights]  # W_s - C_s
    total = sum(rest[1:], rest[0])
    for at in list(range(len(weights))) * (_SWEEPS if rank else 0):
        others = (total - rest[at]) / (len(weights) - 1)
        new = weights[at] - nearest_of_rank(weights[at] - others, rank)
        total, rest[at] = total + (new - rest[at]), new
    return (total / len(weights)).to(weights[0].dtype)


def nearest_of_rank(matrix: Tensor, rank: int) -> Tensor:
    """The matrix of that rank nearest to (F, E), by the leading eigenvectors of its smaller Gram matrix."""
    if matrix.shape[0] > matrix.shape[1]:
        return nearest_of_rank(matrix.T, rank).T
    size = matrix.shape[0]
    gram, wanted = (matrix @ matrix.T).cpu().numpy(), (max(0, size - rank), size - 1)
    leading = eigh(gram, subset_by_index=wanted, overwrite_a=True)[1]
    vectors = from_numpy(leading).to(matrix.device)  # (F, r)
    return vectors @ (vectors.T @ matrix)


def write_modules(layers: Layers, modules: dict[int, HalfWeights]) -> None:
    """Put modules into `layers`, in the place of what is there."""
    for half, module in modules.items():
        place = half_weights(layers, half)
        for name in _NAMES:
            getattr(place, name).copy_(getattr(module, name))


def _merged(network: Network, module: int, halves: list[int], rank: int) -> HalfWeights:
    """What stands for these half-layers of one kind, aligned to half-layer `module`."""
    to, heads = half_weights(network.layers, module), None if module % 2 else network.num_heads
    parts = [to if half == module else aligned(half_weights(network.layers, half), to, heads) for half in halves]
    into, into_bias, out, out_bias = ([getattr(part, name) for part in parts] for name in _NAMES)
    return HalfWeights(
        common_base(into, rank), common_base(into_bias, 0), common_base(out, rank), common_base(out_bias, 0)
    )
