"""measure/budget.py: shares of MACs against the closed form of a routed forward pass, and thresholds to the token."""

import pytest
import torch

from momify.errors import MomifyError
from momify.measure.budget import budget_of, check_share, kept_tokens, lift, spend
from momify.measure.cost import mom_macs, planned_usage
from momify.measure.routing import realised

FORKS = {
    "num_mha_modules": 3, "num_ffn_modules": 3, "num_steps": 3, "mha_homes": [0, 1, 2], "ffn_homes": [0, 1, 2],
    "mha_reach": [[0, 3], [1, 3], [2]], "ffn_reach": [[0, 3], [1], [2, 3]], "router_tau": 1.0,
}  # fmt: skip


@pytest.mark.parametrize("changes", [{}, {"patch_rank": 4}, {"skipped_keys": "masked", "patch_rank": 2}], ids=str)
def test_what_is_spent_is_what_the_closed_form_counts(make_mom, changes):
    model = make_mom(**FORKS, **changes)
    ids = torch.randint(1, 61, (2, 12), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        routing = model(input_ids=ids, output_router_logits=True, use_cache=False).routing
    macs = mom_macs(model.config, 2, 12, realised(routing, 24))
    planned = mom_macs(model.config, 2, 12, planned_usage(model.config, 2, 12))
    reachable = planned.total - planned.head - planned.routers
    skipping = {(r.kind, r.step): float((r.modules == r.skip).float().mean()) for r in routing if r.routed}
    assert 0 < sum(skipping.values()) < len(skipping) == 4
    assert budget_of(model.config, 12).spent(skipping) == pytest.approx((macs.total - macs.head) / reachable, rel=1e-6)


def test_a_threshold_saves_the_goal_to_the_token():
    generator = torch.Generator().manual_seed(0)
    scores = [torch.randn(n, generator=generator) + shift for n, shift in ((400, 0.0), (300, 1.0), (500, -1.0))]
    savings = [0.3, 0.1, 0.25]
    for goal in (0.01, 0.2, 0.5):
        threshold = spend(scores, savings, goal, floor=0.0)
        saved = sum(s * float((one < threshold).double().mean()) for s, one in zip(savings, scores, strict=True))
        last = max((float(one[one < threshold].max()), i) for i, one in enumerate(scores) if (one < threshold).any())[1]
        assert saved >= goal - 1e-12 > saved - savings[last] / len(scores[last]) - 1e-9, goal


def test_nothing_to_save_and_too_much_to_save():
    scores = [torch.tensor([1.0, 2.0, 3.0])]
    assert spend(scores, [0.5], 0.0) < 1.0
    assert spend(scores, [0.5], 0.6, floor=0.0) > 3.0
    assert 2.0 < spend(scores, [0.5], 0.6, floor=0.3) < 3.5


def test_equal_scores_skip_together():
    threshold = spend([torch.tensor([1.0, 1.0, 1.0, 2.0])], [1.0], 0.3, floor=0.0)
    assert 1.0 < threshold < 2.0


def test_the_floor_is_kept_and_lifted_back_to():
    generator = torch.Generator().manual_seed(1)
    cheap, dear = torch.randn(200, generator=generator) - 50, torch.randn(200, generator=generator)
    threshold = spend([cheap, dear], [0.5, 0.5], 0.6, floor=0.1)
    assert float((cheap < threshold).double().mean()) == 1.0  # all of it lies below: only lifting keeps its floor
    lifted = cheap + lift(cheap, threshold, floor=0.1)
    assert int((lifted >= threshold - 1e-4).sum()) == kept_tokens(200, 0.1) == 20
    assert lift(dear, threshold, floor=0.1) == 0.0
    saved = 0.5 * 0.9 + 0.5 * float((dear < threshold).double().mean())
    assert saved == pytest.approx(0.6, abs=0.5 / 200)


@pytest.mark.parametrize("kind", ["attention", "feed-forward"])
def test_a_patch_as_dear_as_its_module_is_refused(make_mom, kind):
    changes = {"intermediate_size": 8, "patch_rank": 8} if kind == "feed-forward" else {"patch_rank": 32}
    forks = FORKS if kind == "attention" else {**FORKS, "mha_reach": [[0], [1], [2]]}
    config = make_mom(**{**forks, **changes}).config
    with pytest.raises(MomifyError, match=f"skips {kind} saves no MACs"):
        check_share(budget_of(config, 12), 0.95, [("ffn", 0)])


def test_a_budget_out_of_reach_is_refused(make_mom):
    budget = budget_of(make_mom(**FORKS).config, 12)
    places = [("mha", 0), ("mha", 1), ("ffn", 0), ("ffn", 2)]
    with pytest.raises(MomifyError, match="is out of reach"):
        check_share(budget, 0.2, places)
    check_share(budget, 0.95, places)
