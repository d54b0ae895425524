"""The choice of modules, homes and reach: worked examples by hand, invariants by hypothesis."""

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config

from momify.convert.assemble import RouterSettings, mom_config
from momify.convert.homes import Alike, HomePlan, Request, choose_homes, reach_of, removal_quotas, spread_steps
from momify.convert.importance import Importance, Removal
from momify.errors import MomifyError
from momify.measure.budget import budget_of
from momify.model import MomConfig

# six layers; attention goes in the order 4, 2, 3 (then by need: 1, 5, 0), feed-forward in the order 3, 4 (then 2, ...)
SIX = Importance(
    method="greedy",
    num_layers=6,
    tokens=100,
    base_loss=2.0,
    mha_increase=(0.9, 0.3, 0.05, 0.2, 0.01, 0.4),
    ffn_increase=(0.8, 0.5, 0.1, 0.02, 0.03, 0.6),
    removals=(
        Removal("mha", 4, 0.01, 2.01),
        Removal("ffn", 3, 0.02, 2.03),
        Removal("ffn", 4, 0.04, 2.07),
        Removal("mha", 2, 0.06, 2.13),
        Removal("mha", 3, 0.5, 2.63),
    ),
)


def test_the_plain_plan_is_the_statically_pruned_source():
    plan = choose_homes(SIX, Request(mha=3, ffn=4))
    assert plan.mha_layers == (0, 1, 5)
    assert plan.ffn_layers == (0, 1, 2, 5)
    assert plan.step_layers == (0, 1, 2, 3, 4, 5)
    assert plan.mha_homes == (0, 1, 3, 3, 3, 2)  # 3 is SKIP
    assert plan.ffn_homes == (0, 1, 2, 4, 4, 3)
    assert plan.mha_reach == ((0,), (1,), (3,), (3,), (3,), (2,))
    assert plan.running_steps("ffn") == [0, 1, 2, 5]
    assert plan.home_layer("mha", 5) == 5
    assert plan.home_layer("mha", 3) is None


def test_more_steps_reuse_the_nearest_module_where_removal_hurt_most():
    plan = choose_homes(SIX, Request(mha=3, ffn=4, mha_steps=5))
    # layer 3 hurt most (0.5), then 2; nearest kept of 0, 1, 5: layer 3 is as near to 1 as to 5 -> 1, layer 2 -> 1
    assert plan.mha_homes == (0, 1, 1, 1, 3, 2)
    assert plan.running_steps("mha") == [0, 1, 2, 3, 5]
    assert choose_homes(SIX, Request(mha=3, ffn=4, mha_steps=6)).home_layer("mha", 4) == 5


def test_reuse_goes_by_what_the_removal_cost_not_by_its_turn():
    removals = (Removal("mha", 2, 0.4, 2.4), Removal("mha", 3, 0.1, 2.5))
    plan = choose_homes(dataclasses.replace(SIX, removals=removals), Request(mha=3, ffn=6, mha_steps=4))
    assert plan.mha_layers == (0, 1, 5)  # 2, 3 and then, by leave-one-out, 4
    assert plan.mha_homes == (0, 1, 1, 3, 3, 2)


def test_fewer_steps_than_modules_run_where_they_are_needed_most():
    plan = choose_homes(SIX, Request(mha=6, ffn=6, mha_steps=2))
    assert plan.mha_layers == (0, 1, 2, 3, 4, 5)
    assert plan.running_steps("mha") == [0, 5]  # the last of the order; 3 was dear to remove, but not dearest
    assert plan.running_steps("ffn") == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("changes", "reach"),
    [
        ({}, "home"), ({"depth": 6}, "home"), ({"mha_steps": 5}, "home"), ({"depth": 7}, "all"), ({"depth": 3}, "all"),
        ({"modules_per_token": 2}, "all"), ({"init": "random"}, "all"), ({"reach": "skip"}, "skip"),
    ],
)  # fmt: skip
def test_without_a_word_on_reach_steps_are_static_where_nothing_else_is_asked(changes, reach):
    request = Request(**{"mha": 3, "ffn": 4, **changes})
    assert reach_of(request, 6) == reach
    assert choose_homes(SIX, request) == choose_homes(SIX, dataclasses.replace(request, reach=reach))


@pytest.mark.parametrize(
    ("reach", "first", "removed"),
    [("all", (0, 1, 2, 3), (3,)), ("skip", (0, 3), (3,)), ("home", (0,), (3,))],
)
def test_reach(reach, first, removed):
    plan = choose_homes(SIX, Request(mha=3, ffn=4, reach=reach))
    assert plan.mha_reach[0] == first
    assert plan.mha_reach[4] == removed


def test_depth_below_drops_whole_layers_that_cost_least():
    plan = choose_homes(SIX, Request(mha=3, ffn=4, depth=4))
    # layers 3 and 4 lose nothing beyond what goes anyway
    assert plan.step_layers == (0, 1, 2, 5)
    assert plan.mha_layers == (0, 1, 5)
    assert plan.ffn_layers == (0, 1, 2, 5)
    assert plan.mha_homes == (0, 1, 3, 2)
    assert plan.ffn_homes == (0, 1, 2, 3)


