"""Routed execution by torch's own operators: rows sorted by module, one product a module, back to order at once."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .plan import Plan
from .pool import Stack

Activation = Callable[[Tensor], Tensor]


def grouped(x: Tensor, plan: Plan, layers: Sequence[Stack], activation: Activation | None = None) -> Tensor:
    """`dispatch.routed` for a plan whose sizes the host knows, by slices of the sorted rows.

    Slices and not `torch.nn.functional.grouped_mm`: on a CPU the products take the same time, but grouped_mm has no
    bias, and its backward pass writes a gradient of the whole pool at every step (docs/speed.md has the numbers).
    """
    busy = [module for module, size in enumerate(plan.sizes) if size]
    if not busy:
        return x.new_zeros(x.shape[0], layers[-1].out_features)
    rows = x.index_select(0, plan.tokens).split([plan.sizes[module] for module in busy])
    parts = [run_chain(group, module, layers, activation) for group, module in zip(rows, busy, strict=True)]
    return scatter(weigh(torch.cat(parts) if len(parts) > 1 else parts[0], plan.gates), plan, x.shape[0])


def scatter(y: Tensor, plan: Plan, tokens: int) -> Tensor:
    """Rows y (m, E) summed over each token's picks, (n, E); in the order of the picks, whatever the device."""
    places = tokens * plan.width
    start = y.new_empty if y.shape[0] == places else y.new_zeros
    out = start(places, y.shape[1]).index_copy_(0, plan.picks, y)
    return out if plan.width == 1 else out.view(tokens, plan.width, -1).sum(1)


def run_chain(x: Tensor, module: int, layers: Sequence[Stack], activation: Activation | None) -> Tensor:
    """Rows x (m, D) through one module: (m, E)."""
    y = layers[0].apply(x, module)
    for layer in layers[1:]:
        y = layer.apply(y if activation is None else activation(y), module)
    return y


def weigh(y: Tensor, gates: Tensor | None) -> Tensor:
    """Rows y (m, E) times their gates (m,), or as they are."""
    return y if gates is None else y * gates.unsqueeze(1).to(y.dtype)
