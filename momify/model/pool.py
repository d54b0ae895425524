"""The modules that a model owns: one tensor per kind of matrix, module index first (design section 2)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Stack:
    """One forward pass's view of a StackedLinear: the whole tensors, and one slice a module.

    The slices come from a single `unbind`: selecting `weight[i]` at every step would allocate a gradient of
    the whole pool at every step, where unbind's backward stacks the slices' gradients once.
    """

    weight: Tensor  # (M, in, out)
    bias: Tensor  # (M, out)
    weights: tuple[Tensor, ...]  # M times (in, out)
    biases: tuple[Tensor, ...]  # M times (out,)

    @property
    def out_features(self) -> int:
        """Width of a row that comes out."""
        return self.bias.shape[1]

    def apply(self, x: Tensor, module: int) -> Tensor:
        """Rows x (m, in) through one module: (m, out)."""
        return torch.addmm(self.biases[module], x, self.weights[module])

    def columns(self, start: int, stop: int | None = None) -> "Stack":
        """The same modules with only the outputs from column `start` on, or up to before `stop`.

        Once a pass, for the reason above.
        """
        return stack_of(self.weight[:, :, start:stop], self.bias[:, start:stop])


def stack_of(weight: Tensor, bias: Tensor) -> Stack:
    """The view of weights (M, in, out) and biases (M, out); under autocast in its precision, cast once a pass."""
    if torch.is_autocast_enabled(weight.device.type):
        kind = torch.get_autocast_dtype(weight.device.type)
        weight, bias = weight.to(kind), bias.to(kind)
    return Stack(weight, bias, weight.unbind(0), bias.unbind(0))


class StackedLinear(nn.Module):
    """M linear maps of one shape: weight (M, in, out), bias (M, out).

    residual: what comes out is added to the residual stream, so that the weights start smaller, as GPT-2's do.
    (Known here because transformers initialises no module of custom code that has no parameters of its own.)
    """

    def __init__(self, num_modules: int, in_features: int, out_features: int, residual: bool = False) -> None:
        super().__init__()
        self.residual = residual
        self.weight = nn.Parameter(torch.empty(num_modules, in_features, out_features))
        self.bias = nn.Parameter(torch.empty(num_modules, out_features))

    def forward(self) -> Stack:
        """The view that one forward pass works on. Read here, so that sharding hooks see the parameters."""
        return stack_of(self.weight, self.bias)

    def extra_repr(self) -> str:
        """Sizes, for print(model)."""
        modules, inside, out = self.weight.shape
        return f"num_modules={modules}, in_features={inside}, out_features={out}"


class MhaPool(nn.Module):
    """The attention modules: query, key and value projection and output projection, LayerNorm folded in."""

    is_causal = True  # read by transformers' attention functions, which take this module

    def __init__(self, num_modules: int, width: int) -> None:
        super().__init__()
        self.qkv = StackedLinear(num_modules, width, 3 * width)
        self.out = StackedLinear(num_modules, width, width, residual=True)


class FfnPool(nn.Module):
    """The feed-forward modules: two matrices with the activation between, LayerNorm folded in."""

    def __init__(self, num_modules: int, width: int, inner: int) -> None:
        super().__init__()
        self.up = StackedLinear(num_modules, width, inner)
        self.down = StackedLinear(num_modules, inner, width, residual=True)
