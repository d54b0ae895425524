"""The search keeps to its budget, by the figures of the plans themselves, and nothing better is left out."""

from dataclasses import replace
from itertools import product

import pytest

from momify.convert.homes import Request
from momify.errors import MomifyError
from momify.plan.figures import figures_of, planned_shape
from momify.plan.reading import dense_shape, read_shape
from momify.plan.search import Ceilings, parse_budget, search, within, worth

SMALL = dense_shape({"n_layer": 5, "n_embd": 32, "vocab_size": 61, "n_positions": 48}, "small")


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("flops<=0.84,kv<=0.5,params<=0.75", Ceilings(0.84, 0.5, 0.75)),
        (" kv < 1 ", Ceilings(kv=1.0)),
        ("params<=.5", Ceilings(params=0.5)),
    ],
)
def test_budgets(text: str, budget: Ceilings) -> None:
    assert parse_budget(text) == budget


@pytest.mark.parametrize("text", ["", "flops", "flops>=0.5", "speed<=2", "kv<=0", "kv<=-1", "kv<=0.5,kv<=0.4", "kv<=x"])
def test_budgets_that_are_none(text: str) -> None:
    with pytest.raises(MomifyError, match="--budget"):
        parse_budget(text)


@pytest.mark.parametrize("text", ["flops<=0.84,kv<=0.5,params<=0.75", "params<=0.5", "kv<=0.2", "flops<=0.7"])
@pytest.mark.parametrize("name", ["gpt2", "gpt2-xl"])
def test_what_is_found_keeps_to_the_budget(name: str, text: str) -> None:
    dense = read_shape(name)
    found = search(dense, parse_budget(text), 1024)
    assert 1 <= len(found) <= 5
    assert any(one.request.modules_per_token == 2 for one in found)
    for one in found:
        assert within(parse_budget(text), dense, one.figures)
    firsts = [worth(one.request, dense.steps) for one in found if one.request.modules_per_token == 1]
    assert firsts == sorted(firsts, reverse=True)


@pytest.mark.parametrize("text", ["flops<=0.8,kv<=0.6,params<=0.8", "flops<=0.6", "params<=0.6,kv<=0.8"])
def test_nothing_better_was_missed(text: str) -> None:
    """Every configuration of a small source, tried one by one."""
    budget, sizes = parse_budget(text), range(1, 6)
    best = 0.0
    for mha, ffn, mha_steps, ffn_steps in product(sizes, repeat=4):
        if mha > mha_steps or ffn > ffn_steps:
            continue
        request = Request(mha, ffn, 5, 1, mha_steps, ffn_steps, step_rank=0)
        if within(budget, SMALL, figures_of(planned_shape(SMALL, request), 32)):
            best = max(best, worth(request, 5))
    assert best > 0
    assert worth(search(SMALL, budget, 32)[0].request, 5) == best


def test_room_that_is_left_goes_into_step_deltas() -> None:
    """With the usual rank where it fits, else with the largest that does."""
    dense, ranks = read_shape("gpt2-large"), set()
    for text in ("flops<=0.84,kv<=0.5,params<=0.75", "params<=0.5", "kv<=0.4,params<=0.6"):
        for one in search(dense, parse_budget(text), 1024):
            ranks.add(one.request.step_rank)
            if one.request.step_rank is not None:
                more = replace(one.request, step_rank=one.request.step_rank + 1)
                assert not within(parse_budget(text), dense, figures_of(planned_shape(dense, more), 1024))
    assert None in ranks
    assert len(ranks) > 1


def test_a_deeper_model_where_more_flops_are_allowed() -> None:
    deeper = Request(3, 5, 7, 1, 5, 7)
    figures = figures_of(planned_shape(SMALL, deeper), 32)
    assert within(Ceilings(flops=1.3), SMALL, figures)
    assert any(one.request.depth > 5 or one.request.mha_steps == 5 for one in search(SMALL, Ceilings(flops=1.3), 32))


def test_nothing_fits() -> None:
    with pytest.raises(MomifyError, match=r"nothing fits params<=0\.05"):
        search(SMALL, Ceilings(params=0.05), 32)
