"""Routed execution: tokens grouped by module, each group through its own. One signature, several backends.

`reference` is the specification: a loop over the modules. `grouped` does the same with fewer and larger operators,
`triton` in kernels for NVIDIA GPUs. MOMIFY_KERNELS=reference|grouped|triton overrides the choice.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .grouped_dispatch import grouped, run_chain, weigh
from .plan import Plan, make_plan, static_plan
from .pool import Stack
from .triton_dispatch import has_triton, triton_routed

__all__ = ["BACKENDS", "Backend", "choose_backend", "make_plan", "reference", "routed", "static_plan"]

Activation = Callable[[Tensor], Tensor]
Routed = Callable[[Tensor, Plan, Sequence[Stack], Activation | None], Tensor]


@dataclass(frozen=True)
class Backend:
    """One way of routed execution, and whether its plans tell the host how many rows each module has."""

    name: str
    run: Routed
    wait: bool = True


def choose_backend(device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend for tokens on `device` in `dtype`; MOMIFY_KERNELS=reference|grouped|triton overrides.

    Raises ValueError for another name, and for triton where there is none. Ask once a forward pass.
    """
    name = os.environ.get("MOMIFY_KERNELS", "")
    if name not in ("", *BACKENDS):
        raise ValueError(f"MOMIFY_KERNELS is {name!r}; use one of {', '.join(BACKENDS)}, or unset it")
    if name == "triton" and not has_triton(device):
        raise ValueError(f"MOMIFY_KERNELS is 'triton', which cannot run on {device.type} here; unset it")
    fits = device.type == "cuda" and dtype in (torch.float32, torch.bfloat16, torch.float16)
    return BACKENDS[name or ("triton" if fits and has_triton(device) else "grouped")]


def routed(
    x: Tensor,
    plan: Plan,
    layers: Sequence[Stack],
    activation: Activation | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """Sum over each token's picks of gate * chain(x): x (n, D) -> (n, E), zero for tokens without a pick.

    The chain is one stacked matrix, or two with the activation between. Nothing is gathered where all rows go
    through one module, or none through any.
    """
    if plan.module is not None:
        if not any(plan.sizes):
            return x.new_zeros(x.shape[0], layers[-1].out_features)
        return weigh(run_chain(x, plan.module, layers, activation), plan.gates)
    return (backend or choose_backend(x.device, x.dtype)).run(x, plan, layers, activation)


def reference(x: Tensor, plan: Plan, layers: Sequence[Stack], activation: Activation | None = None) -> Tensor:
    """The specification: group after group gathered, multiplied, weighed, and added to its tokens' rows."""
    sizes = plan.sizes
    rows = x.index_select(0, plan.tokens)  # (m, D)
    out = None
    gates = [None] * len(sizes) if plan.gates is None else plan.gates.split(sizes)
    groups = zip(rows.split(sizes), plan.tokens.split(sizes), gates, strict=True)
    for module, (group, tokens, gate) in enumerate(groups):
        if sizes[module]:
            y = weigh(run_chain(group, module, layers, activation), gate)
            out = y.new_zeros(x.shape[0], y.shape[1]) if out is None else out
            out.index_add_(0, tokens, y)
    return x.new_zeros(x.shape[0], layers[-1].out_features) if out is None else out


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("reference", reference),
        Backend("grouped", grouped),
        Backend("triton", triton_routed, wait=False),
    )
}
