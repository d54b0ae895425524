"""convert/merge.py: the common base of several matrices against the mean, truncation by SVD, and the optimum of two."""

import pytest
import torch
from torch import Tensor

from momify.convert.merge import common_base, nearest_of_rank


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6)])
def test_nearest_of_rank_is_the_truncated_svd(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape).double()
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    for rank in (1, 3, 5, 9):
        expected = (left[:, :rank] * values[:rank]) @ right[:rank]
        assert torch.allclose(nearest_of_rank(matrix, rank), expected, atol=1e-10)


def rest(weights: list[Tensor], base: Tensor, rank: int) -> float:
    """Sum of squares that changes of that rank leave."""
    return sum(float((torch.linalg.svdvals((weight - base).double())[rank:] ** 2).sum()) for weight in weights)


def test_the_base_without_changes_is_the_mean() -> None:
    weights = [torch.randn(6, 9) for _ in range(3)]
    assert torch.allclose(common_base(weights, 0), torch.stack(weights).mean(0), atol=1e-6)
    assert common_base(weights, 0).dtype == torch.float32


def test_the_base_leaves_less_to_the_changes_than_the_mean_or_one_of_them() -> None:
    weights = [torch.randn(12, 20) for _ in range(3)]
    found = rest(weights, common_base(weights, 3), 3)
    others = [rest(weights, base, 3) for base in (torch.stack(weights).mean(0), *weights)]
    assert found < 0.9 * min(others)


def test_two_matrices_share_the_directions_of_their_difference() -> None:
    """Of two, B can leave half of the difference's tail behind its first 2 r singular values to each, and no less."""
    one, other = torch.randn(8, 10).double(), torch.randn(8, 10).double()
    tail = float((torch.linalg.svdvals(one - other)[4:] ** 2).sum()) / 2  # 2 * |tail / 2|^2
    assert rest([one, other], common_base([one, other], 2), 2) == pytest.approx(tail, rel=0.02)
