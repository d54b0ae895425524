"""convert/regression.py: ridge against lstsq, reduced rank against SVD on stacked rows and against search."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from momify.convert.regression import Factors, Moments, balanced
from momify.recipe_blocks import RIDGE


def moments_of(x: Tensor, y: Tensor) -> Moments:
    """The sums of rows x and y, added in two batches."""
    moments = Moments(x.shape[1], y.shape[1])
    for part in (slice(0, x.shape[0] // 2), slice(x.shape[0] // 2, None)):
        moments.add(x[part], y[part])
    return moments


def stacked(x: Tensor, y: Tensor, prior: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """The ridge as further observations, sqrt(n * strength) * (W - prior): what plain least squares takes."""
    factor = (x.shape[0] * ridge * x.var(0, correction=0).mean()).sqrt()
    left = torch.cat([x - x.mean(0), factor * torch.eye(x.shape[1]).double()])
    return left, torch.cat([y - y.mean(0), factor * prior])


def product(part: Factors) -> Tensor:
    return part.weight_in @ part.weight_out


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(3, 60), features=st.integers(1, 9), outputs=st.integers(1, 5), ridge=st.floats(1e-4, 10))
def test_moments_solve_the_ridge_problem(rows: int, features: int, outputs: int, ridge: float) -> None:
    x, y, prior = (torch.randn(*size).double() for size in ((rows, features), (rows, outputs), (features, outputs)))
    weight, bias = moments_of(x, y).solve(prior, ridge)
    expected = torch.linalg.lstsq(*stacked(x, y, prior, ridge), driver="gelsd").solution
    assert torch.allclose(weight, expected, rtol=1e-6, atol=1e-8)
    assert torch.allclose(bias, y.mean(0) - x.mean(0) @ expected, rtol=1e-6, atol=1e-8)


def test_no_recipe_asks_for_a_ridge_below_the_rounding_of_float32() -> None:
    """Fewer rows than features: nothing but the ridge decides then how far weights go where no row leads."""
    x, y, prior = torch.randn(256, 512) + 0.5, torch.randn(256, 8), 0.05 * torch.randn(512, 8)
    missed = []
    for ridge in (RIDGE, RIDGE / 100):
        expected = torch.linalg.lstsq(*stacked(*(part.double() for part in (x, y, prior)), ridge)).solution
        found, _ = moments_of(x, y).solve(prior.double(), ridge)
        missed.append(float(torch.dist(found, expected) / torch.dist(expected, prior.double())))
    assert missed[0] < 0.01
    assert missed[1] > 0.1


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(3, 40), features=st.integers(1, 8), outputs=st.integers(1, 6), rank=st.integers(1, 6),
    ridge=st.floats(1e-3, 1),
)  # fmt: skip
def test_low_rank_is_the_svd_of_the_fitted_values(
    rows: int, features: int, outputs: int, rank: int, ridge: float
) -> None:
    """Reduced-rank regression by its textbook: project full-rank fits on their leading right singular vectors."""
    rank = min(rank, outputs)
    sizes = ((rows, features), (rows, outputs), (features, outputs), (features, outputs))
    x, y, base, prior = (torch.randn(*size).double() for size in sizes)
    found = moments_of(x, y).solve_low_rank(base, prior, rank, ridge)
    left, right = stacked(x, y, prior, ridge)
    change = torch.linalg.lstsq(left, right, driver="gelsd").solution - base
    directions = torch.linalg.svd(left @ change, full_matrices=False)[2][:rank]
    expected = change @ directions.T @ directions
    assert found.weight_in.shape == (features, rank)
    assert torch.allclose(product(found), expected, rtol=1e-5, atol=1e-6)
    assert torch.allclose(found.bias, y.mean(0) - x.mean(0) @ (base + product(found)), rtol=1e-6, atol=1e-7)


def test_no_search_finds_a_better_map_of_that_rank() -> None:
    x, y = torch.randn(50, 4).double() @ torch.randn(4, 4).double(), torch.randn(50, 3).double()
    y += x @ torch.randn(4, 3).double()
    ridge, nothing = 0.05, torch.zeros(4, 3).double()
    left, right = stacked(x, y, nothing, ridge)

    def objective(weight: Tensor) -> Tensor:
        return ((right - left @ weight) ** 2).sum()

    for rank in (1, 2):
        found = objective(product(moments_of(x, y).solve_low_rank(nothing, nothing, rank, ridge)))
        best = min(descend(objective, rank, seed) for seed in range(6))
        assert found <= best * (1 + 1e-9)
        assert best == pytest.approx(float(found), rel=1e-6)  # the search does come there


def descend(objective, rank: int, seed: int) -> float:
    """The smallest value that a quasi-Newton search over both factors comes to."""
    generator = torch.Generator().manual_seed(seed)
    factors = [torch.randn(size, generator=generator).double().requires_grad_() for size in ((4, rank), (rank, 3))]
    search = torch.optim.LBFGS(factors, max_iter=400, line_search_fn="strong_wolfe", tolerance_change=1e-14)

    def value() -> Tensor:
        search.zero_grad()
        loss = objective(factors[0] @ factors[1])
        loss.backward()
        return loss

    search.step(value)
    return float(objective(factors[0] @ factors[1]).detach())


def test_full_rank_is_the_ridge_solution() -> None:
    x, y = torch.randn(60, 7).double(), torch.randn(60, 5).double()
    nothing = torch.zeros(7, 5).double()
    weight, bias = moments_of(x, y).solve(nothing, 0.01)
    found = moments_of(x, y).solve_low_rank(nothing, nothing, 5, 0.01)
    assert torch.allclose(product(found), weight, atol=1e-10)
    assert torch.allclose(found.bias, bias, atol=1e-10)


def test_terms_are_balanced_and_nothing_is_lost() -> None:
    left, right = torch.randn(6, 3), torch.randn(3, 4) * torch.tensor([1.0, 1e-3, 50.0])[:, None]
    left[:, 1] = 0
    a, b = balanced(left, right)
    assert torch.allclose(a @ b, left @ right, rtol=1e-5, atol=1e-5)
    assert torch.allclose(a.norm(dim=0), b.norm(dim=1))
    assert not a[:, 1].any()
    assert not b[1].any()


@pytest.mark.parametrize(("features", "outputs"), [(6, 15), (9, 4)])
def test_truncation_is_the_svd_of_what_the_map_gives(features: int, outputs: int) -> None:
    x, weight, bias = torch.randn(80, features).double() * torch.arange(1, features + 1), torch.randn(
        features, outputs).double(), torch.randn(outputs).double()  # fmt: skip
    x += 3
    moments = moments_of(x, x[:, :0])
    given = x @ weight + bias
    for rank in (1, 3, min(features, outputs)):
        found = moments.truncated(weight, bias, rank)
        left, values, right = torch.linalg.svd(given - given.mean(0), full_matrices=False)
        expected = (left[:, :rank] * values[:rank]) @ right[:rank] + given.mean(0)
        assert torch.allclose(x @ product(found) + found.bias, expected, atol=1e-8)
    assert torch.allclose(product(found), weight, atol=1e-8)
    assert torch.allclose(found.bias, bias, atol=1e-8)
    nothing = moments.truncated(torch.zeros_like(weight), bias, 2)
    assert not product(nothing).any()
    assert torch.equal(nothing.bias, bias)
