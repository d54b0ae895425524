"""Routed execution by Triton kernels."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .plan import Plan
from .pool import Stack


def has_triton(device: torch.device) -> bool:
    """Whether the kernels can run on `device`."""
    return False


def triton_routed(
    x: Tensor, plan: Plan, layers: Sequence[Stack], activation: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """`dispatch.routed` by Triton kernels."""
    raise NotImplementedError
