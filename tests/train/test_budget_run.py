"""A whole run under a budget of MACs: routers fitted at conversion, the threshold held in training, both kept."""

import json

import pytest


@pytest.fixture
def place(new_place, monkeypatch):
    """A place to stand in."""
    made = new_place()
    monkeypatch.chdir(made.folder)
    monkeypatch.setenv("MOMIFY_CACHE", str(made.folder / "cache"))
    return made


def test_a_run_under_a_budget(place, momify):
    overrides = ["mom.budget=0.8", "mom.reach=skip", "mom.patch_rank=2", "mom.refit_tokens=1024", "train.steps=12",
                 "train.supervise=0.1", "train.balance=0", "train.explore=0.2", "train.log_every=1"]  # fmt: skip
    done = momify("train", "tiny.yaml", *overrides)
    assert done.code == 0, done.err
    provenance = json.loads((place.run / "model" / "momify.json").read_text())
    config = json.loads((place.run / "model" / "config.json").read_text())
    rows = [row for row in place.rows() if "spent" in row]
    assert provenance["routing"]["share"] == pytest.approx(0.8, abs=0.03)
    assert len(provenance["routing"]["skipping"]) == 2 + 3
    assert len(rows) == 12
    assert rows[0]["spent"] == pytest.approx(0.8, abs=0.1)  # from the fit on, not from home
    assert config["router_threshold"] == rows[-1]["router_threshold"] != provenance["routing"]["threshold"]
    assert config["router_explore"] == 0
    assert all("supervise" in row for row in rows)


def test_a_budget_out_of_reach_is_one_line(place, momify):
    done = momify("train", "tiny.yaml", "mom.budget=0.1", "mom.reach=skip", "mom.refit_tokens=1024")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "is out of reach" in done.err
    assert not (place.folder / "cache" / "losses").exists(), "refused before anything is measured"