def test_depth_below_forces_halves_out_and_gives_their_place_to_others():
    plan = choose_homes(SIX, Request(mha=4, ffn=6, depth=5))
    # attention of 2 and 4 goes; as a whole, layer 4 costs least: 0.04 (feed-forward, from its removal)
    assert plan.step_layers == (0, 1, 2, 3, 5)
    assert plan.mha_layers == (0, 1, 3, 5)
    assert plan.ffn_layers == (0, 1, 2, 3, 4, 5)  # the pool keeps six: one has no step of its own
    assert plan.ffn_homes == (0, 1, 2, 3, 5)
    forced = choose_homes(SIX, Request(mha=3, ffn=2, depth=3))
    assert forced.step_layers == (0, 1, 5)
    assert (forced.mha_layers, forced.ffn_layers) == ((0, 1, 5), (0, 5))


def test_kept_modules_come_from_layers_that_stay_where_there_are_enough():
    # layer 2's attention is dear, but the whole of layer 2 is the cheapest to drop
    importance = dataclasses.replace(
        SIX, mha_increase=(0.1, 0.2, 0.3), ffn_increase=(0.9, 0.9, 0.0), num_layers=3, removals=()
    )
    plan = choose_homes(importance, Request(mha=2, ffn=2, depth=2))
    assert plan.step_layers == (0, 1)
    assert plan.mha_layers == (0, 1)
    assert plan.mha_homes == (0, 1)


def test_depth_above_adds_steps_that_start_with_skip_and_reach_all():
    plan = choose_homes(SIX, Request(mha=6, ffn=6, depth=8))
    assert plan.step_layers == (0, 1, None, 2, 3, None, 4, 5)
    assert plan.mha_homes == (0, 1, 6, 2, 3, 6, 4, 5)
    assert plan.mha_reach[2] == plan.ffn_reach[5] == tuple(range(7))
    assert len(plan.running_steps("mha")) == 8
    limited = choose_homes(SIX, Request(mha=3, ffn=6, depth=8, mha_steps=4))
    assert limited.running_steps("mha") == [0, 1, 2, 7]  # own modules first, then added steps


@pytest.mark.parametrize(
    ("layers", "added", "expected"),
    [
        ([0, 1, 2, 3], 1, [0, 1, None, 2, 3]),
        ([0, 1, 2, 3], 3, [0, None, 1, None, 2, None, 3]),
        ([0], 3, [None, None, 0, None]),
        ([0, 1], 0, [0, 1]),
        ([0, 1, 2, 3, 4, 5], 2, [0, 1, None, 2, 3, None, 4, 5]),
    ],
)
def test_spread_steps(layers, added, expected):
    assert spread_steps(layers, added) == expected


def test_random_start_reaches_everything_at_every_step():
    plan = choose_homes(SIX, Request(mha=3, ffn=4, modules_per_token=2, init="random"))
    assert set(plan.mha_reach) == {(0, 1, 2, 3)}
    assert set(plan.ffn_reach) == {(0, 1, 2, 3, 4)}
    assert (plan.init, plan.modules_per_token) == ("random", 2)
    assert plan.mha_layers == (0, 1, 5)


def test_quotas_cover_pool_and_depth():
    assert removal_quotas(Request(mha=3, ffn=4), 6) == (3, 2)
    assert removal_quotas(Request(mha=6, ffn=4, depth=3), 6) == (3, 3)
    assert removal_quotas(Request(mha=6, ffn=6, depth=9), 6) == (0, 0)


def test_a_deeper_measurement_serves_smaller_requests():
    plan = choose_homes(SIX, Request(mha=5, ffn=5))
    assert (plan.mha_layers, plan.ffn_layers) == ((0, 1, 2, 3, 5), (0, 1, 2, 4, 5))


def test_nothing_to_remove_needs_no_measurement():
    plan = choose_homes(Importance.unmeasured(4), Request(mha=4, ffn=4))
    assert plan.mha_homes == plan.ffn_homes == (0, 1, 2, 3)
    with pytest.raises(MomifyError, match="no calibration was run"):
        choose_homes(Importance.unmeasured(4), Request(mha=3, ffn=4))


def test_json_round_trip():
    plan = choose_homes(SIX, Request(mha=3, ffn=4, depth=8))
    assert HomePlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


@st.composite
def requests(draw) -> tuple[Importance, Request]:
    total = draw(st.integers(1, 7))
    value = st.floats(0, 1, width=16)
    increases = [tuple(draw(st.lists(value, min_size=total, max_size=total))) for _ in range(2)]
    request = Request(
        mha=draw(st.integers(1, total)),
        ffn=draw(st.integers(1, total)),
        depth=draw(st.none() | st.integers(1, total + 3)),
        modules_per_token=draw(st.integers(1, 2)),
        init=draw(st.sampled_from(["home", "random"])),
    )
    depth = request.depth or total
    request = dataclasses.replace(
        request,
        mha_steps=draw(st.none() | st.integers(1, depth)),
        ffn_steps=draw(st.none() | st.integers(1, depth)),
    )
    return Importance("leave_one_out", total, 5, 1.0, *increases), request


