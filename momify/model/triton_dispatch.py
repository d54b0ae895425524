"""Routed execution by Triton kernels on NVIDIA GPUs, with gradients; the host waits for nothing.

A projection is one launch: gather, grouped product, bias, activation, gate and scatter. A feed-forward module is two,
and what its activation needs for the backward pass is the one tensor that is kept.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .plan import Plan
from .pool import Stack
from .triton_kernels import triton

if triton is not None:
    from .triton_kernels import rows_kernel, weights_kernel

KERNEL_ACTIVATIONS = ("gelu_tanh", "gelu", "relu", "silu")


def has_triton(device: torch.device) -> bool:
    """Whether the kernels can run on `device`: a GPU, or anything under Triton's interpreter."""
    return triton is not None and (device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1")


@dataclass(frozen=True)
class Rows:
    """Where the rows of a plan come from and go to, on the device."""

    ends: Tensor  # (M,) int32
    tokens: Tensor  # (m,)
    picks: Tensor  # (m,)
    gates: Tensor | None  # (m,), without a gradient
    width: int  # K
    keep: bool
    """Whether a backward pass may come."""

    @property
    def count(self) -> int:
        """m, with the SKIPs."""
        return self.picks.shape[0]


def triton_routed(
    x: Tensor, plan: Plan, layers: Sequence[Stack], activation: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """`dispatch.routed` by Triton kernels, for float32, bfloat16 and float16."""
    x = x.to(layers[0].weight.dtype)  # under autocast a LayerNorm gives float32, the weights are cast once a pass
    learned = plan.gates is not None and plan.gates.requires_grad and torch.is_grad_enabled()
    gates = None if learned else plan.gates
    rows = Rows(_ends(plan), plan.tokens, plan.picks, gates, plan.width, torch.is_grad_enabled())
    name = getattr(activation, "kernel", None)
    if len(layers) == 1:
        y = Projection.apply(x, layers[0].weight, layers[0].bias, rows)
    elif len(layers) == 2 and name in KERNEL_ACTIVATIONS:
        up, down = layers
        y = FeedForward.apply(x, up.weight, up.bias, down.weight, down.bias, rows, activation)
    else:
        y = _unfused(x, layers, rows, activation)
    y = y.view(x.shape[0], plan.width, y.shape[1])
    if learned:  # the gradient of a gate needs the product without it
        flat = plan.gates.new_zeros(rows.count).index_copy(0, plan.picks, plan.gates)
        y = y * flat.view(x.shape[0], plan.width, 1).to(y.dtype)
    return y[:, 0] if plan.width == 1 else y.sum(1)


def _ends(plan: Plan) -> Tensor:
    if plan.ends is not None:
        return plan.ends
    sizes = torch.tensor(plan.sizes, dtype=torch.int32, device=plan.picks.device)
    return sizes.cumsum(0, dtype=torch.int32)


def _unfused(x: Tensor, layers: Sequence[Stack], rows: Rows, activation: Callable[[Tensor], Tensor] | None) -> Tensor:
    """A chain whose activation the kernels do not know: one projection after the other, in the order of the picks."""
    plain = replace(rows, gates=None)
    for layer in layers[:-1]:
        x = Projection.apply(x, layer.weight, layer.bias, plain)
        x = x if activation is None else activation(x)
        plain = replace(plain, tokens=rows.picks, width=1)
    return Projection.apply(x, layers[-1].weight, layers[-1].bias, replace(plain, gates=rows.gates))


class Projection(torch.autograd.Function):
    """One stacked linear map: rows of x (n, D) through their modules, to (n*K, E) in the order of the picks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, rows: Rows) -> Tensor:
        """Zeros where a pick is SKIP."""
        ctx.rows = rows
        ctx.save_for_backward(x, weight)
        y = x.new_zeros(x.shape[0] * rows.width, weight.shape[2])
        return multiply(x, weight, rows, Launch(bias=bias, gather=rows.tokens, scatter=rows.picks, gate=True), y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, weight and bias."""
        (x, weight), rows, grad = ctx.saved_tensors, ctx.rows, grad.contiguous()
        d_x = d_weight = d_bias = None
        if ctx.needs_input_grad[0]:
            d_x = _back_to_tokens(grad, weight, rows, Launch(gather=rows.picks, scatter=rows.picks, gate=True))
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            d_weight, d_bias = multiply_transposed(
                x, grad, rows, Launch(gather=rows.tokens, scatter=rows.picks, gate=True)
            )
        return d_x, d_weight, d_bias, None


class FeedForward(torch.autograd.Function):
    """Two stacked linear maps with an activation between: x (n, D) to (n*K, E) in the order of the picks."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, down_bias: Tensor, rows: Rows, activation: Any
    ) -> Tensor:
        """Zeros where a pick is SKIP."""
        ctx.rows, ctx.activation = rows, activation
        before = x.new_empty(rows.count, up.shape[2]) if rows.keep else None
        launch = Launch(bias=up_bias, gather=rows.tokens, activation=activation.kernel, before=before)
        h = multiply(x, up, rows, launch, x.new_empty(rows.count, up.shape[2]))
        y = x.new_zeros(x.shape[0] * rows.width, down.shape[2])
        multiply(h, down, rows, Launch(bias=down_bias, scatter=rows.picks, gate=True), y)
        ctx.save_for_backward(x, up, down, before)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x and of both maps; the inner activations are computed anew."""
        (x, up, down, before), rows, grad = ctx.saved_tensors, ctx.rows, grad.contiguous()
        launch = Launch(gather=rows.picks, gate=True, activation=ctx.activation.kernel, before=before, slope=True)
        d_before = multiply(grad, down.transpose(1, 2), rows, launch, torch.empty_like(before))
        d_x = d_up = d_up_bias = d_down = d_down_bias = None
        if any(ctx.needs_input_grad[3:5]):
            h = ctx.activation(before)
            d_down, d_down_bias = multiply_transposed(h, grad, rows, Launch(scatter=rows.picks, gate=True))
        if any(ctx.needs_input_grad[1:3]):
            d_up, d_up_bias = multiply_transposed(x, d_before, rows, Launch(gather=rows.tokens))
        if ctx.needs_input_grad[0]:
            d_x = _back_to_tokens(d_before, up, rows, Launch(scatter=rows.picks))
        return d_x, d_up, d_up_bias, d_down, d_down_bias, None, None


def _back_to_tokens(grad: Tensor, weight: Tensor, rows: Rows, launch: "Launch") -> Tensor:
    """The gradient of the tokens (n, D): each pick's, summed over a token's picks."""
    places = grad.new_zeros(rows.count, weight.shape[1])
    multiply(grad, weight.transpose(1, 2), rows, launch, places)
    return places if rows.width == 1 else places.view(-1, rows.width, weight.shape[1]).sum(1)


@dataclass(frozen=True)
class Launch:
    """What a kernel does beside multiplying."""

    bias: Tensor | None = None
    gather: Tensor | None = None
    scatter: Tensor | None = None
    gate: bool = False
    """Whether rows are weighed by the plan's gates, if it has any."""
    activation: str | None = None
    before: Tensor | None = None
    """What goes into the activation: written, or with `slope` read."""
    slope: bool = False


def multiply(x: Tensor, weight: Tensor, rows: Rows, launch: Launch, y: Tensor) -> Tensor:
    """Fill y with the rows of x through weight (M, in, out); returns y."""
    modules, inner, outputs = weight.shape
    if not rows.count:
        return y
    tile = row_tile(rows.count, modules, x.element_size())
    tiles = triton.cdiv(rows.count, tile["ROWS"]) + modules  # each module may leave one tile half full
    columns = triton.cdiv(outputs, tile["OUTPUTS"])
    x = x if x.stride(1) == 1 else x.contiguous()
    gates = rows.gates if launch.gate else None
    any_, bias, before = rows.ends, launch.bias, launch.before
    with torch.cuda.device_of(x):  # Triton launches on the current device, be it another
        rows_kernel[(tiles * columns,)](
            x, weight, _or(bias, any_), y, _or(before, y), _or(launch.gather, any_), _or(launch.scatter, any_),
            _or(gates, any_), rows.ends, inner, outputs, x.stride(0), *weight.stride(),
            0 if bias is None else bias.stride(0), y.stride(0), 0 if before is None else before.stride(0),
            MODULES=modules, SPAN=triton.next_power_of_2(modules), GATHER=launch.gather is not None,
            SCATTER=launch.scatter is not None, BIAS=bias is not None, GATES=gates is not None,
            ACTIVATION=launch.activation or "", SAVE=before is not None and not launch.slope, SLOPE=launch.slope,
            PRECISION=precision(), TILES=columns, **tile,
        )  # fmt: skip
    return y


def multiply_transposed(x: Tensor, grad: Tensor, rows: Rows, launch: Launch) -> tuple[Tensor, Tensor]:
    """Gradients of weights (M, in, out) and biases (M, out) from inputs x (., in) and gradients grad (., out)."""
    modules, inner, outputs = rows.ends.shape[0], x.shape[1], grad.shape[1]
    weight, bias = x.new_empty(modules, inner, outputs), x.new_empty(modules, outputs)
    tile = weight_tile(x.element_size())
    x = x if x.stride(1) == 1 else x.contiguous()
    gates = rows.gates if launch.gate else None
    grid = (triton.cdiv(inner, tile["INNER"]) * triton.cdiv(outputs, tile["OUTPUTS"]), modules)
    with torch.cuda.device_of(x):
        weights_kernel[grid](
            x, grad, weight, bias, _or(launch.gather, rows.ends), _or(launch.scatter, rows.ends), _or(gates, rows.ends),
            rows.ends, inner, outputs, x.stride(0), grad.stride(0), GATHER=launch.gather is not None,
            SCATTER=launch.scatter is not None, GATES=gates is not None, PRECISION=precision(), **tile,
        )  # fmt: skip
    return weight, bias


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """A kernel takes a pointer for each argument; one that it does not read may be any."""
    return other if tensor is None else tensor


def precision() -> str:
    """How float32 is multiplied on the tensor cores: as torch does."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


def row_tile(rows: int, modules: int, item: int) -> dict[str, int]:
    """Tile sizes of rows_kernel for `rows` rows over `modules` modules, `item` bytes a value."""
    each = rows / modules
    height = 16 if each <= 16 else 32 if each <= 48 else 64 if each <= 256 else 128
    if item == 4:  # float32 takes twice the registers: larger tiles spill on an A100 (the test suite compiles them)
        height = min(height, 64)
    wide = 64 if height == 16 or item == 4 else 128
    return {
        "ROWS": height, "OUTPUTS": wide, "INNER": 128 // item, "num_warps": 8 if height == 128 else 4, "num_stages": 3,
    }  # fmt: skip


def weight_tile(item: int) -> dict[str, int]:
    """Tile sizes of weights_kernel."""
    wide = 128 if item < 4 else 64
    return {"ROWS": 64 if item < 4 else 16, "OUTPUTS": wide, "INNER": wide, "num_warps": 8, "num_stages": 3}
