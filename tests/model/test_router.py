"""Choosing modules, and the gradient that exploring gives the routers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from momify.model.router import Router, choose, router_logits

INF = float("inf")


def test_one_module_is_the_largest_logit_with_a_constant_gate() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, -INF, 1.0], [0.0, 0.1, 5.0]], requires_grad=True)
    choice = choose(logits, 1, tau=1.0)
    assert choice.modules.tolist() == [[1], [0], [2]]
    assert torch.equal(choice.gates, torch.ones(3, 1))
    assert not choice.gates.requires_grad


@settings(max_examples=30, deadline=None)
@given(n=st.integers(0, 7), choices=st.integers(2, 6), k=st.integers(2, 6), seed=st.integers(0, 999))
def test_several_modules_renormalise_the_softmax(n, choices, k, seed) -> None:
    k = min(k, choices)
    logits = torch.randn(n, choices, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    choice = choose(logits, k, tau=0.7)
    for row, modules, gates in zip(logits, choice.modules, choice.gates, strict=True):
        odds = torch.exp(row / 0.7) / torch.exp(row / 0.7).sum()
        best = sorted(range(choices), key=lambda i: -odds[i])[:k]
        assert modules.tolist() == best
        torch.testing.assert_close(gates, odds[best] / odds[best].sum())


def test_gates_of_several_modules_have_a_gradient() -> None:
    logits = torch.tensor([[0.5, 0.2, -1.0]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: choose(x, 2, tau=0.5).gates, (logits,))


def test_picks_out_of_reach_become_skip_without_gate() -> None:
    choice = choose(torch.tensor([[1.0, -INF, 0.0, -INF]]), 3, tau=1.0)
    assert choice.modules.tolist() == [[0, 2, 3]]
    assert choice.gates[0, 2] == 0
    assert choice.gates.sum() == pytest.approx(1.0)


def test_exploring_needs_one_module() -> None:
    with pytest.raises(ValueError, match=r"explore is 0\.1 with k 2"):
        choose(torch.zeros(1, 3), 2, tau=1.0, explore=0.1)


def explored(logits: torch.Tensor, explore: float, seed: int = 0, tau: float = 1.0):
    return choose(logits, 1, tau, explore, torch.Generator().manual_seed(seed))


def test_exploring_mixes_the_best_with_a_reachable_rival() -> None:
    row = torch.tensor([0.0, 2.0, -INF, 1.0, -1.0])  # 4 is SKIP
    choice = explored(row.repeat(4000, 1), 0.25)
    assert (choice.modules[:, 0] == 1).all()
    explores = choice.gates[:, 1] > 0
    assert explores.float().mean() == pytest.approx(0.25, abs=0.03)
    assert (choice.modules[~explores, 1] == 4).all(), "an entry without gate must not be computed"
    assert (choice.gates[~explores, 0] == 1).all()
    rivals = torch.bincount(choice.modules[explores, 1], minlength=5)
    assert rivals[1] == rivals[2] == 0
    assert ((rivals[[0, 3, 4]] / explores.sum() - 1 / 3).abs() < 0.06).all()
    alpha = choice.gates[explores, 0]
    assert torch.equal(choice.gates.sum(1), torch.ones(4000))
    assert alpha.mean() == pytest.approx(0.5, abs=0.04)
    assert alpha.std() == pytest.approx(12**-0.5, abs=0.03)
    assert torch.equal(explored(row.repeat(4000, 1), 0.25).gates, choice.gates)


def test_exploring_survives_logits_that_are_not_numbers() -> None:
    choice = explored(torch.full((3, 4), float("nan")), 1.0)
    assert choice.modules.shape == (3, 2)


def test_gradient_of_an_explored_gate_is_that_of_the_pairwise_odds() -> None:
    logits = torch.tensor([[0.3, 1.0]], dtype=torch.float64, requires_grad=True)
    choice = explored(logits, 1.0, tau=2.0)
    (first,) = torch.autograd.grad(choice.gates[0, 0], logits, retain_graph=True)
    (second,) = torch.autograd.grad(choice.gates[0, 1], logits)
    m = torch.sigmoid(torch.tensor((1.0 - 0.3) / 2.0, dtype=torch.float64))
    torch.testing.assert_close(first[0, 1], m * (1 - m) / 2.0)
    torch.testing.assert_close(first[0, 0], -first[0, 1])
    torch.testing.assert_close(second, -first)
    plain = torch.tensor([[0.3, 1.0]], requires_grad=True)
    (none,) = torch.autograd.grad(explored(plain, 1e-9).gates[0, 0], plain)
    assert torch.equal(none, torch.zeros(1, 2)), "a token that does not explore: in the graph, with gradient 0"


def test_mean_gradient_is_the_finite_difference() -> None:
    """For a loss far from linear in the gates: against SKIP the derivative at gate 1 even has the wrong sign."""
    draws, tau = 200_000, 0.8
    row = torch.tensor([0.4, 0.9, -0.2], dtype=torch.float64, requires_grad=True)
    outputs = torch.tensor([2.5, 1.0, 0.0], dtype=torch.float64)  # what each choice gives, 2 being SKIP

    def loss(y: torch.Tensor) -> torch.Tensor:
        return torch.cos(4.0 * y) + 0.2 * y

    choice = explored(row.expand(draws, 3), 1.0, tau=tau)
    y = (choice.gates * outputs[choice.modules]).sum(1)
    (found,) = torch.autograd.grad(loss(y).mean(), row)
    expected = torch.zeros(3, dtype=torch.float64)
    for rival in (0, 2):
        m = torch.sigmoid((row[1] - row[rival]) / tau).detach()
        slope = 0.5 * m * (1 - m) / tau * (loss(outputs[1]) - loss(outputs[rival]))
        expected[1] += slope
        expected[rival] -= slope
    # a draw's gradient is at most 0.25 / tau * (4 + 0.2) * 1.5 = 2: four standard errors of the mean are 0.018
    assert (found - expected).abs().max() < 0.018
    assert expected.abs().max() > 0.1


def test_router_starts_at_home_and_masks_what_it_cannot_reach(make_mom, token_ids) -> None:
    reach = [[0, 3], [0, 1, 2, 3], [2], [1, 2]]
    config = make_mom(mha_reach=reach, mha_homes=[3, 1, 2, 2]).config
    model = type(make_mom())(config)  # as built, not randomised
    router = model.model.mha_router
    assert router.weight.shape == (3, 32, 4)
    assert torch.equal(router.weight, torch.zeros(3, 32, 4))
    expected = torch.zeros(3, 4)
    expected[0, 3] = expected[1, 1] = expected[2, 2] = 4.0
    assert torch.equal(router.bias, expected)
    x_hat = torch.randn(5, 32)
    rows = [router_logits(x_hat, step) for step in router()]
    for logits, home, choices in zip(rows, (3, 1, 2), ([0, 3], [0, 1, 2, 3], [1, 2]), strict=True):
        assert (logits.argmax(1) == home).all()
        assert torch.isfinite(logits).all(0).nonzero().squeeze(1).tolist() == choices


def test_hidden_router_starts_at_home_too() -> None:
    router = Router(8, 5, homes=[1], reach=[[0, 1, 2]], modules=2)
    torch.nn.init.normal_(router.w_in)
    assert {name: tuple(p.shape) for name, p in router.named_parameters()} == {
        "weight": (1, 5, 3), "bias": (1, 3), "w_in": (1, 8, 5), "b_in": (1, 5)
    }  # fmt: skip
    with torch.no_grad():
        router.bias.copy_(router.home_rows(4.0))
    logits = router_logits(torch.randn(6, 8), router()[0])
    assert torch.equal(logits, torch.tensor([[0.0, 4.0, 0.0]]).expand(6, 3))
    router.weight.data.normal_()
    x = torch.randn(6, 8)
    inner = torch.nn.functional.gelu(x @ router.w_in[0] + router.b_in[0])
    torch.testing.assert_close(router_logits(x, router()[0]), inner @ router.weight[0] + router.bias[0])


def test_logits_of_bfloat16_tokens_are_float32() -> None:
    router = Router(8, 0, homes=[0], reach=[[0, 1]], modules=1).to(torch.bfloat16)
    assert router_logits(torch.randn(3, 8, dtype=torch.bfloat16), router()[0]).dtype == torch.float32
