"""One half-layer's heads or neurons brought into another's order, so that their weights can be compared term by term.

A half-layer computes the same whichever order its heads or neurons have, and whichever orthonormal basis the queries
and keys, or the values, of a head are written in. Of all these forms the one nearest to the other half-layer is taken:
heads and neurons by linear assignment (as "Git Re-Basin" does, arXiv 2209.04836), bases by orthogonal Procrustes.
"""

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from momify.convert.network import HalfWeights

_ROWS = 1024  # of the neurons' likeness, worked out at once


def aligned(weights: HalfWeights, to: HalfWeights, heads: int | None) -> HalfWeights:
    """`weights` in the form nearest to `to`: the same function, heads (None: neurons, feed-forward) in its order."""
    return _aligned_neurons(weights, to) if heads is None else _aligned_heads(weights, to, heads)


def match_heads(weights: HalfWeights, to: HalfWeights, heads: int) -> Tensor:
    """(N,) for each head of `to` the head of `weights` in its place: by cosines of W_q W_k^T and W_v W_o."""
    (q, k, v, o), (q_to, k_to, v_to, o_to) = (_heads(one, heads) for one in (weights, to))
    return _assigned((_cosines((q, k), (q_to, k_to)) + _cosines((v, o.mT), (v_to, o_to.mT))).double())


def match_neurons(weights: HalfWeights, to: HalfWeights) -> Tensor:
    """(I,) for each neuron of `to` the neuron of `weights` in its place, by inner products of what they read and write.

    Both sides are in proportion to the length of the whole matrices.
    """
    reads = 1 / (to.into.norm() * weights.into.norm()).clamp_min(_tiny(weights.into))
    writes = 1 / (to.out.norm() * weights.out.norm()).clamp_min(_tiny(weights.out))
    inner, device = to.into_bias.shape[0], to.into.device
    likeness = torch.empty(inner, inner, dtype=torch.float64, device=device)
    for rows in torch.arange(inner, device=device).split(_ROWS):  # at 1.5 G parameters the whole is 328 MB: held once
        reading = to.into[:, rows].T @ weights.into + torch.outer(to.into_bias[rows], weights.into_bias)
        likeness[rows] = (reads * reading + writes * (to.out[rows] @ weights.out.T)).double()
    return _assigned(likeness)


def _aligned_neurons(weights: HalfWeights, to: HalfWeights) -> HalfWeights:
    order = match_neurons(weights, to)
    return HalfWeights(weights.into[:, order], weights.into_bias[order], weights.out[order], weights.out_bias)


def _aligned_heads(weights: HalfWeights, to: HalfWeights, heads: int) -> HalfWeights:
    order = match_heads(weights, to, heads)
    (q, k, v, o), (q_to, k_to, v_to, o_to) = (
        [part.double() for part in _heads(one, heads, biased=True)] for one in (weights, to)
    )
    q, k, v, o = (part[order] for part in (q, k, v, o))
    turn_qk = _procrustes(q.mT @ q_to + k.mT @ k_to)  # (N, d, d)
    turn_vo = _procrustes(v.mT @ v_to + o @ o_to.mT)
    into = torch.stack([q @ turn_qk, k @ turn_qk, v @ turn_vo])  # (3, N, D + 1, d)
    into = into.permute(2, 0, 1, 3).flatten(1).to(weights.into.dtype)  # (D + 1, 3D)
    out = (turn_vo.mT @ o).flatten(0, 1).to(weights.out.dtype)  # (D, D)
    return HalfWeights(into[:-1], into[-1], out, weights.out_bias)


def _heads(weights: HalfWeights, heads: int, biased: bool = False) -> list[Tensor]:
    """Each head's query, key and value columns (N, D, d), the biases as last row if asked, and out rows (N, d, D)."""
    into = torch.cat([weights.into, weights.into_bias[None]]) if biased else weights.into
    q, k, v = into.unflatten(1, (3, heads, -1)).permute(1, 2, 0, 3)  # (N, D, d) each
    return [q, k, v, weights.out.unflatten(0, (heads, -1))]


def _cosines(one: tuple[Tensor, Tensor], to: tuple[Tensor, Tensor]) -> Tensor:
    """(N, N) for each head of `to` and each of `one` the cosine of their products X Y^T; X and Y are (N, D, d)."""
    inner = (_inner(to[0], one[0]) * _inner(to[1], one[1])).sum((2, 3))
    lengths = [((x.mT @ x) * (y.mT @ y)).sum((1, 2)).sqrt() for x, y in (to, one)]  # (N,)
    return inner / torch.outer(*lengths).clamp_min(_tiny(inner))


def _inner(left: Tensor, right: Tensor) -> Tensor:
    """(N, N, d, d) inner products of the columns of each head's (D, d) with those of each of the other's."""
    return torch.einsum("hdi,gdj->hgij", left, right)


def _procrustes(products: Tensor) -> Tensor:
    """The orthonormal R (N, d, d) of the largest trace of R^T products: what turns one basis nearest to the other."""
    left, _, right = torch.linalg.svd(products)
    return left @ right


def _assigned(likeness: Tensor) -> Tensor:
    """For each row its column, each once, of the largest sum. Uses up `likeness`, which `maximize` would copy."""
    columns = linear_sum_assignment(likeness.neg_().cpu().numpy())[1]
    return torch.from_numpy(columns).to(likeness.device)


def _tiny(like: Tensor) -> float:
    return torch.finfo(like.dtype).tiny
