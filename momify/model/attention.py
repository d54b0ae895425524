"""The attention half-step: project each token by its modules, attend, project back (design section 2)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .cache import keyed_layer
from .dispatch import routed, subset_plan
from .layout import HalfStep
from .picking import Picks, module_shares, skip_share
from .pool import Stack


@dataclass(frozen=True)
class Scene:
    """What all attention half-steps of one forward pass share."""

    batch: int  # B
    heads: int  # N
    mask: Tensor | None  # (B, 1, T, S) bool or additive; None: plain causal
    cache: Cache | None
    implementation: str
    dropout: float
    module: nn.Module  # for transformers' attention functions, which read is_causal and training
    qkv: Stack
    out: Stack


@dataclass(frozen=True)
class Projected:
    """Queries, keys and values of one half-step's tokens."""

    query: Tensor  # (n, D)
    key_value: Tensor  # (n, 2D)
    keep: Tensor | None  # (n,) bool; None: every key may be seen
    key_rows: int  # tokens whose key and value (2 D^2 MACs each) the home module made


@dataclass(frozen=True)
class Attended:
    """What an attention half-step gives back."""

    output: Tensor | None  # (n, D); None: no token ran, nothing is added
    weights: Tensor | None  # (B, N, T, S); None except from eager attention
    key_rows: int


def attention_half(x_hat: Tensor, half: HalfStep, picks: Picks, scene: Scene) -> Attended:
    """Attention of normalised tokens x_hat (n, D) through the modules that each picked.

    When no token runs, only what later calls need is computed: the keys and values for the cache.
    """
    runs = picks.plan.rows > 0
    if not runs and scene.cache is None:
        return Attended(None, None, key_rows=0)
    projected = project(x_hat, half, picks, scene.qkv)
    key, value, keep = _remember(projected, half, scene)
    if not runs:
        return Attended(None, None, projected.key_rows)
    query = _split_heads(projected.query, scene)
    mask = scene.mask if keep is None else hide_keys(scene.mask, keep, query.shape[2])
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(scene.implementation, eager_attention)
    scaling = query.shape[-1] ** -0.5
    y, weights = attend(scene.module, query, key, value, mask, dropout=scene.dropout, scaling=scaling)
    y = y.reshape(x_hat.shape)  # (B, T, N, D/N) -> (n, D)
    return Attended(routed(y, picks.plan, (scene.out,)), weights, projected.key_rows)


def project(x_hat: Tensor, half: HalfStep, picks: Picks, qkv: Stack) -> Projected:
    """Queries, keys and values of x_hat (n, D) by the picked modules, gates renormalised over them.

    The part of a token that lies on SKIP takes key and value from the home module: all of a token that skips,
    and 1 - alpha of one that explores SKIP, so that exploring leads from "only the module" to "only SKIP"
    without a jump. Where skipping tokens are masked there is no such way: an explorer's key stays visible.
    """
    width = x_hat.shape[1]
    rows = routed(x_hat, picks.plan.weighted(module_shares(picks, half.skip)), (qkv,))  # (n, 3D)
    query, key_value = rows.split([width, 2 * width], dim=1)
    keep = (picks.modules != half.skip).any(dim=1) if half.masks_keys else None
    nobody_skips = not picks.weighted and picks.plan.rows == x_hat.shape[0]
    if half.key_home is None or nobody_skips:
        return Projected(query, key_value, keep, key_rows=0)
    share = skip_share(picks, half.skip)
    tokens = share.detach().nonzero().squeeze(1)
    if tokens.shape[0] == 0:
        return Projected(query, key_value, keep, key_rows=0)
    gates = share.index_select(0, tokens) if picks.weighted else None
    if picks.weighted:
        key_value = key_value * (1.0 - share).unsqueeze(1).to(key_value.dtype)
    plan = subset_plan(half.key_home, half.skip, tokens, gates)
    key_value = key_value + routed(x_hat, plan, (qkv.columns(width),))
    return Projected(query, key_value, keep, key_rows=int(tokens.shape[0]))


def _split_heads(x: Tensor, scene: Scene) -> Tensor:
    """(n, D) -> (B, N, T, D/N)."""
    return x.reshape(scene.batch, -1, scene.heads, x.shape[1] // scene.heads).transpose(1, 2)


def _remember(projected: Projected, half: HalfStep, scene: Scene) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys, values (B, N, S, D/N) and keep (B, S) of this call and, from the cache, of earlier ones."""
    key, value = (_split_heads(part, scene) for part in projected.key_value.chunk(2, dim=1))
    keep = None if projected.keep is None else projected.keep.reshape(scene.batch, -1)
    if scene.cache is None or half.slot is None:
        return key, value, keep
    if keep is None:
        return *scene.cache.update(key, value, half.slot), None
    layer = keyed_layer(scene.cache, half.slot)
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
