"""convert/align.py: what was only reordered and turned is found again, and the function stays the same."""

from collections.abc import Callable
from itertools import permutations

import pytest
import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

from momify.convert.align import aligned, match_heads, match_neurons
from momify.convert.network import HalfWeights

WIDTH, HEADS, INNER = 24, 4, 40


def attention(seed: int) -> HalfWeights:
    draw = torch.Generator().manual_seed(seed)
    sizes = ((WIDTH, 3 * WIDTH), (3 * WIDTH,), (WIDTH, WIDTH), (WIDTH,))
    return HalfWeights(*(torch.randn(size, generator=draw) for size in sizes))


def feed_forward(seed: int) -> HalfWeights:
    draw = torch.Generator().manual_seed(seed)
    sizes = ((WIDTH, INNER), (INNER,), (INNER, WIDTH), (WIDTH,))
    return HalfWeights(*(torch.randn(size, generator=draw) for size in sizes))


def shuffle_heads(weights: HalfWeights, order: Tensor, turn: bool = False) -> HalfWeights:
    """Heads in another order and, if asked, each head's bases turned; written as loops over heads."""
    size = WIDTH // HEADS
    into, bias, out = torch.empty_like(weights.into), torch.empty_like(weights.into_bias), torch.empty_like(weights.out)
    for place, head in enumerate(order.tolist()):
        turns = [torch.linalg.qr(torch.randn(size, size))[0] if turn else torch.eye(size) for _ in range(2)]
        new, old = (slice(at * size, (at + 1) * size) for at in (place, head))
        for part in range(3):
            here, there = (slice(part * WIDTH + at.start, part * WIDTH + at.stop) for at in (new, old))
            into[:, here] = weights.into[:, there] @ turns[part == 2]
            bias[here] = weights.into_bias[there] @ turns[part == 2]
        out[new] = turns[1].T @ weights.out[old]
    return HalfWeights(into, bias, out, weights.out_bias)


def attend(weights: HalfWeights, x: Tensor) -> Tensor:
    """The attention half on rows x (T, D), one head after the other."""
    size, total = WIDTH // HEADS, weights.out_bias.clone()
    hidden = x @ weights.into + weights.into_bias
    for head in range(HEADS):
        q, k, v = (hidden[:, part * WIDTH + head * size :][:, :size] for part in range(3))
        scores = (q @ k.T / size**0.5).masked_fill(torch.ones(len(x), len(x)).triu(1).bool(), -torch.inf)
        total = total + scores.softmax(-1) @ v @ weights.out[head * size :][:size]
    return total


def same(one: HalfWeights, other: HalfWeights, atol: float = 1e-5) -> bool:
    return all(torch.allclose(getattr(one, name), getattr(other, name), atol=atol) for name in one.__dict__)


@pytest.mark.parametrize("turn", [False, True])
def test_reordered_and_turned_heads_are_brought_back(turn: bool) -> None:
    original, order = attention(0), torch.tensor([2, 0, 3, 1])
    shuffled = shuffle_heads(original, order, turn)
    assert match_heads(shuffled, original, HEADS).tolist() == order.argsort().tolist()
    assert same(aligned(shuffled, original, HEADS), original)


def test_alignment_keeps_the_function_and_comes_nearer() -> None:
    one, to, x = attention(1), attention(2), torch.randn(9, WIDTH)
    found = aligned(one, to, HEADS)
    assert torch.allclose(attend(found, x), attend(one, x), atol=1e-3, rtol=1e-4)
    assert not same(found, one, atol=0.1)

    def distance(other: HalfWeights) -> float:
        return float(torch.dist(other.into, to.into) ** 2 + torch.dist(other.out, to.out) ** 2)

    assert distance(found) < 0.9 * distance(one)


def test_heads_are_matched_by_the_best_of_all_orders() -> None:
    one, to = attention(3), attention(4)
    size, table = WIDTH // HEADS, torch.empty(HEADS, HEADS)
    columns = [
        [(w.into[:, p * WIDTH + h * size :][:, :size]) for p in range(3)] for w in (one, to) for h in range(HEADS)
    ]
    products = [(q @ k.T, v @ (w.out[h * size :][:size])) for (q, k, v), w, h in zip(
        columns, [one] * HEADS + [to] * HEADS, [*range(HEADS)] * 2, strict=True)]  # fmt: skip
    for h in range(HEADS):
        for g in range(HEADS):
            pairs = zip(products[HEADS + h], products[g], strict=True)
            table[h, g] = sum((a * b).sum() / a.norm() / b.norm() for a, b in pairs)
    best = max(permutations(range(HEADS)), key=lambda order: sum(float(table[h, g]) for h, g in enumerate(order)))
    assert match_heads(one, to, HEADS).tolist() == list(best)


def test_reordered_neurons_are_brought_back() -> None:
    original, order = feed_forward(5), torch.randperm(INNER)
    shuffled = HalfWeights(original.into[:, order], original.into_bias[order], original.out[order], original.out_bias)
    assert match_neurons(shuffled, original).tolist() == order.argsort().tolist()
    assert same(aligned(shuffled, original, None), original, atol=0)
    noisy = HalfWeights(*(part + 0.3 * torch.randn(part.shape) for part in shuffled.__dict__.values()))
    assert match_neurons(noisy, original).tolist() == order.argsort().tolist()


def test_a_gpt2_with_reordered_heads_is_the_same_gpt2(make_gpt2: Callable[..., GPT2LMHeadModel]) -> None:
    """The loops above speak of transformers' layout: reordering a model's own heads changes no logit."""
    model, ids = make_gpt2(n_embd=WIDTH, n_head=HEADS), torch.randint(0, 61, (2, 9))
    with torch.no_grad():
        before, block = model(ids).logits, model.transformer.h[1].attn
        old = HalfWeights(block.c_attn.weight, block.c_attn.bias, block.c_proj.weight, block.c_proj.bias)
        new = shuffle_heads(old, torch.tensor([3, 1, 0, 2]), turn=True)
        block.c_attn.weight.copy_(new.into)
        block.c_attn.bias.copy_(new.into_bias)
        block.c_proj.weight.copy_(new.out)
        assert torch.allclose(model(ids).logits, before, atol=1e-4)
