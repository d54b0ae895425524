"""demo/corpus.py: the same text for everyone, nothing of this machine in it."""

import re
import sysconfig

from momify.demo.corpus import Document, documents


def test_corpus_is_large_sorted_and_split() -> None:
    found = documents()
    names = [document.name for document in found]
    assert names == sorted(names)
    assert len(set(names)) == len(names)
    size = sum(len(d.text) for d in found)
    held = sum(len(d.text) for d in found if d.held_out)
    assert size > 4_000_000
    assert 0.02 < held / size < 0.15
    assert {"lib/argparse.py", "topics/if", "docstrings/math"} <= set(names)


def test_split_is_fixed_by_name() -> None:
    held = {d.name for d in documents() if d.held_out}
    assert {"lib/functools.py", "lib/string.py", "topics/break"} <= held
    assert not held & {"lib/argparse.py", "lib/heapq.py"}
    assert Document("lib/functools.py", "other text").held_out


def test_nothing_of_this_machine_is_in_it() -> None:
    prefix = sysconfig.get_config_var("prefix")
    for document in documents():
        if document.name.startswith("docstrings/"):
            assert not re.search(r" at 0x[0-9a-f]{8,}>", document.text), document.name
        assert prefix == "/usr" or f"{prefix}/" not in document.text, document.name
