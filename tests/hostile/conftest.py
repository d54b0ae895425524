"""What every case of this folder is held to: success or one MomifyError of one line, soon, in bounded memory."""

import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from momify.errors import MomifyError

SLOWEST, LARGEST = 10.0, 600 << 10  # seconds for one case; KiB that a whole module may add to the peak


@contextmanager
def civil() -> Iterator[None]:
    """Lets the body succeed, or raise one MomifyError of one line; anything else fails the test."""
    since = time.monotonic()
    said = "everything is as it should be"
    try:
        yield
    except MomifyError as error:
        said = str(error)
    assert "\n" not in said
    assert 10 < len(said) < 1500
    assert time.monotonic() - since < SLOWEST


@pytest.fixture(scope="module", autouse=True)
def _bounded_memory() -> Iterator[None]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < LARGEST, f"the cases of this module added {grown >> 10} MiB"


@pytest.fixture(scope="session")
def case() -> Callable:
    """The rule as a context manager."""
    return civil
