"""A MoM's tensors as those of a GPT-2: modules as they are, step deltas and patches folded in float64.

D width, I inner width, r rank of a patch or delta.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.activations import ACT2FN

from momify.convert.stored_mom import EMBEDDING, HEAD
from momify.export.packing import Layer, is_patch
from momify.model.config import Kind

Affine = tuple[Tensor, Tensor]
"""Weight (in, out) and bias (out,): y = x @ weight + bias, the orientation that GPT-2's Conv1D has too."""


@dataclass(frozen=True)
class Place:
    """A matrix of a GPT-2 layer: its name there, and where the MoM's pool has its like."""

    name: str
    kind: Kind
    matrix: str


UP, DOWN = Place("mlp.c_fc", "ffn", "up"), Place("mlp.c_proj", "ffn", "down")
PLACES = (Place("attn.c_attn", "mha", "qkv"), Place("attn.c_proj", "mha", "out"), UP, DOWN)


def carries_linear(activation: str) -> bool:
    """Whether act(z) - act(-z) = z for all z, so that two halves of a feed-forward make a linear map.

    True of z times a function s with s(z) + s(-z) = 1 (GELU, SiLU) and of ReLU; measured here, not known by name.
    """
    z = torch.logspace(-4, 4, 801, dtype=torch.float64)
    act = ACT2FN[activation]
    return torch.allclose(act(z) - act(-z), z, rtol=1e-9, atol=0.0)


def patch_feed_forward(weight_in: Tensor, weight_out: Tensor, bias: Tensor, inner: int) -> tuple[Affine, Affine]:
    """The patch x -> (x A) B + mu as a feed-forward of inner width I >= 2r: up [A, -A, 0], down [B; -B; 0] + mu.

    Exact for activations that `carries_linear` is true of. A (D, r), B (r, D), mu (D,).
    """
    room = inner - 2 * weight_in.shape[1]
    up = F.pad(torch.cat([weight_in, -weight_in], dim=1), (0, room))  # (D, I)
    down = F.pad(torch.cat([weight_out, -weight_out]), (0, 0, 0, room))  # (I, D)
    return (up, up.new_zeros(inner)), (down, bias)


def with_delta(module: Affine, delta: tuple[Tensor, Tensor, Tensor]) -> Affine:
    """W + A B and b + c, in float64."""
    weight_in, weight_out, bias = (part.double() for part in delta)
    return torch.addmm(module[0].double(), weight_in, weight_out), module[1].double() + bias


def gpt2_state(
    tensors: Mapping[str, Tensor], layers: Sequence[Layer], inner: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The GPT-2's tensors of `dtype` under its names; a module that several steps run is there once for each."""
    ours = [EMBEDDING, "model.wpe.weight", "model.ln_f.weight", "model.ln_f.bias", *([HEAD] if HEAD in tensors else [])]
    state = {name.replace("model.", "transformer."): tensors[name].to(dtype) for name in ours}
    width = state["transformer.ln_f.bias"].shape[0]
    for index in range(len(layers)):
        for norm in ("ln_1", "ln_2"):  # their affine part lies in the modules
            affine = torch.ones(width, dtype=dtype), torch.zeros(width, dtype=dtype)
            state |= _named(f"transformer.h.{index}.{norm}", affine)
    for place in PLACES:
        for index, affine in enumerate(_affines(tensors, layers, place, inner)):
            # a copy: slices of one stack share memory, which a file of tensors cannot
            weight, bias = (part.to(dtype, copy=True) for part in affine)
            state |= _named(f"transformer.h.{index}.{place.name}", (weight, bias))
    return state


def _affines(tensors: Mapping[str, Tensor], layers: Sequence[Layer], place: Place, inner: int) -> Iterator[Affine]:
    """Each layer's matrix at `place`; zeros where it has nothing to run."""
    name = f"model.{place.kind}.{place.matrix}"
    weights, biases = tensors[f"{name}.weight"], tensors[f"{name}.bias"]  # (M, in, out), (M, out)
    for layer in layers:
        half = layer.attention if place.kind == "mha" else layer.feed_forward
        if half is None:
            yield torch.zeros_like(weights[0]), torch.zeros_like(biases[0])
        elif is_patch(half):
            maps = _low_rank(tensors, f"model.{half.kind}_patch", half.patch)
            yield patch_feed_forward(*maps, inner)[(UP, DOWN).index(place)]
        elif half.delta is not None:
            delta = _low_rank(tensors, f"model.{place.kind}_delta.{place.matrix}", half.delta)
            yield with_delta((weights[half.home], biases[half.home]), delta)
        else:
            yield weights[half.home], biases[half.home]


def _low_rank(tensors: Mapping[str, Tensor], name: str, row: int) -> tuple[Tensor, Tensor, Tensor]:
    """One step's factors A (in, r), B (r, out) and bias (out,)."""
    return tuple(tensors[f"{name}.{part}"][row] for part in ("weight_in", "weight_out", "bias"))


def _named(name: str, affine: Affine) -> dict[str, Tensor]:
    return {f"{name}.weight": affine[0], f"{name}.bias": affine[1]}
