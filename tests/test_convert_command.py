"""The options of `momify convert`, end to end on a tiny source: what each changes in what is printed and written."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from momify import conversion
from momify.conversion import judge
from momify.convert.assemble import network_of
from momify.convert.source import open_source
from momify.models import load_mom

Momify = Callable[..., Any]  # `momify ARGUMENTS` in this process: code, out, err


def test_convert_puts_patches_in_the_place_of_what_goes(there: Path, momify: Momify) -> None:
    asked = ("convert", "src", "--mha", 2, "--ffn", 3, "--calibration", "text.txt")
    told = momify(*asked, "--patch-rank", 4, "--name", "patched")
    assert (told.code, told.err) == (0, ""), told.err
    assert "patches of rank 4 at 2 attention and 1 feed-forward steps" in told.out
    assert "fitted modules that stay and what stands in on" in told.out
    bare = momify(*asked, "--name", "bare", "--quiet")
    assert (bare.code, bare.out) == (0, "runs/bare/model\n")
    patched, bare = (load_mom(there / f"runs/{name}/model") for name in ("patched", "bare"))
    assert patched.model.mha_patch.weight_out.abs().sum(dim=(1, 2)).gt(0).all()
    assert patched.num_parameters() - bare.num_parameters() == 3 * (2 * 32 * 4 + 32)


def test_convert_may_leave_the_weights_of_what_stays_alone(there: Path, momify: Momify) -> None:
    asked = ("convert", "src", "--mha", 2, "--ffn", 3, "--patch-rank", 4, "--calibration", "text.txt")
    told = momify(*asked, "--no-refit", "--name", "plain")
    assert told.code == momify(*asked, "--name", "held").code == 0, told.err
    assert momify(*asked, "--name", "refitted", "--refit-ridge", 0.001).code == 0
    found = json.loads((there / "runs/held/model/momify.json").read_text())
    assert (found["importance"]["method"], found["recipe"]["mom"]["refit_ridge"]) == (
        "cosine",
        30.0,
    )  # what trains best
    assert "fitted what stands in on" in told.out
    kept = json.loads((there / "runs/plain/model/momify.json").read_text())["plan"]["ffn_layers"]
    own = network_of(open_source(there / "src")).layers.down_weight[kept]
    plain, held, refitted = (
        load_mom(there / f"runs/{name}/model").model.ffn.down.weight for name in ("plain", "held", "refitted")
    )
    assert torch.equal(plain, own)
    assert 1e-3 < torch.dist(held, own) < 0.5 * torch.dist(refitted, own)


def shared(model: Path) -> tuple[int, int]:
    """How many attention modules several steps share, and at how many steps; which go is next to a tie here."""
    homes = load_mom(model).config.mha_homes
    several = [home for home in homes if homes.count(home) > 1]
    assert several
    return len(set(several)), len(several)


def test_steps_that_share_a_module_differ_unless_told_otherwise(there: Path, momify: Momify) -> None:
    asked = ("convert", "src", "--mha", 2, "--ffn", 4, "--mha-steps", 4, "--calibration", "text.txt")
    asked += ("--importance", "cosine")
    usual = momify(*asked, "--name", "usual")
    modules, steps = shared(there / "runs/usual/model")
    assert f"changes to shared modules of rank 16 at {steps} attention" in usual.out
    assert f"shared modules made of all the layers that they stand for, aligned: {modules}" in usual.out
    named = momify(*asked, "--name", "named", "--step-rank", 16, "--merge")
    bare = momify(*asked, "--name", "bare", "--step-rank", 0)
    assert usual.code == named.code == bare.code == 0
    one, other = (load_mom(there / f"runs/{name}/model").state_dict() for name in ("usual", "named"))
    assert all(torch.equal(one[name], other[name]) for name in other)
    assert "shared modules" not in bare.out


def test_convert_tries_each_choice_and_tells(there: Path, momify: Momify, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("convert", "src", "--mha", 2, "--ffn", 3, "--calibration", "text.txt")
    done = momify(*words, "--importance", "trial", "--name", "one")
    assert done.code == 0, done.err
    first = json.loads((there / "runs/one/model/momify.json").read_text())["importance"]
    came = {trial["method"]: trial["divergence"] for trial in first["trials"]}
    assert set(came) == {"cosine", "every_other", "greedy"}
    assert came[first["method"]] == min(came.values())
    assert f"chosen by {first['method']}" in done.out
    assert all(f"{method} {nats:.4f}" in done.out for method, nats in came.items())
    asked = momify(*words, "--importance", first["method"], "--name", "asked")
    assert asked.code == 0
    plans = [json.loads((there / f"runs/{name}/model/momify.json").read_text())["plan"] for name in ("one", "asked")]
    assert plans[0] == plans[1]
    monkeypatch.setattr("momify.conversion.best_of_trials", lambda *_: pytest.fail("tried again"))
    monkeypatch.setattr("momify.conversion.TRIED_WEIGHTS", 10**8)
    usual = momify(*words, "--name", "two")
    assert usual.code == 0, "the default for a small source, from the cache"
    assert "what goes is tried" in done.out
    assert "what goes is tried" not in usual.out, "nothing is tried twice"
    assert json.loads((there / "runs/two/model/momify.json").read_text())["importance"] == first


@pytest.mark.parametrize(
    ("option", "value"), [("--mha-steps", 3), ("--init", "random"), ("--depth", 5), ("--depth", 3)]
)
def test_convert_tries_nothing_where_it_would_tell_nothing(
    there: Path, momify: Momify, monkeypatch: pytest.MonkeyPatch, option: str, value: object
) -> None:
    monkeypatch.setattr("momify.conversion.TRIED_WEIGHTS", 10**8)
    monkeypatch.setattr("momify.conversion.best_of_trials", lambda *_: pytest.fail("tried"))
    words = ("convert", "src", "--mha", 2, "--ffn", 3, "--calibration", "text.txt", option, value)
    assert momify(*words).code == 0
    assert json.loads((there / "runs/src-2x3/model/momify.json").read_text())["importance"]["method"] == "cosine"
    with monkeypatch.context() as asked:
        asked.setattr("momify.conversion.judge_by_trial", lambda network, text, source, quotas: judge(
            network, text, source, quotas, "cosine"))  # fmt: skip
        told = momify(*words, "--importance", "trial", "--name", "asked")
    assert "warning: trials train each module at its one step" in told.out


def test_convert_says_why_a_large_source_is_not_tried(there: Path, momify: Momify) -> None:
    told = momify("convert", "src", "--mha", 2, "--ffn", 3, "--calibration", "text.txt")
    assert told.code == 0
    assert "what goes is chosen by block influence; --importance trial tries choices" in told.out


def test_convert_chooses_by_a_copy_that_learns_to_do_without(
    there: Path, momify: Momify, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("convert", "src", "--mha", 2, "--ffn", 3, "--calibration", "text.txt", "--importance", "layerdrop")
    done = momify(*words, "--name", "one")
    assert done.code == 0, done.err
    first = json.loads((there / "runs/one/model/momify.json").read_text())["importance"]
    assert first["method"] == "layerdrop"
    assert first["tokens"] == conversion.JUDGED_TOKENS // 64 * 63  # of each block of 64 all but the first are predicted
    assert "of a copy that learned to do without" in done.out
    assert [removal["kind"] for removal in first["removals"]].count("mha") == 2
    monkeypatch.setattr("momify.conversion.trained_with_drops", lambda *_: pytest.fail("learned again"))
    assert momify(*words, "--name", "two").code == 0
    assert momify(*words, "--name", "three", "--importance", "magic").code == 2
    assert json.loads((there / "runs/two/model/momify.json").read_text())["importance"] == first


def test_convert_chooses_by_what_is_left_after_the_fit(there: Path, momify: Momify) -> None:
    words = ("convert", "src", "--mha", 3, "--ffn", 3, "--calibration", "text.txt", "--importance", "fitted")
    done = momify(*words, "--name", "one", "--patch-rank", 2)
    assert done.code == 0, done.err
    found = json.loads((there / "runs/one/model/momify.json").read_text())["importance"]
    assert found["method"] == "fitted"
    assert "with these left out, after the fit, on other text" in done.out
    again = momify(*words, "--name", "two", "--patch-rank", 3)  # other patches, other losses
    assert again.code == 0
    other = json.loads((there / "runs/two/model/momify.json").read_text())["importance"]
    assert other["base_loss"] == found["base_loss"]
    assert other["mha_increase"] != found["mha_increase"]
    assert other["evaluations"] > 1
    for nothing in ("--no-refit", "--init=random"):
        refused = momify(*words, "--name", "three", nothing)
        assert refused.code == 2
        assert "set init home, refit_tokens, and refit_modules or patch_rank" in refused.err
        assert not (there / "runs/three").exists()


def test_convert_lets_a_shared_module_differ_or_starts_it_as_a_mean(there: Path, momify: Momify) -> None:
    asked = ("convert", "src", "--mha", 2, "--ffn", 4, "--mha-steps", 4, "--calibration", "text.txt")
    asked += ("--importance", "cosine")
    told = momify(*asked, "--step-rank", 2, "--merge", "--name", "changed")
    assert (told.code, told.err) == (0, ""), told.err
    modules, steps = shared(there / "runs/changed/model")
    assert f"changes to shared modules of rank 2 at {steps} attention" in told.out
    assert f"shared modules made of all the layers that they stand for, aligned: {modules}" in told.out
    assert momify(*asked, "--name", "bare", "--step-rank", 0).code == 0
    changed, bare = (load_mom(there / f"runs/{name}/model") for name in ("changed", "bare"))
    assert changed.model.mha_delta.qkv.weight_out.any()
    assert not torch.equal(changed.model.mha.qkv.weight, bare.model.mha.qkv.weight)


def test_cost_of_a_budget_is_told_as_what_it_is_before_tokens_skip(there: Path, momify: Momify) -> None:
    asked = ("convert", "src", "--mha", 4, "--ffn", 4, "--patch-rank", 2, "--calibration", "text.txt")
    told = momify(*asked, "--budget", 0.8, "--name", "spends")
    assert told.code == 0, told.err
    assert "cost, if no token skips (the budget spends 80% of what can be skipped)" in told.out
    assert "of the reachable MACs are spent" in told.out
    assert "if no token skips" not in momify(*asked, "--name", "whole").out
