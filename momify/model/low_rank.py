"""Small parts of single steps: what stands in for a module that is skipped, or tells two uses of one module apart.

A patch is what SKIP adds at its step, x_hat -> (x_hat A) B + mu; a delta changes the matrices of a module that several
steps share at one of them, x (W + A B) + b + c. Both are one low-rank map a step, and are never folded.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .dispatch import Backend, routed
from .layout import HalfStep
from .picking import Picks
from .plan import Plan, make_plan, static_plan
from .pool import Stack


@dataclass(frozen=True)
class StepMap:
    """One step's low-rank map, taken out of the stack for one forward pass."""

    weight_in: Tensor  # (in, r)
    weight_out: Tensor  # (r, out)
    bias: Tensor  # (out,)

    def apply(self, x: Tensor) -> Tensor:
        """Rows x (m, in) through the map: (m, out)."""
        return torch.addmm(self.bias, x @ self.weight_in, self.weight_out)

    def stacks(self) -> tuple[Stack, Stack]:
        """The two factors as a chain of pools of one module, for `dispatch.routed`."""
        zeros = self.bias.new_zeros(1, self.weight_in.shape[1])
        return (
            Stack(self.weight_in.unsqueeze(0), zeros, (self.weight_in,), (zeros[0],)),
            Stack(self.weight_out.unsqueeze(0), self.bias.unsqueeze(0), (self.weight_out,), (self.bias,)),
        )


class LowRank(nn.Module):
    """S low-rank maps: weight_in (S, in, r), weight_out (S, r, out), bias (S, out); at the start they do nothing."""

    def __init__(self, steps: int, in_features: int, rank: int, out_features: int) -> None:
        super().__init__()
        self.weight_in = nn.Parameter(torch.empty(steps, in_features, rank))
        self.weight_out = nn.Parameter(torch.zeros(steps, rank, out_features))
        self.bias = nn.Parameter(torch.zeros(steps, out_features))

    def forward(self) -> tuple[StepMap, ...]:
        """The maps one by one, S of them; under autocast in its precision, cast once a pass.

        Read here, so that sharding hooks see the parameters, and by one `unbind`, as a `Stack`'s slices.
        """
        tensors = [self.weight_in, self.weight_out, self.bias]
        device = self.bias.device.type
        if torch.is_autocast_enabled(device):
            tensors = [tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors]
        return tuple(StepMap(*slices) for slices in zip(*(tensor.unbind(0) for tensor in tensors), strict=True))

    def extra_repr(self) -> str:
        """Sizes, for print(model)."""
        steps, inside, rank = self.weight_in.shape
        return f"steps={steps}, in_features={inside}, rank={rank}, out_features={self.bias.shape[1]}"


class MhaDelta(nn.Module):
    """The deltas of `steps` attention halves: of query, key and value together, and of the output projection."""

    def __init__(self, steps: int, width: int, rank: int) -> None:
        super().__init__()
        self.qkv = LowRank(steps, width, rank, 3 * width)
        self.out = LowRank(steps, width, rank, width)

    def forward(self) -> tuple[tuple[StepMap, StepMap], ...]:
        """For each step the maps of both projections."""
        return tuple(zip(self.qkv(), self.out(), strict=True))


class FfnDelta(nn.Module):
    """The deltas of `steps` feed-forward halves: of both matrices."""

    def __init__(self, steps: int, width: int, inner: int, rank: int) -> None:
        super().__init__()
        self.up = LowRank(steps, width, rank, inner)
        self.down = LowRank(steps, inner, rank, width)

    def forward(self) -> tuple[tuple[StepMap, StepMap], ...]:
        """For each step the maps of both projections."""
        return tuple(zip(self.up(), self.down(), strict=True))


@dataclass(frozen=True)
class AdaptedStack:
    """A Stack as one static step sees it: each row gets that step's delta beside its module."""

    stack: Stack
    delta: StepMap

    @property
    def out_features(self) -> int:
        """Width of a row that comes out."""
        return self.stack.out_features

    def apply(self, x: Tensor, module: int) -> Tensor:
        """Rows x (m, in) through one module and the delta: (m, out)."""
        bias = self.stack.biases[module] + self.delta.bias
        y = torch.addmm(bias, x, self.stack.weights[module])
        return y.addmm_(x @ self.delta.weight_in, self.delta.weight_out)  # in place: y is as wide as q, k and v


def patch_skipped(x_hat: Tensor, half: HalfStep, picks: Picks, patch: StepMap, backend: Backend) -> Tensor | None:
    """What `patch` adds for the tokens x_hat (n, D) that lie on SKIP: (n, D), (D,) zeros or None if nobody does.

    A token's share is its gate on SKIP, 1 where gates are constant. Only tokens with a share are computed.
    """
    plan = skip_plan(x_hat.shape[0], half, picks, backend)
    if plan.module is not None and plan.gates is None and not plan.idle:
        return patch.apply(x_hat)
    if not plan.idle:
        return routed(x_hat, plan, patch.stacks(), backend=backend)
    # the sum over no rows: several processes wait for a gradient of each parameter, be it zero
    return patch.apply(x_hat[:0]).sum(0) if torch.is_grad_enabled() else None


def skip_plan(tokens: int, half: HalfStep, picks: Picks, backend: Backend) -> Plan:
    """Those of n = `tokens` with a share of SKIP as the rows of a pool of one module, weighed by their shares."""
    if picks.gates is None and picks.plan.idle:
        return static_plan(0, 1, tokens)
    if picks.gates is None and picks.plan.sizes is not None and picks.plan.rows == tokens:
        return Plan(sizes=(0,))  # nobody skips
    if picks.gates is None:
        return make_plan((picks.modules != half.skip).long(), None, 1, backend.wait)
    shares = (picks.gates * (picks.modules == half.skip)).sum(dim=1, keepdim=True)  # (n, 1)
    # a share of NaN is computed: a loss of NaN can be told and handled, a token that silently adds nothing cannot
    return make_plan((shares == 0).long(), shares, 1, backend.wait)
