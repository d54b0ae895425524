"""measure/stakes.py: the metric against finite divergences of the model's predictions."""

from functools import partial

import pytest
import torch

from momify.measure.stakes import loss_metrics, stakes
from momify.model.half import home_update, normalise, run_half

SHAPE = {
    "num_mha_modules": 2, "num_ffn_modules": 2, "num_steps": 2, "mha_homes": [0, 1], "ffn_homes": [0, 1],
    "mha_reach": [[0, 2], [1]], "ffn_reach": [[0, 2], [1, 2]],
}  # fmt: skip


def log_predictions(model, ids, place, change):
    """log p (n, V) with all at home and `change` (n, D) of x added behind the half-step `place`; and x before it."""
    x, shared = model.model.begin(ids)
    before = None
    for half in (half for step in model.model.steps for half in step):
        start = x
        x = x + (home_update(normalise(x, shared), half, shared) if half.routed else run_half(x, half, shared)[0])
        if (half.kind, half.step) == place:
            before = start
            x = x + change(start)
    return model.lm_head(model.model.ln_f(x)).log_softmax(-1), before


@pytest.mark.parametrize("place", [("mha", 0), ("ffn", 0), ("ffn", 1)])
def test_small_changes_cost_what_the_metric_says_on_average(make_mom, place):
    model = make_mom(**SHAPE)
    ids = torch.randint(1, 61, (48, 16), generator=torch.Generator().manual_seed(2))
    metric = loss_metrics(model, ids.repeat(8, 1))[place]
    drawn = torch.randn(1, 32, generator=torch.Generator().manual_seed(5))

    def change(x, position):  # one direction, of a size that goes with the residual's; one token a row
        keep = torch.zeros(len(x), 1)
        keep[position::16] = 0.03
        return keep * drawn * x.norm(dim=1, keepdim=True)

    measured = said = 0.0
    with torch.no_grad():
        log_p, before = log_predictions(model, ids, place, torch.zeros_like)
        for position in range(16):
            log_q, _ = log_predictions(model, ids, place, partial(change, position=position))
            measured += float((log_p.exp() * (log_p - log_q)).sum())
            said += float(stakes(change(before, position), before, metric)[position::16].sum())
    assert said == pytest.approx(measured, rel=0.25)


def test_stakes_are_a_quadratic_form_relative_to_the_residual():
    generator = torch.Generator().manual_seed(0)
    change, x, root = (torch.randn(*shape, generator=generator) for shape in ((5, 4), (5, 4), (4, 4)))
    metric = root @ root.T
    expected = [float(d @ metric @ d / (2 * r @ r)) for d, r in zip(change, x, strict=True)]
    assert stakes(change, x, root).tolist() == pytest.approx(expected, rel=1e-5)
    assert stakes(torch.zeros(1, 4), x[:1], root) > 0
