"""convert/kept_losses.py: what was measured is found again for the same source and text, and for no other."""

import json

import pytest
import torch

from momify.convert.kept_losses import kept_losses, losses_file

TEXT = torch.arange(12).view(3, 4)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MOMIFY_CACHE", str(tmp_path / "cache"))


def test_what_was_added_is_there_the_next_time():
    with kept_losses("aa", TEXT) as known:
        known["2 9"] = 1.25
    with kept_losses("aa", TEXT) as known:
        assert known == {"2 9": 1.25}


def test_an_interrupted_measurement_keeps_what_it_has():
    def measure():
        with kept_losses("aa", TEXT) as known:
            known["3"] = 0.5
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure()
    assert json.loads(losses_file("aa", TEXT).read_text()) == {"3": 0.5}


def test_what_is_no_number_is_not_kept():
    with kept_losses("aa", TEXT) as known:
        known.update({"3": 0.5, "4": float("nan")})
    assert json.loads(losses_file("aa", TEXT).read_text()) == {"3": 0.5}


def test_another_source_text_shape_or_fit_has_losses_of_its_own():
    with kept_losses("aa", TEXT) as known:
        known[""] = 1.0
    for source, text, way in (("ab", TEXT, ""), ("aa", TEXT + 1, ""), ("aa", TEXT.view(4, 3), ""), ("aa", TEXT, "a")):
        with kept_losses(source, text, way) as known:
            assert known == {}


@pytest.mark.parametrize("content", ["{", "[1]", '{"2": "x"}', '{"2": NaN}', '{"2": true}', ""])
def test_a_damaged_file_is_made_anew(content):
    path = losses_file("aa", TEXT)
    path.parent.mkdir(parents=True)
    path.write_text(content)
    with kept_losses("aa", TEXT) as known:
        assert known == {}
        known["1"] = 2.0
    assert json.loads(path.read_text()) == {"1": 2.0}
