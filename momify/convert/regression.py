"""Ridge regression from sums over batches of rows, in float64: of full rank, or the best of a given rank."""

from dataclasses import dataclass

import torch
from scipy.linalg import lu_factor, lu_solve
from torch import Tensor

_ROWS = 1024  # of a moment matrix, summed at once
_LOST = 1e-14  # a squared singular value below this share of the largest is rounding


@dataclass(frozen=True)
class Factors:
    """A linear map of rank r, x -> (x A) B + c; what stands beside it is of the same name in the model."""

    weight_in: Tensor  # A (F, r)
    weight_out: Tensor  # B (r, D)
    bias: Tensor  # c (D,)

    def product(self) -> Tensor:
        """A B (F, D)."""
        return self.weight_in @ self.weight_out

    def to(self, device: torch.device | str) -> "Factors":
        """The same on a device."""
        return Factors(self.weight_in.to(device), self.weight_out.to(device), self.bias.to(device))


class Moments:
    """Sums for a ridge regression Y ~ X W + b over batches of rows, in float64, where the rows are."""

    def __init__(self, features: int, outputs: int, device: torch.device | str = "cpu") -> None:
        self.rows = 0
        shapes = ((features,), (outputs,), (features, features), (features, outputs))
        self.x, self.y, self.xx, self.xy = (torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add rows x (n, F) and y (n, D)."""
        self.rows += x.shape[0]
        self.x += x.sum(0, dtype=torch.float64)
        self.y += y.sum(0, dtype=torch.float64)
        # A batch's product in its own precision, a piece at a time; the sum over batches in float64. In float32 its
        # rounding is 1e-6 of the mean variance: recipes keep ridges well above (RIDGE), in half the time of float64.
        for part, xx, xy in zip(x.split(_ROWS, 1), self.xx.split(_ROWS), self.xy.split(_ROWS), strict=True):
            xx += part.T @ x
            xy += part.T @ y

    def solve(self, prior: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
        """W (F, D), b (D,) that minimise |Y - X W - b|^2 / n + ridge v |W - prior|^2; v: mean variance of a feature.

        Uses up the sums: at 1.5 G parameters F x F values in float64 are 328 MB.
        """
        weight = _solved(*self._normal_equations(prior, ridge))
        return weight.to(prior.dtype), self._bias(weight).to(prior.dtype)

    def solve_low_rank(self, base: Tensor, prior: Tensor, rank: int, ridge: float) -> Factors:
        """The best W = base + A B in `solve`'s objective with A B of that rank; c is the whole bias. Uses up the sums.

        With M the covariance plus its ridge, the objective is a constant and |M^(1/2) (base + A B - W*)|^2 for the
        solution W* of full rank: the best A B is the projection of Z = W* - base on the leading eigenvectors of Z^T M Z
        (reduced-rank regression, Izenman 1975).
        """
        metric, right = self._normal_equations(prior, ridge)
        right -= metric @ base.double()  # M Z
        change = _solved(metric, right.clone())  # Z
        directions = torch.linalg.eigh(change.T @ right).eigenvectors.flip(1)[:, :rank]  # (D, r)
        weight_in, weight_out = balanced(change @ directions, directions.T)
        bias = self._bias(weight_in @ weight_out + base)
        return Factors(*(part.to(prior.dtype) for part in (weight_in, weight_out, bias)))

    def truncated(self, weight: Tensor, bias: Tensor, rank: int) -> Factors:
        """The map of that rank nearest to x -> x W + b over the rows x that were added, W (F, D), b (D,).

        The SVD of C^(1/2) W with the covariance C of x, by the smaller of its Gram matrices. Where C is 0, so is A B.
        """
        mean, wide = self.x / self.rows, weight.double()
        values, vectors = torch.linalg.eigh((self.xx / self.rows).addr_(mean, mean, alpha=-1))
        scaled = (vectors * values.clamp_min(0).sqrt()).T @ wide  # (F, D)
        squares, left = (part.flip(-1)[..., :rank] for part in torch.linalg.eigh(scaled @ scaled.T))
        length = torch.where(squares > _LOST * squares[0], squares, torch.inf).sqrt()  # singular values; inf: none
        right = (scaled.T @ left) / length  # (D, r)
        weight_in, weight_out = balanced(wide @ right, right.T)
        rest = bias + mean @ (wide - weight_in @ weight_out)
        return Factors(*(part.to(weight.dtype) for part in (weight_in, weight_out, rest)))

    def _normal_equations(self, prior: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
        """M (F, F) and R (F, D) of M W = R, in the memory of the sums."""
        mean_x, mean_y = self.x / self.rows, self.y / self.rows
        metric = self.xx.div_(self.rows).addr_(mean_x, mean_x, alpha=-1)
        right = self.xy.div_(self.rows).addr_(mean_x, mean_y, alpha=-1)
        strength = ridge * metric.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
        metric.diagonal().add_(strength)
        right += strength * prior.double()
        return metric, right

    def _bias(self, weight: Tensor) -> Tensor:
        """What brings the mean of x W (D,) to that of y."""
        return (self.y - self.x @ weight) / self.rows


def _solved(metric: Tensor, right: Tensor) -> Tensor:
    """W (F, D) of metric W = right, which are used up."""
    if not metric.is_cpu:
        return torch.linalg.solve(metric, right)
    factor = lu_factor(metric.numpy().T, overwrite_a=True, check_finite=False)  # in place, as its columns lie
    return torch.from_numpy(lu_solve(factor, right.numpy(), overwrite_b=True, check_finite=False))


def balanced(weight_in: Tensor, weight_out: Tensor) -> tuple[Tensor, Tensor]:
    """The same product (F, r) x (r, D) with each of the r terms' two vectors equally long, as training wants them."""
    inside, outside = weight_in.norm(dim=0), weight_out.norm(dim=1)
    length = (inside * outside).sqrt()  # of both
    return weight_in * _ratio(length, inside), weight_out * _ratio(length, outside)[:, None]


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    """above / below (r,), 0 where there is nothing to divide by."""
    return torch.where(below > 0, above / below, 0.0)
