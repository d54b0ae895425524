"""Modules that stand for several layers start as their mean, heads and neurons aligned (`align.py`)."""

from momify.convert.align import aligned
from momify.convert.homes import KINDS, HomePlan
from momify.convert.layers import Layers
from momify.convert.network import HalfWeights, Network, half_weights


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
    """Each shared module as the mean of the half-layers that it stands for. The network is only read.

    All are brought into the order of the module's own layer first.
    """
    return {module: _mean(network, module, halves) for module, halves in shared_modules(plan).items()}


def write_modules(layers: Layers, modules: dict[int, HalfWeights]) -> None:
    """Put modules into `layers`, in the place of what is there."""
    for half, module in modules.items():
        place = half_weights(layers, half)
        for name in ("into", "into_bias", "out", "out_bias"):
            getattr(place, name).copy_(getattr(module, name))


def _mean(network: Network, module: int, halves: list[int]) -> HalfWeights:
    """The mean of these half-layers of one kind, aligned to half-layer `module`."""
    to, heads = half_weights(network.layers, module), None if module % 2 else network.num_heads
    parts = [to if half == module else aligned(half_weights(network.layers, half), to, heads) for half in halves]
    names = ("into", "into_bias", "out", "out_bias")
    return HalfWeights(*(sum(getattr(part, name) for part in parts) / len(parts) for name in names))
