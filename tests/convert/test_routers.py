"""convert/routers.py: the fit against scikit-learn in float64, and what it makes of a small model."""

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from momify.convert.routers import fit_line, fit_routers
from momify.convert.walk import halves, walk
from momify.errors import MomifyError
from momify.measure.budget import budget_of
from momify.measure.stakes import loss_metrics, stakes


def test_the_line_is_ridge_regression_of_the_logarithm_with_the_mean_put_right():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 6, generator=generator) * torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0, 1.0]) + 1
    cost = (0.3 * x @ torch.randn(6, generator=generator) + torch.randn(300, generator=generator)).exp()
    line = fit_line(x, cost, ridge=0.05)
    features, target = x.double().numpy(), cost.double().log().numpy()
    strength = 0.05 * features.var(axis=0).mean() * len(features)
    expected = Ridge(alpha=strength).fit(features, target)
    assert line.weight.double().numpy() == pytest.approx(expected.coef_, rel=1e-4)
    assert np.exp(line(x).double().numpy()).mean() == pytest.approx(float(cost.double().mean()), rel=1e-5)
    assert line.bias > expected.intercept_ + 0.1  # exp of a mean is below the mean of exp


@pytest.mark.parametrize("keys", ["home", "masked"])
def test_the_model_spends_its_budget_and_keeps_its_floor(keys, routed_model, text):
    model, tokens = routed_model(skipped_keys=keys), text()
    share = 0.75 if keys == "home" else 0.7
    found = fit_routers(model, tokens, share)
    with torch.no_grad():
        routing = model(input_ids=tokens, output_router_logits=True, use_cache=False).routing
    skipping = {(r.kind, r.step): float((r.modules == r.skip).float().mean()) for r in routing if r.routed}
    assert skipping == pytest.approx(found.skipping, abs=2 / tokens.numel())
    assert budget_of(model.config, 32).spent(skipping) == pytest.approx(found.share, abs=1e-3)
    assert found.share == pytest.approx(share, abs=0.02)
    assert max(skipping.values()) <= 0.96


def test_the_router_is_what_the_walk_saw(routed_model, text):
    model, tokens = routed_model(), text()
    found = fit_routers(model, tokens, 0.8)
    metrics, seen = loss_metrics(model, tokens), {}

    def follow(half, sights):
        place = half.kind, half.step
        router = model.model.mha_router if half.kind == "mha" else model.model.ffn_router
        row = model.config.routed(half.kind).index(half.step)
        x_hat, cost = sights[0].x_hat, stakes(sights[0].patch - sights[0].home, sights[0].x, metrics[place])
        logit = x_hat @ router.weight[row, :, half.home] + router.bias[row, half.home]
        seen[place] = float(torch.corrcoef(torch.stack([logit, cost.log()]))[0, 1])
        assert float(router.weight[row, :, half.skip].abs().sum() + router.bias[row, half.skip].abs()) == 0
        return [logit < found.threshold]

    walk(model, tokens, follow)
    assert len(seen) == 5
    assert min(seen.values()) > 0.2, seen  # it says something of what it stands for


def test_fitted_routing_beats_the_same_share_of_random_tokens(routed_model, text):
    tokens, other = text(48), text(16, seed=9)
    whole = routed_model()
    fitted = routed_model()
    found = fit_routers(fitted, tokens, 0.75)

    def log_p(model, decide):
        states = walk(model, other, decide)
        return model.lm_head(model.model.ln_f(torch.cat(states))).log_softmax(-1)

    def nobody(half, sights):
        return [torch.zeros(len(fork.x), dtype=torch.bool) for fork in sights]

    def by_router(half, sights):
        router = fitted.model.mha_router if half.kind == "mha" else fitted.model.ffn_router
        row = fitted.config.routed(half.kind).index(half.step)
        w, b = router.weight[row, :, half.home], router.bias[row, half.home]
        return [fork.x_hat @ w + b < found.threshold for fork in sights]

    def at_random(half, sights):
        generator = torch.Generator().manual_seed(half.step)
        share = found.skipping[half.kind, half.step]
        return [torch.rand(len(fork.x), generator=generator) < share for fork in sights]

    with torch.no_grad():
        goal = log_p(whole, nobody)
        losses = [float((goal.exp() * (goal - log_p(fitted, by))).sum(1).mean()) for by in (by_router, at_random)]
    assert losses[0] < 0.9 * losses[1], losses


def test_a_higher_threshold_skips_more(routed_model, text):
    model, tokens = routed_model(), text()
    found = fit_routers(model, tokens, 0.85)
    shares = []
    for shift in (-1.0, 0.0, 1.0):
        model.config.router_threshold = found.threshold + shift
        with torch.no_grad():
            routing = model(input_ids=tokens, output_router_logits=True, use_cache=False).routing
        shares.append(sum(float((r.modules == r.skip).float().mean()) for r in routing if r.routed))
    assert shares[0] < shares[1] < shares[2]


def test_refused_without_a_choice_and_below_what_can_be_reached(routed_model, text):
    with pytest.raises(MomifyError, match=r"mom\.reach=skip"):
        fit_routers(routed_model(mha_reach=[[0], [1], [2]], ffn_reach=[[0], [1], [2]]), text(), 0.8)
    with pytest.raises(MomifyError, match="out of reach"):
        fit_routers(routed_model(), text(), 0.1)


def test_half_steps_without_a_patch_are_fitted_too(routed_model, text):
    model = routed_model(patch_rank=0)
    found = fit_routers(model, text(), 0.8)
    assert found.share == pytest.approx(0.8, abs=0.02)
    assert math.isfinite(found.threshold)
    assert all(half.patch is None for half in halves(model))
