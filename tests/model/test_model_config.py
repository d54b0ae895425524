"""The config: defaults, derived values, aliases, and every mistake by name."""

from pathlib import Path
from typing import Any

import pytest

from momify.model import MomConfig, half_steps
from momify.model.config import OLDEST, check_version

SMALL: dict[str, Any] = {"num_steps": 3, "num_mha_modules": 2, "num_ffn_modules": 2}


def test_defaults_reach_everything_from_a_home_each() -> None:
    config = MomConfig(num_steps=5, num_mha_modules=2, num_ffn_modules=3)
    assert config.mha_homes == [0, 1, 0, 1, 0]
    assert config.ffn_homes == [0, 1, 2, 0, 1]
    assert config.mha_reach == [[0, 1, 2]] * 5
    assert config.ffn_reach == [[0, 1, 2, 3]] * 5
    assert config.num_hidden_layers == 5


def test_aliases_of_gpt2() -> None:
    config = MomConfig(n_embd=64, n_head=4, n_inner=128, n_positions=32, **SMALL)
    assert (config.hidden_size, config.num_attention_heads, config.intermediate_size) == (64, 4, 128)
    assert config.max_position_embeddings == 32
    assert config.n_layer == 3


def test_slots_are_numbered_over_the_steps_with_attention() -> None:
    config = MomConfig(mha_homes=[2, 1, 2], mha_reach=[[2], [1], [0, 2]], num_hidden_layers=9, **SMALL)
    assert [(half.step, half.slot) for half in half_steps(config) if half.kind == "mha"] == [(1, 0), (2, 1)]
    assert config.num_hidden_layers == 2
    assert config.routed("mha") == [2]
    assert config.running("mha") == [1, 2]
    assert config.routed("ffn") == [0, 1, 2]
    assert MomConfig(mha_homes=[2] * 3, mha_reach=[[2]] * 3, **SMALL).num_hidden_layers == 1


def test_half_steps_in_order_with_router_rows_and_key_rules() -> None:
    tables: dict[str, Any] = {
        "mha_homes": [2, 1, 0], "mha_reach": [[1, 2], [1], [0, 2]], "ffn_homes": [2, 0, 1],
        "ffn_reach": [[2], [0, 1], [1]],
    }  # fmt: skip
    halves = half_steps(MomConfig(**tables, **SMALL))
    assert [(h.kind, h.step, h.route, h.slot) for h in halves] == [
        ("mha", 0, 0, 0), ("mha", 1, None, 1), ("ffn", 1, 0, None), ("mha", 2, 1, 2), ("ffn", 2, None, None)
    ]  # fmt: skip
    assert [(h.key_home, h.masks_keys) for h in halves if h.kind == "mha"] == [
        (None, True), (None, False), (0, False)
    ]  # fmt: skip
    masked = half_steps(MomConfig(**tables, skipped_keys="masked", **SMALL))
    assert [h.masks_keys for h in masked if h.kind == "mha"] == [True, False, True]
    several = half_steps(MomConfig(**tables, modules_per_token=2, **SMALL))
    assert not any(h.masks_keys or h.key_home is not None for h in several)


@pytest.mark.parametrize("reach", [[[0, 1]] * 12, [list(range(13))] * 12])
def test_round_trip_through_json(tmp_path, reach) -> None:
    """Also a table that equals what another config would fill in by itself."""
    config = MomConfig(num_mha_modules=13, mha_reach=reach, mha_homes=[0] * 12, router_tau=0.5)
    config.save_pretrained(tmp_path)
    again = MomConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    assert again.mha_reach == reach


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_steps": 0}, "num_steps is 0; use a whole number of at least 1"),
        ({"hidden_size": "32"}, "hidden_size is '32'"),
        ({"num_ffn_modules": True}, "num_ffn_modules is True"),
        ({"vocab_size": -5}, "vocab_size is -5"),
        ({"num_attention_heads": 5}, "hidden_size 768 is not a multiple of num_attention_heads 5"),
        ({"modules_per_token": 4}, "modules_per_token 4 is more than any step can choose from; use at most 3"),
        ({"router_hidden": -1}, "router_hidden is -1"),
        ({"router_tau": 0.0}, "router_tau is 0"),
        ({"router_tau": float("nan")}, "router_tau is nan"),
        ({"home_bias": float("inf")}, "home_bias is inf"),
        ({"layer_norm_epsilon": -1e-5}, "layer_norm_epsilon is -1e-05"),
        ({"resid_pdrop": 1.5}, "resid_pdrop is 1.5; use a number between 0.0 and 1.0"),
        ({"router_explore": 0.2, "modules_per_token": 2}, "router_explore 0.2 needs modules_per_token 1"),
        ({"activation_function": "gelo"}, "activation_function 'gelo' is unknown"),
        ({"activation_function": "prelu"}, "activation_function 'prelu' .* has own parameters"),
        ({"activation_function": "xielu"}, "activation_function 'xielu' .* has own parameters"),
        ({"skipped_keys": "drop"}, "skipped_keys is 'drop'; use 'home' or 'masked'"),
        ({"mha_homes": [0, 1]}, "mha_homes has 2 entries for num_steps 3"),
        ({"ffn_reach": [[0]] * 4}, "ffn_reach has 4 entries for num_steps 3"),
        ({"mha_homes": [0, 3, 0]}, r"mha_homes\[1\] is 3"),
        ({"mha_homes": [0, 1, 0], "mha_reach": [[0], [0], [0]]}, r"mha_homes\[1\] is 1, which mha_reach\[1\] \[0\]"),
        ({"ffn_reach": [[0, 1, 2], [], [0]]}, r"ffn_reach\[1\] is \[\]"),
        ({"ffn_reach": [[0], [1, 0], [0]]}, r"ffn_reach\[1\] is \[1, 0\]; list each choice once"),
        ({"ffn_reach": [[0], [1, 1], [0]]}, r"ffn_reach\[1\] is \[1, 1\]"),
        ({"ffn_reach": [[0], [1, 3], [0]]}, r"ffn_reach\[1\] is \[1, 3\]; use 0 to 1 for modules and 2 for SKIP"),
        ({"ffn_reach": [[0], [-1, 1], [0]]}, r"ffn_reach\[1\] is \[-1, 1\]"),
    ],
    ids=str,
)
def test_mistakes_name_field_value_and_remedy(wrong, message) -> None:
    with pytest.raises(ValueError, match=message):
        MomConfig(**{**SMALL, **wrong})


@pytest.mark.parametrize("version", ["4.57.3", "5.0.0", "5.12.1", "5.16.0.dev0"])
def test_an_older_transformers_is_refused_with_the_remedy(version) -> None:
    with pytest.raises(ImportError, match=rf"needs transformers 5.17 or newer, here is {version}: pip install"):
        check_version(version)


@pytest.mark.parametrize("version", ["5.17.0", "5.24.0", "5.25.0.dev0", "6.0.0"])
def test_a_newer_one_is_not(version) -> None:
    check_version(version)


def test_what_is_installed_with_momify_is_new_enough() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    assert f"transformers>={OLDEST}," in text
