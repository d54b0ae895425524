"""Which modules a token takes: the routers' logits, and the choice made of them (design sections 2 and 3)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Choice:
    """What each token picked. An entry of modules that equals M stands for SKIP and is not computed."""

    modules: Tensor  # (n, K) int64
    gates: Tensor  # (n, K)


@dataclass(frozen=True)
class StepRouter:
    """One half-step's router, taken out of the stack for one forward pass."""

    weight: Tensor  # (D or R, M+1)
    bias: Tensor  # (M+1,)
    closed: Tensor | None  # (M+1,) bool, the choices out of reach; None if there are none
    w_in: Tensor | None  # (D, R)
    b_in: Tensor | None  # (R,)


class Router(nn.Module):
    """The routers of one kind, stacked over the S steps that have a choice; they start by choosing the home.

    A logit is a learned function of the token, which starts at 0, plus a bias per step, which starts at
    `home_bias` for the home: linear D -> M+1, or D -> hidden -> M+1 with GELU between if hidden > 0. SKIP is
    M.
    """

    def __init__(self, width: int, hidden: int, homes: list[int], reach: list[list[int]], modules: int) -> None:
        super().__init__()
        steps, choices = len(homes), modules + 1
        self.choices = choices
        self.homes, self.reach = tuple(homes), tuple(map(tuple, reach))
        self.weight = nn.Parameter(torch.zeros(steps, hidden or width, choices))
        self.bias = nn.Parameter(torch.zeros(steps, choices))
        self.w_in = nn.Parameter(torch.empty(steps, width, hidden)) if hidden else None
        self.b_in = nn.Parameter(torch.zeros(steps, hidden)) if hidden else None
        self.register_buffer("closed", self.closed_choices(), persistent=False)

    def closed_choices(self) -> Tensor:
        """(S, M+1) bool: which choices a step may not take. Built anew after loading, as no file holds it."""
        rows = [[choice not in reach for choice in range(self.choices)] for reach in self.reach]
        return torch.tensor(rows, dtype=torch.bool)

    def home_rows(self, home_bias: float) -> Tensor:
        """(S, M+1): the bias that starts each step at its home."""
        rows = torch.zeros(self.bias.shape)
        rows[torch.arange(len(self.homes)), torch.tensor(self.homes)] = home_bias
        return rows

    def forward(self, threshold: float = 0.0) -> tuple[StepRouter, ...]:
        """The routers one by one, S of them; `threshold` is added to the logits of SKIP.

        Read here, so that sharding hooks see the parameters.
        """
        bias = self.bias
        if threshold:
            bias = bias + threshold * (torch.arange(self.choices, device=bias.device) == self.choices - 1)
        inner = [(None, None)] * len(self.homes)
        if self.w_in is not None and self.b_in is not None:
            inner = list(zip(self.w_in.unbind(0), self.b_in.unbind(0), strict=True))
        return tuple(
            StepRouter(weight, bias, closed if len(reach) < self.choices else None, *hidden)
            for weight, bias, closed, reach, hidden in zip(
                self.weight.unbind(0),
                bias.unbind(0),
                self.closed.unbind(0),
                self.reach,
                inner,
                strict=True,
            )
        )


def router_logits(x_hat: Tensor, router: StepRouter) -> Tensor:
    """Logits (n, M+1) for normalised tokens x_hat (n, D), at least float32; -inf for what is out of reach.

    Half precision would make ties of near choices: these few columns stay in float32 even under autocast.
    """
    if torch.is_autocast_enabled(x_hat.device.type):  # entering the context takes longer than one token's product
        with torch.autocast(x_hat.device.type, enabled=False):
            return _logits(x_hat, router)
    return _logits(x_hat, router)


def _logits(x_hat: Tensor, router: StepRouter) -> Tensor:
    kind = torch.promote_types(x_hat.dtype, torch.float32)
    h = x_hat.to(kind)
    if router.w_in is not None and router.b_in is not None:
        h = F.gelu(torch.addmm(router.b_in.to(kind), h, router.w_in.to(kind)))
    logits = torch.addmm(router.bias.to(kind), h, router.weight.to(kind))
    return logits if router.closed is None else logits.masked_fill(router.closed, float("-inf"))


def choose(
    logits: Tensor, k: int, tau: float, explore: float = 0.0, generator: torch.Generator | None = None
) -> Choice:
    """Pick k of the M+1 choices for each token, with gates (design section 3).

    k = 1: the largest logit; the gate is the constant 1. k > 1: the k largest of softmax(logits / tau), gates
    renormalised over them; a pick out of reach (fewer than k choices) becomes a SKIP of gate 0. explore > 0
    gives two columns: see `explore_rivals`. Raises ValueError for explore with k > 1.
    """
    if k == 1:
        modules = logits.argmax(dim=1, keepdim=True)
        if explore > 0:
            return explore_rivals(logits, modules, tau, explore, generator)
        return Choice(modules, torch.ones_like(logits[:, :1]).detach())
    if explore > 0:
        raise ValueError(f"explore is {explore} with k {k}; use k = 1, or explore 0")
    top, modules = logits.topk(k, dim=1)  # (n, K)
    gates = torch.softmax(top / tau, dim=1)  # = softmax over all, renormalised over the K
    skip = logits.shape[1] - 1
    return Choice(modules.masked_fill(top == float("-inf"), skip), gates)


def explore_rivals(
    logits: Tensor, best: Tensor, tau: float, explore: float, generator: torch.Generator | None
) -> Choice:
    """Mix the best choice i with a random reachable rival j, for a share of the tokens: alpha and 1 - alpha.

    With m = sigmoid((l_i - l_j) / tau), the gate of i is alpha + (m - stop_gradient(m)), so that the gradient
    of m is dL/dalpha at a random point of the way from "only j" (alpha 0) to "only i" (alpha 1). Its mean
    over alpha ~ U(0, 1) is exactly L(only i) - L(only j): the finite difference, which a derivative at alpha
    = 1 misses (a trained network is flat there, and tokens would drift into SKIP). Other tokens get (i, SKIP)
    with gates (1, 0). best (n, 1) holds i; each token needs a second choice within reach. Returns (n, 2) each.
    """
    n, choices = logits.shape
    # NaN counts as within reach: a loss of NaN can be told and handled, a failed draw on a GPU cannot
    rivals = (logits.detach() != float("-inf")).to(logits.dtype).scatter(1, best, 0.0)  # (n, M+1)
    rival = torch.multinomial(rivals, 1, generator=generator)  # (n, 1)
    draws = torch.rand(2, n, 1, generator=generator, device=logits.device, dtype=logits.dtype)
    explores, alpha = draws[0] < explore, draws[1]
    m = torch.sigmoid((logits.gather(1, best) - logits.gather(1, rival)) / tau)
    first = torch.where(explores, alpha, 1.0) + torch.where(explores, m - m.detach(), 0.0)
    second = torch.where(explores, rival, choices - 1)
    return Choice(torch.cat([best, second], dim=1), torch.cat([first, 1.0 - first], dim=1))
