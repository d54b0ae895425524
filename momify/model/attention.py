"""The attention half-step: project each token by its modules, attend, project back (design section 2)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .cache import roomy_layer
from .dispatch import Backend, routed
from .layout import HalfStep
from .low_rank import AdaptedStack
from .picking import Picks, module_shares
from .plan import make_plan
from .pool import Stack


@dataclass(frozen=True)
class Scene:
    """What all attention half-steps of one forward pass share."""

    batch: int  # B
    tokens: int  # T
    heads: int  # N
    mask: Tensor | None  # (B, 1, T, S) bool or additive; None: plain causal
    cache: Cache | None
    implementation: str
    dropout: float
    module: nn.Module  # for transformers' attention functions, which read is_causal and training
    qkv: Stack | AdaptedStack
    query: Stack  # the first D columns of qkv
    key_value: Stack  # the others
    out: Stack | AdaptedStack
    backend: Backend


@dataclass(frozen=True)
class Attended:
    """What an attention half-step gives back."""

    output: Tensor | None  # (n, D); None: no token ran, nothing is added
    weights: Tensor | None  # (B, N, T, S); None except from eager attention
    keys: bool
    """Whether keys and values were made at all."""


def attention_half(x_hat: Tensor, half: HalfStep, picks: Picks, scene: Scene) -> Attended:
    """Attention of normalised tokens x_hat (n, D) through the modules that each picked.

    When no token runs, only what later calls need is computed: the keys and values for the cache.
    """
    runs = not picks.plan.idle
    if not runs and (scene.cache is None or half.slot is None):
        return Attended(None, None, keys=False)
    query, key_value = project(x_hat, half, picks, scene)
    key, value, keep = _remember(key_value, half, picks, scene)
    if not runs:
        return Attended(None, None, keys=True)
    query = _split_heads(query, scene)
    mask = scene.mask if keep is None else hide_keys(scene.mask, keep, query.shape[2])
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(scene.implementation, eager_attention)
    scaling = query.shape[-1] ** -0.5
    y, weights = attend(scene.module, query, key, value, mask, dropout=scene.dropout, scaling=scaling)
    y = y.reshape(x_hat.shape)  # (B, T, N, D/N) -> (n, D)
    return Attended(routed(y, picks.plan, (scene.out,), backend=scene.backend), weights, keys=True)


def project(x_hat: Tensor, half: HalfStep, picks: Picks, scene: Scene) -> tuple[Tensor, Tensor]:
    """Queries (n, D), keys and values (n, 2D) of x_hat by the picked modules, gates renormalised over them.

    The part of a token that lies on SKIP takes key and value from the home module: all of a token that skips,
    and 1 - alpha of one that explores SKIP, so that exploring leads from "only the module" to "only SKIP"
    without a jump. Where skipping tokens are masked there is no such way: an explorer's key stays visible.
    """
    width, plan = x_hat.shape[1], picks.plan
    nobody_skips = picks.gates is None and plan.sizes is not None and sum(plan.sizes) == x_hat.shape[0]
    shares = plan.weighted(module_shares(picks, half.skip))
    if half.key_home is None or nobody_skips:
        rows = routed(x_hat, shares, (scene.qkv,), backend=scene.backend)  # (n, 3D)
        return rows[:, :width], rows[:, width:]
    keys = make_plan(picks.key_modules(half), picks.gates, half.skip, scene.backend.wait)
    query = x_hat if plan.idle else routed(x_hat, shares, (scene.query,), backend=scene.backend)
    return query, routed(x_hat, keys, (scene.key_value,), backend=scene.backend)


def _split_heads(x: Tensor, scene: Scene) -> Tensor:
    """(n, D) -> (B, N, T, D/N)."""
    return x.unflatten(1, (scene.heads, -1)).unflatten(0, (scene.batch, scene.tokens)).transpose(1, 2)


def _remember(key_value: Tensor, half: HalfStep, picks: Picks, scene: Scene) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys, values (B, N, S, D/N) and keep (B, S) of this call and, from the cache, of earlier ones.

    keep is None where every key may be seen.
    """
    key, value = (_split_heads(part, scene) for part in key_value.chunk(2, dim=1))
    keep = (picks.modules != half.skip).any(dim=1).reshape(scene.batch, scene.tokens) if half.masks_keys else None
    if scene.cache is None or half.slot is None:
        return key, value, keep
    layer = roomy_layer(scene.cache, half.slot, keyed=half.masks_keys)
    if keep is None:
        return *scene.cache.update(key, value, half.slot), None
    key, value = scene.cache.update(key, value, half.slot, keep)
    return key, value, layer.keep


def hide_keys(mask: Tensor | None, keep: Tensor, queries: int) -> Tensor:
    """`mask` (B, 1, T, S) or None for plain causal, with the keys hidden where keep (B, S) is False.

    A token always sees its own key: one that runs attends at least to itself.
    """
    length = keep.shape[1]
    keys = torch.arange(length, device=keep.device)
    own = keys[length - queries :].unsqueeze(1)  # (T, 1): where each query's own key stands
    seen = keep[:, None, None, :] | (keys == own)  # (B, 1, T, S)
    if mask is None:
        return seen & (keys <= own)
    if mask.dtype == torch.bool:
        return mask & seen
    return mask.masked_fill(~seen, torch.finfo(mask.dtype).min)


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    dropout: float,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """Attention written out: output (B, T, N, D/N), weights (B, N, T, S); the softmax in at least float32."""
    scores = query @ key.transpose(-1, -2) * scaling
    if mask is not None:
        scores = scores + mask
    kind = torch.promote_types(scores.dtype, torch.float32)
    weights = F.softmax(scores, dim=-1, dtype=kind).to(value.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2), weights
