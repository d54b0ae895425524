"""The source taken apart, in a form that runs half-layer by half-layer.

Half-layers are numbered in the order they run: 2 l is the attention of layer l, 2 l + 1 its feed-forward.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from momify.convert.layers import Frame, Layers

LOGIT_VALUES = 1 << 22  # logits held at once: 16 MB in float32


@dataclass(frozen=True)
class Network:
    """The source in a form that runs: folded layers and what surrounds them."""

    layers: Layers
    frame: Frame
    num_heads: int
    activation: Callable[[Tensor], Tensor]
    epsilon: float

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.frame.wte.device

    @property
    def num_weights(self) -> int:
        """Of all modules, embeddings and the head; one that is the embedding counts twice."""
        frame = self.frame
        return self.layers.num_weights + sum(part.numel() for part in (frame.wte, frame.wpe, frame.head))

    def to(self, device: torch.device | str) -> "Network":
        """The same on a device."""
        return replace(self, layers=self.layers.to(device), frame=self.frame.to(device))


def embed(frame: Frame, tokens: Tensor) -> Tensor:
    """(B, T) tokens -> (B, T, D) first residual."""
    return frame.wte[tokens] + frame.wpe[: tokens.shape[1]]


@dataclass(frozen=True)
class HalfWeights:
    """One half-layer's matrices, inputs on the left: q, k, v and out, or up and down. E: 3D or the inner width I."""

    into: Tensor  # (D, E)
    into_bias: Tensor  # (E,)
    out: Tensor  # (D or I, D)
    out_bias: Tensor  # (D,)


def half_weights(layers: Layers, half: int) -> HalfWeights:
    """The matrices of half-layer `half`, in the memory of `layers`."""
    at = half // 2
    if half % 2:
        return HalfWeights(layers.up_weight[at], layers.up_bias[at], layers.down_weight[at], layers.down_bias[at])
    return HalfWeights(layers.qkv_weight[at], layers.qkv_bias[at], layers.out_weight[at], layers.out_bias[at])


def half_layer_update(network: Network, half: int, x: Tensor) -> Tensor:
    """What half-layer `half` adds to the residual x (B, T, D); same shape."""
    return half_update(network, half, half_weights(network.layers, half), x)


def half_update(network: Network, half: int, weights: HalfWeights, x: Tensor) -> Tensor:
    """What a half-layer of the kind of `half` with these weights adds to the residual x (B, T, D); same shape."""
    return _project(half_features(network, half, weights, x), weights.out, weights.out_bias)


def half_features(network: Network, half: int, weights: HalfWeights, x: Tensor) -> Tensor:
    """What enters the output projection of a half-layer of the kind of `half`: values (B, T, D), or inner (B, T, I)."""
    hidden = _project(normalised(network, x), weights.into, weights.into_bias)
    if half % 2:
        return network.activation(hidden)
    q, k, v = hidden.unflatten(-1, (3, network.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (B, N, T, D/N) each
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


def normalised(network: Network, x: Tensor) -> Tensor:
    """x_hat: the residual x (B, T, D) with mean 0 and variance 1, which all half-layers read."""
    return F.layer_norm(x, x.shape[-1:], eps=network.epsilon)


def last_norm(network: Network, x: Tensor) -> Tensor:
    """What the head reads of the last residual x (B, T, D); same shape."""
    frame = network.frame
    return F.layer_norm(x, x.shape[-1:], frame.ln_f_weight, frame.ln_f_bias, network.epsilon)


def _project(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x (B, T, E) @ weight (E, F) + bias, as one matrix product."""
    return torch.addmm(bias, x.flatten(0, 1), weight).unflatten(0, x.shape[:2])


def token_losses(network: Network, x: Tensor, tokens: Tensor) -> float:
    """Sum of next-token cross-entropies of the last residual x (B, T, D), logits a piece at a time."""
    frame = network.frame
    rows, targets = last_norm(network, x)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
    piece = max(1, LOGIT_VALUES // frame.head.shape[0])
    losses = (
        F.cross_entropy(part @ frame.head.T, target, reduction="none").double().sum()
        for part, target in zip(rows.split(piece), targets.split(piece), strict=True)
    )
    return float(sum(losses))
