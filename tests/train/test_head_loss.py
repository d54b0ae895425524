"""The chunked losses against those of whole logits: value, parts, every gradient; and how much memory they take."""

import pytest
import torch
from torch import Tensor

from momify.measure.live_bytes import LiveBytes
from momify.train.head_loss import HeadLoss, Teacher
from momify.train.losses import distillation_loss, next_token_loss


def tensors(dtype: torch.dtype, b: int = 2, t: int = 7, d: int = 5, v: int = 13) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    shapes = {"hidden": (b, t, d), "weight": (v, d), "teacher_hidden": (b, t, d + 1), "teacher_weight": (v, d + 1)}
    made = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    made["labels"] = torch.randint(0, v, (b, t), generator=generator)
    made["labels"][0, :3] = -100
    return made


def whole(x: dict[str, Tensor], cross_entropy: float, distill: float) -> tuple[Tensor, Tensor]:
    logits, teacher = x["hidden"] @ x["weight"].T, x["teacher_hidden"] @ x["teacher_weight"].T
    log_p, log_t = logits.log_softmax(-1).flatten(0, 1), teacher.log_softmax(-1).flatten(0, 1)
    divergence = torch.nn.functional.kl_div(log_p, log_t, log_target=True, reduction="batchmean")
    targets = x["labels"][:, 1:].flatten()
    entropy = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets)
    return cross_entropy * entropy + distill * divergence, torch.stack([divergence, entropy])


def chunked(x: dict[str, Tensor], cross_entropy: float, distill: float, rows: int) -> tuple[Tensor, Tensor]:
    teacher = Teacher(x["teacher_hidden"], x["teacher_weight"])
    loss = HeadLoss(x["labels"], cross_entropy, distill, teacher, chunk=rows * x["weight"].shape[0])
    return loss(x["hidden"], x["weight"])


@pytest.mark.parametrize("rows", [1, 3, 14, 99])
@pytest.mark.parametrize(("cross_entropy", "distill"), [(1.0, 0.0), (0.0, 1.0), (0.3, 0.7)])
def test_equals_the_losses_of_whole_logits_in_float64(rows, cross_entropy, distill) -> None:
    x = tensors(torch.float64)
    x["hidden"].requires_grad_()
    x["weight"].requires_grad_()
    ours, parts = chunked(x, cross_entropy, distill, rows)
    theirs, expected = whole(x, cross_entropy, distill)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(parts[1], expected[1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(parts[0], expected[0] if distill else parts[0] * 0, rtol=1e-12, atol=1e-12)
    assert not parts.requires_grad
    inputs = (x["hidden"], x["weight"])
    for a, b in zip(torch.autograd.grad(3 * ours, inputs), torch.autograd.grad(3 * theirs, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_labels_that_are_all_left_out_leave_the_divergence() -> None:
    x = tensors(torch.float64)
    x["hidden"].requires_grad_()
    expected, _ = chunked(x, 0.0, 1.0, 3)
    x["labels"].fill_(-100)
    loss, parts = chunked(x, 0.0, 1.0, 3)
    assert loss == expected
    assert parts[1] == 0
    assert torch.autograd.grad(loss, x["hidden"])[0].isfinite().all()


@pytest.mark.parametrize("learns", [("hidden",), ("weight",)])
def test_a_head_that_stays_gets_no_gradient_and_no_memory_for_one(learns) -> None:
    x, both = (tensors(torch.float32, d=512, v=40) for _ in range(2))
    for name in learns:
        x[name].requires_grad_()
    for name in ("hidden", "weight"):
        both[name].requires_grad_()
    with LiveBytes([*x.values()]) as live:
        start = live.now
        loss, _ = chunked(x, 0.3, 0.7, rows=4)
    whole_head = x["weight"].numel() * x["weight"].element_size()
    assert (live.now - start >= whole_head) == ("weight" in learns)
    loss.backward()
    chunked(both, 0.3, 0.7, rows=4)[0].backward()
    for name in ("hidden", "weight"):
        assert torch.equal(x[name].grad, both[name].grad) if name in learns else x[name].grad is None


def test_equals_this_packages_own_losses() -> None:
    x = tensors(torch.float32)
    logits, teacher = x["hidden"] @ x["weight"].T, x["teacher_hidden"] @ x["teacher_weight"].T
    _, parts = chunked(x, 0.5, 0.5, rows=4)
    torch.testing.assert_close(parts[0], distillation_loss(logits, teacher))
    torch.testing.assert_close(parts[1], next_token_loss(logits, x["labels"]))


def test_autocast_multiplies_in_half_precision_and_sums_in_float32() -> None:
    x = tensors(torch.float32, t=40)
    x["hidden"].requires_grad_()
    x["weight"].requires_grad_()
    right, _ = whole(x, 0.5, 0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, parts = chunked(x, 0.5, 0.5, rows=8)
    assert ours.dtype == parts.dtype == torch.float32
    assert ours.item() == pytest.approx(right.item(), rel=0.02)  # logits of 8 bits
    inputs = (x["hidden"], x["weight"])
    for a, b in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(right, inputs), strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() < 0.03 * b.norm()


def test_never_holds_the_logits() -> None:
    """A chunk has 1/16 of the rows: a handful of its tensors at once, where whole logits are 16 of them."""
    x = tensors(torch.float32, b=4, t=32, d=8, v=5000)
    x["hidden"].requires_grad_()
    x["weight"].requires_grad_()
    logits = 4 * 32 * 5000 * 4
    with LiveBytes(x.values()) as live:
        loss, _ = chunked(x, 0.5, 0.5, rows=8)
        loss.backward()
    known = sum(tensor.numel() * tensor.element_size() for tensor in x.values())
    assert live.peak - known < 0.6 * logits
    with LiveBytes(x.values()) as live:
        whole(x, 0.5, 0.5)[0].backward()
    assert live.peak - known > 3 * logits
