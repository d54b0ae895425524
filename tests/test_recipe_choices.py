"""recipe_choices.py: what a recipe refuses is what the training of its model would refuse, hours later, and no more."""

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import GPT2Config

from momify.conversion import request_of
from momify.convert.assemble import RouterSettings, mom_config
from momify.convert.homes import Alike, check_request, choose_homes, with_step_rank
from momify.errors import MomifyError
from momify.model import MomForCausalLM
from momify.recipe import Recipe, make_recipe
from momify.train.fit import routing_aids
from momify.train.frozen import freeze
from momify.train.stand_ins import steps_alone

WIDTH = 8
KEYS = {"supervise": 0.5, "budget": 0.9, "stand_ins_first": 0.5}
STEPS = st.sampled_from([None, None, 1, 2, 3, 4, 5])


class _PastError(Exception):
    """The check lies behind, the training would begin."""


def _no_text(blocks: int) -> None:
    raise _PastError


@st.composite
def recipes(draw: st.DrawFn) -> tuple[dict[str, Any], int]:
    """A recipe as nested dicts without any of KEYS, and the layers of its source, which it may not tell."""
    layers, told = draw(st.integers(2, 4)), draw(st.booleans())
    mom = {
        "mha": draw(st.integers(1, layers)), "ffn": draw(st.integers(1, layers)), "depth": draw(STEPS),
        "mha_steps": draw(STEPS), "ffn_steps": draw(STEPS),
        "modules_per_token": draw(st.sampled_from([1, 1, 1, 2])),
        "reach": draw(st.sampled_from([None, None, "all", "skip", "home"])),
        "init": draw(st.sampled_from(["home", "home", "random"])),
        "patch_rank": draw(st.sampled_from([0, 0, 2])), "step_rank": draw(st.sampled_from([None, 0, 2])),
        "budget": draw(st.sampled_from([None, None, None, 0.9])),
    }  # fmt: skip
    train = {"explore": draw(st.sampled_from([0.0, 0.05])), "balance": draw(st.sampled_from([0.0, 0.01]))}
    scratch = {"layers": layers, "width": WIDTH, "heads": 2, "context": 16}
    source = {"scratch": scratch} if told else {"model": "src"}
    return {"source": source, "mom": mom, "data": {"train": "x.txt", "block_length": 16}, "train": train}, layers


def as_asked(data: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    return {**data, "train": {**data["train"], **{key: KEYS[key] for key in keys}}}


def refused_at_once(data: dict[str, Any]) -> str | None:
    """The message about choices and additions with which a recipe is refused; other mistakes are no case."""
    try:
        make_recipe(data, "r")
    except MomifyError as error:
        assume("this mom block makes none" in str(error))
        return str(error)
    return None


def refused_later(recipe: Recipe, layers: int) -> bool:
    """Whether the training refuses the recipe's model, made as conversion and pipeline.recover make it."""
    request, train = with_step_rank(request_of(recipe.mom), WIDTH), recipe.train
    if train.budget is None:
        train = train.model_copy(update={"budget": recipe.mom.budget})
    explores = recipe.mom.modules_per_token == 1 and not (train.supervise or train.budget)
    source = GPT2Config(n_embd=WIDTH, n_layer=layers, n_head=2, n_positions=16, vocab_size=11)
    routers = RouterSettings(explore=train.explore if explores else 0.0)
    model = MomForCausalLM(mom_config(source, choose_homes(Alike(layers), request), routers=routers))
    course = SimpleNamespace(
        settings=train, model=model, teacher=object(), place=SimpleNamespace(seed=0),
        data=SimpleNamespace(block_length=16, spread_blocks=_no_text),
    )  # fmt: skip
    freeze(model, train)
    try:
        steps_alone(model, train)
        routing_aids(course)
    except _PastError:
        return False
    except MomifyError as error:  # others hang on sizes: a share out of reach, patches that cost what modules do
        return "nothing would learn" in str(error) or "need half-steps that choose" in str(error)
    return False


@settings(max_examples=150, deadline=None)
@given(recipes(), st.sets(st.sampled_from(sorted(KEYS)), min_size=1).map(sorted).map(tuple))
def test_a_recipe_is_refused_for_what_its_training_refuses(made: tuple[dict, int], keys: tuple[str, ...]) -> None:
    data, layers = made
    without = as_asked(data, ())
    try:
        check_request(request_of(make_recipe(without, "r").mom), layers)
    except MomifyError:
        assume(False)
    verdict = refused_at_once(as_asked(data, keys))
    plain = make_recipe(without, "r")
    recipe = plain.model_copy(update={"train": plain.train.model_copy(update={key: KEYS[key] for key in keys})})
    later = refused_later(recipe, layers)
    assert later or not verdict, verdict
    if "scratch" in data["source"]:
        assert bool(verdict) == later, "where the layers are known, all is"


STATIC = {"mha": 3, "ffn": 3}


@pytest.mark.parametrize(
    ("mom", "train", "words"),
    [
        (STATIC, {"supervise": 1}, "train.supervise 1 needs half-steps that choose"),
        (STATIC, {"budget": 0.9}, "train.budget 0.9 needs half-steps that choose"),
        (STATIC, {"stand_ins_first": 0.5}, "set mom.patch_rank"),
        ({**STATIC, "reach": "all"}, {"supervise": 1}, "set mom.reach skip or mom.budget"),
        ({**STATIC, "depth": 12}, {"supervise": 1}, "train.supervise 1"),
        ({**STATIC, "mha_steps": 5, "step_rank": 0}, {"stand_ins_first": 0.5}, "train.stand_ins_first 0.5"),
        ({**STATIC, "depth": 3, "patch_rank": 2}, {"stand_ins_first": 0.5}, "train.stand_ins_first 0.5"),
        ({**STATIC, "reach": "all"}, {"stand_ins_first": 0.5, "explore": 0}, "train.stand_ins_first 0.5"),
        ({**STATIC, "budget": 0.9}, {"stand_ins_first": 0.5}, "train.stand_ins_first 0.5"),
        (STATIC | {"reach": "skip"}, {"supervise": 1}, None),
        (STATIC | {"budget": 0.9}, {"budget": 0.9}, None),
        ({"mha": 1, "ffn": 3, "reach": "all"}, {"supervise": 1}, None),  # its one module, or SKIP
        ({"mha": 1, "ffn": 3, "depth": 12}, {"supervise": 1}, None),  # added steps, if the source has fewer layers
        ({**STATIC, "patch_rank": 2}, {"stand_ins_first": 0.5}, None),
        ({**STATIC, "mha_steps": 5}, {"stand_ins_first": 0.5}, None),
        ({**STATIC, "depth": 12}, {"stand_ins_first": 0.5}, None),
        ({**STATIC, "modules_per_token": 2}, {"stand_ins_first": 0.5}, None),
        ({**STATIC, "init": "random"}, {"stand_ins_first": 0.5}, None),
        ({**STATIC, "budget": 0.9}, {"stand_ins_first": 0.5, "supervise": 1}, None),
    ],
)
def test_refused_before_the_conversion(mom: dict[str, Any], train: dict[str, Any], words: str | None) -> None:
    data = {"source": {"model": "gpt2"}, "mom": mom, "data": {"train": "x.txt"}, "train": train}
    if words is None:
        assert make_recipe(data, "r")
        return
    with pytest.raises(MomifyError, match="this mom block makes none") as caught:
        make_recipe(data, "r")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
