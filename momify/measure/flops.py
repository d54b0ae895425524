"""Multiply-adds of one forward pass as fvcore and torch's FlopCounterMode see them, attention included.

Neither counter is right by itself (design section 4): both leave out scaled_dot_product_attention on the CPU.
The formulas added here make both equal the closed form of `cost.py`. A multiply-add is one MAC and two FLOPs.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from math import prod
from typing import Any, Literal

import torch
from fvcore.nn import FlopCountAnalysis
from torch import Tensor, nn
from torch.utils.flop_counter import (
    FlopCounterMode,
    flop_registry,
    register_flop_formula,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from momify.measure.mode import evaluating

OperatorKind = Literal["elementwise", "movement", "unknown"]

# Operators that compute, but hold no multiply-add of a matrix product: activations, reductions, comparisons.
# fmt: off
ELEMENTWISE = frozenset((
    "__and__", "__or__", "abs", "add", "add_", "addcmul", "all", "amax", "amin", "any", "argmax",
    "argsort", "bincount", "bitwise_and", "bitwise_or", "celu", "clamp_max", "clamp_min", "cumsum", "div",
    "div_", "elu", "erf", "exp", "exp_", "gelu", "hardtanh", "index_add", "index_add_", "isin", "isinf",
    "isnan", "le", "leaky_relu", "lerp", "log", "log_softmax", "logical_and", "logical_not", "logical_or",
    "logsumexp", "lt", "max", "mean", "min", "mish", "mul", "mul_", "nan_to_num", "ne", "neg", "norm",
    "pow", "prod", "reciprocal", "relu6", "rsqrt", "rsub", "scatter_add", "scatter_add_", "searchsorted",
    "sigmoid", "silu", "softmax", "softplus", "sort", "sqrt", "square", "std", "sub", "sub_", "sum",
    "tanh", "topk", "tril", "triu", "var", "var_mean", "where",
))
# fmt: on
# Operators that only look up, copy or shape, and are not in fvcore's own list of these.
# fmt: off
MOVEMENT = frozenset((
    "alias", "as_strided", "broadcast_to", "clone", "diff", "embedding", "empty_like", "expand_as", "fill",
    "fill_", "index_copy", "index_copy_", "index_fill", "index_put", "index_select", "item", "lift_fresh",
    "masked_fill_", "masked_scatter", "masked_select", "movedim", "new_ones", "numpy_T", "ones_like",
    "pad", "repeat", "repeat_interleave", "resolve_conj", "scatter", "scatter_", "take", "take_along_dim",
    "tensor_split", "tile", "unflatten", "unsafe_chunk", "unsafe_split", "view_as", "zero_",
))
# fmt: on


@dataclass(frozen=True)
class UnsupportedOperator:
    """An operator that fvcore does not count; multiply-adds may hide in one of kind `unknown`."""

    name: str
    calls: int
    kind: OperatorKind

    @property
    def arithmetic(self) -> bool:
        """Whether it computes at all; elementwise work is no multiply-add by the usual convention."""
        return self.kind != "movement"


@dataclass(frozen=True)
class Count:
    """MACs of one forward pass by one counter, by operator, with what the counter left out."""

    macs: int
    by_operator: dict[str, int] = field(default_factory=dict)
    unsupported: tuple[UnsupportedOperator, ...] = ()

    @property
    def flops(self) -> int:
        """Two per multiply-add."""
        return 2 * self.macs

    @property
    def unknown(self) -> tuple[str, ...]:
        """Uncounted operators that may hold multiply-adds: with any of them `macs` is a lower bound."""
        return tuple(op.name for op in self.unsupported if op.kind == "unknown")


class _Tensors(nn.Module):
    """A causal LM as fvcore can trace it: ids in, tensors out, no cache, no output object.

    The routers' logits are among them, since a trace drops work that no output depends on: where all tokens
    choose the same module, nothing but the (frozen) control flow depends on a router.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.routed = getattr(getattr(model, "config", None), "model_type", None) == "mom"

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        """Logits, and those of the routers."""
        if not self.routed:
            return (self.model(input_ids=input_ids, use_cache=False).logits,)
        out = self.model(input_ids=input_ids, use_cache=False, output_router_logits=True)
        return out.logits, *out.router_logits


