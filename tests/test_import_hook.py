"""The post-import hook, on packages written for the test; transformers itself is in test_package.py."""

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from momify.import_hook import when_imported

FILES = {
    "hooked_first/__init__.py": "ready = False\nfrom hooked_first import inner\nready = True\n",
    "hooked_first/inner.py": "value = 3\n",
    "hooked_first/broken.py": "raise RuntimeError('broken by itself')\n",
    "hooked_other.py": "value = 5\n",
}


@pytest.fixture(autouse=True)
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("hooked_")]:
        del sys.modules[name]


def test_called_once_after_the_import_with_the_module() -> None:
    seen: list[tuple[str, bool]] = []
    when_imported(["hooked_first", "hooked_first.inner"], lambda m: seen.append((m.__name__, hasattr(m, "value"))))
    assert not seen
    import hooked_first

    assert hooked_first.ready
    assert seen == [("hooked_first.inner", True), ("hooked_first", False)]  # the inner one ends first
    importlib.import_module("hooked_first")
    importlib.import_module("hooked_other")
    assert len(seen) == 2


def test_the_whole_module_has_run_before() -> None:
    ready: list[bool] = []
    when_imported(["hooked_first"], lambda m: ready.append(m.ready))
    importlib.import_module("hooked_first")
    assert ready == [True]


def test_called_at_once_where_it_is_imported_already() -> None:
    module = importlib.import_module("hooked_other")
    seen: list[ModuleType] = []
    when_imported(["hooked_other", "hooked_first"], seen.append)
    assert seen == [module]


def test_two_hooks_on_one_module() -> None:
    seen: list[int] = []
    when_imported(["hooked_other"], lambda _: seen.append(1))
    when_imported(["hooked_other"], lambda _: seen.append(2))
    importlib.import_module("hooked_other")
    assert sorted(seen) == [1, 2]


def test_the_module_looks_as_if_nobody_had_been_here(packages: Path) -> None:
    plain = importlib.import_module("hooked_other")
    kinds = type(plain.__loader__), type(plain.__spec__.loader)
    del sys.modules["hooked_other"]
    when_imported(["hooked_other"], lambda _: None)
    hooked = importlib.import_module("hooked_other")
    assert (type(hooked.__loader__), type(hooked.__spec__.loader)) == kinds
    assert inspect.getsource(hooked) == FILES["hooked_other.py"]
    assert importlib.reload(hooked) is hooked
    assert hooked.__file__ == str(packages / "hooked_other.py")


def test_who_looks_before_the_import_finds_the_source() -> None:
    when_imported(["hooked_other"], lambda _: None)
    spec = importlib.util.find_spec("hooked_other")
    assert spec is not None
    assert spec.loader.get_source("hooked_other") == FILES["hooked_other.py"]  # type: ignore[union-attr]
    assert "hooked_other" not in sys.modules


def test_what_is_not_there_is_not_found_and_what_breaks_breaks_as_ever() -> None:
    seen: list[ModuleType] = []
    when_imported(["hooked_first.nowhere", "hooked_first.broken"], seen.append)
    with pytest.raises(ModuleNotFoundError, match=r"hooked_first\.nowhere"):
        importlib.import_module("hooked_first.nowhere")
    with pytest.raises(RuntimeError, match="broken by itself"):
        importlib.import_module("hooked_first.broken")
    assert not seen


def test_an_error_of_the_hook_ends_the_import() -> None:
    def fail(module: ModuleType) -> None:
        raise ValueError(module.__name__)

    when_imported(["hooked_other"], fail)
    with pytest.raises(ValueError, match="hooked_other"):
        importlib.import_module("hooked_other")
    assert "hooked_other" not in sys.modules
