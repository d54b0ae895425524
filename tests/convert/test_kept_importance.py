"""convert/kept_importance.py: measured once for a source, texts and a way of measuring; made anew if unreadable."""

import pytest
import torch

from momify.convert.importance import Importance, Removal
from momify.convert.kept_importance import importance_file, kept_importance

TEXT = torch.arange(12).view(3, 4)
FOUND = Importance("layerdrop", 2, 9, 1.5, (0.1, 0.2), (0.3, 0.4), (Removal("mha", 0, 0.1, 1.6),), 7)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MOMIFY_CACHE", str(tmp_path / "cache"))


def unwanted() -> Importance:
    raise AssertionError("measured again")


def test_what_was_measured_is_read_the_next_time():
    path = importance_file("aa", (TEXT,), "way")
    assert kept_importance(path, lambda: FOUND) == FOUND
    assert kept_importance(path, unwanted) == FOUND


def test_another_source_text_order_or_way_has_one_of_its_own():
    more = TEXT + 1
    files = {
        importance_file("aa", (TEXT, more), "way"),
        importance_file("aa", (more, TEXT), "way"),
        importance_file("aa", (TEXT, TEXT), "way"),
        importance_file("aa", (TEXT.view(4, 3), more), "way"),
        importance_file("ab", (TEXT, more), "way"),
        importance_file("aa", (TEXT, more), "another"),
    }
    assert len(files) == 6


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"method": "greedy"}', '{"removals": 3}'])
def test_what_cannot_be_read_is_measured_anew(content):
    path = importance_file("aa", (TEXT,), "way")
    path.parent.mkdir(parents=True)
    path.write_text(content)
    assert kept_importance(path, lambda: FOUND) == FOUND
    assert kept_importance(path, unwanted) == FOUND
