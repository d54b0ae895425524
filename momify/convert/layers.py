"""GPT-2 tensors -> stacked layers with LayerNorms and attention scales in the matrices (design section 2)."""

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class LayerSettings:
    """What of a GPT-2 config the taking apart depends on."""

    num_layers: int
    num_heads: int
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False


@dataclass(frozen=True)
class Layers:
    """All L layers stacked, layer index first, inputs on the left: y = x @ weight + bias. I: inner width."""

    qkv_weight: Tensor  # (L, D, 3D)
    qkv_bias: Tensor  # (L, 3D)
    out_weight: Tensor  # (L, D, D)
    out_bias: Tensor  # (L, D)
    up_weight: Tensor  # (L, D, I)
    up_bias: Tensor  # (L, I)
    down_weight: Tensor  # (L, I, D)
    down_bias: Tensor  # (L, D)

    @property
    def num_layers(self) -> int:
        return self.qkv_weight.shape[0]

    @property
    def num_weights(self) -> int:
        """Weights and biases of all modules."""
        return sum(getattr(self, part.name).numel() for part in fields(self))

    def to(self, device: torch.device | str) -> "Layers":
        """The same on a device."""
        return Layers(*(getattr(self, part.name).to(device) for part in fields(self)))


@dataclass(frozen=True)
class Frame:
    """The source around its layers: embeddings, last LayerNorm, head (the embedding itself when tied)."""

    wte: Tensor  # (V, D)
    wpe: Tensor  # (P, D)
    ln_f_weight: Tensor  # (D,)
    ln_f_bias: Tensor  # (D,)
    head: Tensor  # (V, D)

    def to(self, device: torch.device | str) -> "Frame":
        """The same on a device; a head that is the embedding stays it."""
        moved = [getattr(self, part.name).to(device) for part in fields(self)]
        return Frame(*moved[:-1], head=moved[0] if self.head is self.wte else moved[-1])


def take_frame(tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> Frame:
    """The parts of a GPT-2 around its layers, in `dtype`; names as in `Source.tensors`."""
    wte = tensors["wte.weight"].to(dtype)
    return Frame(
        wte=wte,
        wpe=tensors["wpe.weight"].to(dtype),
        ln_f_weight=tensors["ln_f.weight"].to(dtype),
        ln_f_bias=tensors["ln_f.bias"].to(dtype),
        head=tensors["lm_head.weight"].to(dtype) if "lm_head.weight" in tensors else wte,
    )


def take_apart(tensors: Mapping[str, Tensor], settings: LayerSettings, dtype: torch.dtype = torch.float32) -> Layers:
    """Fold every layer's LayerNorms and attention scale in float64 and stack the layers, rounded to `dtype`.

    Afterwards a layer needs its input normalised to mean 0 and variance 1 only, and attention scaled by
    head_dim**-0.5 always (design section 2).
    """
    stacks: list[Tensor] = []
    for layer in range(settings.num_layers):
        qkv_weight, qkv_bias = _fold_norm(tensors, f"h.{layer}.ln_1", f"h.{layer}.attn.c_attn")
        width = qkv_weight.shape[0]
        qkv_weight[:, :width] *= query_factor(settings, layer, width)
        qkv_bias[:width] *= query_factor(settings, layer, width)
        out = _affine(tensors, f"h.{layer}.attn.c_proj")
        up = _fold_norm(tensors, f"h.{layer}.ln_2", f"h.{layer}.mlp.c_fc")
        down = _affine(tensors, f"h.{layer}.mlp.c_proj")
        parts = (qkv_weight, qkv_bias, *out, *up, *down)
        if not stacks:  # filled in place: a list to stack later would hold every layer twice
            stacks = [torch.empty((settings.num_layers, *part.shape), dtype=dtype) for part in parts]
        for stack, part in zip(stacks, parts, strict=True):
            stack[layer] = part
    return Layers(*stacks)


def query_factor(settings: LayerSettings, layer: int, width: int) -> float:
    """GPT-2's own attention scale in `layer` over head_dim**-0.5, the scale that a MoM always applies."""
    usual = (width // settings.num_heads) ** -0.5
    scale = usual if settings.scale_attn_weights else 1.0
    if settings.scale_attn_by_inverse_layer_idx:
        scale /= layer + 1
    return scale / usual


def _affine(tensors: Mapping[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    """Weight (in, out) and bias (out,) called `name`, as new float64 tensors (Conv1D keeps inputs first)."""
    return tensors[f"{name}.weight"].to(torch.float64, copy=True), tensors[f"{name}.bias"].double().clone()


def _fold_norm(tensors: Mapping[str, Tensor], norm: str, name: str) -> tuple[Tensor, Tensor]:
    """W' = diag(gamma) W, b' = b + beta W in float64: LayerNorm `norm` moved into the projection `name`."""
    weight, bias = _affine(tensors, name)
    gamma, beta = tensors[f"{norm}.weight"].double(), tensors[f"{norm}.bias"].double()
    return gamma[:, None] * weight, bias + beta @ weight
