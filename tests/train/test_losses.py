"""train/losses.py against float64 loops and known values."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from momify.train.losses import balance_loss, distillation_loss, next_token_loss

sizes = st.tuples(st.integers(1, 3), st.integers(2, 6), st.integers(2, 9))


def loop_cross_entropy(logits: Tensor, labels: Tensor) -> float:
    total, count = 0.0, 0
    for row, answers in zip(logits.double().tolist(), labels.tolist(), strict=True):
        for scores, answer in zip(row[:-1], answers[1:], strict=True):
            if answer != -100:
                total += math.log(sum(math.exp(s) for s in scores)) - scores[answer]
                count += 1
    return total / count


@settings(max_examples=30, deadline=None)
@given(sizes, st.integers(0, 2**31))
def test_next_token_loss_equals_a_loop(size: tuple[int, int, int], seed: int) -> None:
    torch.manual_seed(seed)
    logits, labels = torch.randn(size) * 3, torch.randint(0, size[2], size[:2])
    expected = pytest.approx(loop_cross_entropy(logits, labels), rel=1e-5, abs=1e-6)
    assert next_token_loss(logits, labels).item() == expected


def test_masked_labels_are_not_scored() -> None:
    logits, labels = torch.randn(2, 5, 7), torch.randint(0, 7, (2, 5))
    labels[0, 2:] = -100
    expected = pytest.approx(loop_cross_entropy(logits, labels), rel=1e-5, abs=1e-6)
    assert next_token_loss(logits, labels).item() == expected


@settings(max_examples=30, deadline=None)
@given(sizes, st.integers(0, 2**31))
def test_distillation_is_the_divergence_from_teacher_to_student(size: tuple[int, int, int], seed: int) -> None:
    torch.manual_seed(seed)
    student, teacher = torch.randn(size) * 2, torch.randn(size) * 2
    p, q = teacher.double().softmax(-1), student.double().softmax(-1)
    expected = (p * (p.log() - q.log())).sum(-1).mean().item()
    assert distillation_loss(student, teacher).item() == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_distillation_is_zero_and_flat_at_the_teacher() -> None:
    teacher = torch.randn(2, 3, 11)
    student = teacher.clone().requires_grad_()
    loss = distillation_loss(student, teacher)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert student.grad.abs().max() < 1e-6


def test_balance_is_one_when_even_and_more_when_not() -> None:
    even = torch.zeros(12, 4)
    assert balance_loss(even, torch.arange(12).remainder(4).unsqueeze(1)).item() == pytest.approx(1.0)
    one = torch.zeros(12, 4)
    one[:, 2] = 50.0
    assert balance_loss(one, torch.full((12, 1), 2)).item() == pytest.approx(4.0)


def test_balance_counts_only_what_is_in_reach() -> None:
    logits = torch.zeros(10, 5)
    logits[:, 3:] = -math.inf
    chosen = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2, 0]).unsqueeze(1)
    expected = 3 * sum(share / 3 for share in (0.4, 0.3, 0.3))
    assert balance_loss(logits, chosen).item() == pytest.approx(expected)