@given(case=requests())
@settings(max_examples=80, deadline=None)
def test_every_plan_is_a_valid_config_and_keeps_its_promises(case):
    importance, request = case
    plan = choose_homes(importance, request)
    depth = request.depth or importance.num_layers
    config = MomConfig(
        num_mha_modules=request.mha,
        num_ffn_modules=request.ffn,
        num_steps=depth,
        **{name: getattr(plan, name) for name in ("mha_homes", "ffn_homes", "mha_reach", "ffn_reach")},
    )
    assert config.num_steps == depth
    for kind in ("mha", "ffn"):
        layers = plan.layers(kind)
        assert len(layers) == request.modules(kind) == len(set(layers))
        assert list(layers) == sorted(layers)
        if request.steps(kind) is not None:
            assert len(plan.running_steps(kind)) == request.steps(kind)
        for step, layer in enumerate(plan.step_layers):
            if layer in layers and step in plan.running_steps(kind):
                assert plan.home_layer(kind, step) == layer  # an own module is always the home
    kept = [layer for layer in plan.step_layers if layer is not None]
    assert kept == sorted(kept)
    assert len(kept) == min(depth, importance.num_layers)


REFUSALS = {
    "mha 0": ({"mha": 0}, r"mha is 0; the source has 6 attention modules, use 1 to 6"),
    "mha above": ({"mha": 7}, r"mha is 7; the source has 6 attention"),
    "mha negative": ({"mha": -1}, r"mha is -1;"),
    "ffn 0": ({"ffn": 0}, r"ffn is 0; the source has 6 feed-forward modules, use 1 to 6"),
    "ffn above": ({"ffn": 7}, r"ffn is 7;"),
    "ffn negative": ({"ffn": -3}, r"ffn is -3;"),
    "depth 0": ({"depth": 0}, r"depth is 0; a model needs at least 1 step"),
    "depth negative": ({"depth": -2}, r"depth is -2;"),
    "mha_steps 0": ({"mha_steps": 0}, r"mha_steps is 0; the model has 6 steps, use 1 to 6"),
    "mha_steps above": ({"mha_steps": 7}, r"mha_steps is 7; the model has 6 steps"),
    "mha_steps above a small depth": ({"depth": 4, "mha_steps": 5}, r"mha_steps is 5; the model has 4 steps"),
    "ffn_steps above": ({"ffn_steps": 9}, r"ffn_steps is 9;"),
    "ffn_steps negative": ({"ffn_steps": -1}, r"ffn_steps is -1;"),
    "K 0": ({"modules_per_token": 0}, r"modules_per_token is 0;.*use 1 to 4"),
    "K too large": ({"modules_per_token": 5}, r"modules_per_token is 5; a step chooses from 4.*use 1 to 4"),
    "K with static steps": ({"modules_per_token": 2, "reach": "home"}, r"modules_per_token is 2.*use 1 to 1"),
    "unknown init": ({"init": "zero"}, r"init is 'zero'; use one of home, random"),
    "unknown reach": ({"reach": "some"}, r"reach is 'some'; use one of all, skip, home"),
    "random but static": ({"init": "random", "reach": "home"}, r"reach is 'home' with init random"),
    "added steps that could only skip": ({"depth": 7, "reach": "skip"}, r"reach is 'skip' with depth 7"),
    "modules out of reach": ({"mha_steps": 2, "reach": "home"}, r"mha is 3 but only 2 steps run one"),
    "modules without a step": ({"depth": 2, "reach": "skip"}, r"mha is 3 but only 2 steps run one"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_impossible_requests_are_refused_in_one_line(case):
    changes, message = REFUSALS[case]
    request = Request(**{"mha": 3, "ffn": 4, **changes})
    for ask in (lambda: choose_homes(SIX, request), lambda: removal_quotas(request, 6)):
        with pytest.raises(MomifyError, match=message) as caught:
            ask()
        assert "\n" not in str(caught.value)


@given(case=requests())
@settings(max_examples=80, deadline=None)
def test_what_goes_changes_no_macs_that_a_budget_counts(case):
    """So a budget out of reach is refused before anything is measured (conversion.py)."""
    importance, request = case
    request = dataclasses.replace(request, modules_per_token=1, init="home", reach="skip", patch_rank=2)
    alike = Alike(importance.num_layers)
    try:
        plans = [choose_homes(one, request) for one in (importance, alike)]
    except MomifyError:  # steps that could only skip, modules without a step
        with pytest.raises(MomifyError):
            choose_homes(alike, request)
        return
    configs = [mom_config(GPT2Config(n_embd=16, n_head=2), plan, True, RouterSettings()) for plan in plans]
    first, second = (
        (budget_of(config, 8), [len(config.routed(kind)) for kind in ("mha", "ffn")]) for config in configs
    )
    assert first == second
