"""Activation functions by name, as one operator where there is one."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch.nn.functional as F
from torch import Tensor
from transformers.activations import ACT2FN

_TANH_GELUS = ("gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_accurate")


@dataclass(frozen=True)
class Activation:
    """An activation function that knows what a kernel may compute in its place."""

    kernel: str | None
    """Name of the formula that the Triton kernels have for it; None for none."""
    function: Callable[[Tensor], Tensor]

    def __call__(self, x: Tensor) -> Tensor:
        """Elementwise."""
        return self.function(x)


def make_activation(name: str) -> Activation:
    """The activation `name` of transformers.ACT2FN.

    GPT-2's GELU by tanh is five operators there and one here; the two differ in the last bits of a float32.
    """
    if name in _TANH_GELUS:
        return Activation("gelu_tanh", partial(F.gelu, approximate="tanh"))
    known = {"gelu": ("gelu", F.gelu), "relu": ("relu", F.relu), "silu": ("silu", F.silu), "swish": ("silu", F.silu)}
    return Activation(*known.get(name, (None, ACT2FN[name])))