def count_fvcore(model: nn.Module, input_ids: Tensor) -> Count:
    """MACs of `model` on `input_ids` (B, T) by fvcore's trace; right for this input's routing only."""
    with evaluating(model), torch.no_grad():
        analysis = FlopCountAnalysis(_Tensors(model), (input_ids,))
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        analysis.set_op_handle(
            "aten::scaled_dot_product_attention", _sdpa_macs,
            "aten::_grouped_mm", _grouped_macs,
            "aten::baddbmm", _baddbmm_macs,
            "aten::addmm_", _baddbmm_macs,
            "aten::layer_norm", _nothing,
        )  # fmt: skip
        by_operator = {name: int(macs) for name, macs in analysis.by_operator().items() if macs}
        unsupported = analysis.unsupported_ops()
    named = [UnsupportedOperator(name, calls, classify(name)) for name, calls in sorted(unsupported.items())]
    return Count(sum(by_operator.values()), by_operator, tuple(named))


def count_torch(model: nn.Module, input_ids: Tensor) -> Count:
    """MACs (FLOPs / 2) of `model` on `input_ids` (B, T) by torch's FlopCounterMode."""
    register_formulas()
    with evaluating(model), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=input_ids, use_cache=False)
    operators = counter.get_flop_counts().get("Global", {})
    by_operator = {str(name).removeprefix("aten."): flops // 2 for name, flops in operators.items()}
    return Count(counter.get_total_flops() // 2, by_operator)


def classify(operator: str) -> OperatorKind:
    """What an operator that fvcore left out does; a name in no list is unknown, never taken for harmless."""
    namespace, _, name = operator.rpartition("::")
    if namespace != "aten":
        return "unknown"  # a custom operator, a scripted function or an autograd.Function
    if name in MOVEMENT:
        return "movement"
    return "elementwise" if name in ELEMENTWISE else "unknown"


@cache
def register_formulas() -> None:
    """Teach torch's counter the CPU's attention and products that it leaves out: global to the process, so once."""
    aten = torch.ops.aten
    formulas: dict[str, Callable[..., int]] = {
        "_scaled_dot_product_flash_attention_for_cpu": _sdpa_flops,
        "_scaled_dot_product_flash_attention_for_cpu_backward": _sdpa_backward_flops,
        "_grouped_mm": _grouped_flops,
        "addmm_": _addmm_flops,
    }
    for name, formula in formulas.items():
        operator = getattr(aten, name, None)  # an older or newer torch may lack one, or know it already
        if operator is not None and operator not in flop_registry:
            register_flop_formula(operator)(formula)


def _sdpa_flops(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _sdpa_backward_flops(grad: Any, q: Any, k: Any, v: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return sdpa_backward_flop_count(grad, q, k, v)


def _grouped_flops(rows: Any, weights: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return 2 * prod(rows) * weights[-1]


def _addmm_flops(added: Any, rows: Any, weights: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return 2 * prod(rows) * weights[-1]


def _sizes(value: Any) -> list[int]:
    return value.type().sizes()


def _sdpa_macs(inputs: list[Any], outputs: list[Any]) -> int:
    """q k^T and its product with v, over the full T x S as the closed form counts it."""
    query, key, value = (_sizes(tensor) for tensor in inputs[:3])
    return prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _grouped_macs(inputs: list[Any], outputs: list[Any]) -> int:
    return prod(_sizes(inputs[0])) * _sizes(inputs[1])[-1]


def _baddbmm_macs(inputs: list[Any], outputs: list[Any]) -> int:
    return prod(_sizes(inputs[1])) * _sizes(inputs[2])[-1]


def _nothing(inputs: list[Any], outputs: list[Any]) -> int:
    """A normalisation holds no multiply-add of a product (fvcore would count 4-5 an element)."""
    return 0
