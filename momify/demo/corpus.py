"""The demo's text: what lies on every machine with Python (topics, docstrings, library source)."""

import hashlib
import importlib
import inspect
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Not on every machine (tests, GUI editors, packages removed from later Pythons), or tables rather than text.
_LEFT_OUT = {
    "test", "tests", "site-packages", "dist-packages", "idlelib", "idle_test", "lib2to3", "distutils", "encodings",
    "pydoc_data", "turtledemo", "ensurepip", "__pycache__", "__phello__", "msilib",
}  # fmt: skip
# Without sys: what it holds depends on the process (hooks, streams).
_COMPILED = (
    "array", "binascii", "builtins", "cmath", "errno", "gc", "itertools", "marshal", "math", "select", "time",
    "unicodedata", "zlib", "_bisect", "_codecs", "_collections", "_csv", "_datetime", "_functools", "_heapq", "_io",
    "_json", "_operator", "_pickle", "_random", "_socket", "_sre", "_struct", "_thread", "_weakref",
)  # fmt: skip
HELD_OUT_SHARE = 20  # one name in so many


@dataclass(frozen=True)
class Document:
    """One piece of text with the name that decides whether it is held out."""

    name: str
    text: str

    @property
    def held_out(self) -> bool:
        """Whether this document is for measuring only: by a hash of its name, so every machine agrees."""
        return int(hashlib.sha256(self.name.encode()).hexdigest()[:8], 16) % HELD_OUT_SHARE == 0


def documents() -> list[Document]:
    """The demo corpus of the running Python, sorted by name; nothing is downloaded."""
    found = [*_topics(), *_docstrings(), *_sources()]
    return sorted(found, key=lambda document: document.name)


def _topics() -> Iterator[Document]:
    topics = importlib.import_module("pydoc_data.topics").topics
    for name, text in topics.items():
        yield Document(f"topics/{name}", text)


def _docstrings() -> Iterator[Document]:
    """Docstrings of the compiled modules; those of the others stand in their source."""
    for name in _COMPILED:
        try:
            module = importlib.import_module(name)
        except ImportError:  # a Python built without it
            continue
        members = [(key, getattr(module, key)) for key in sorted(vars(module))]
        described = [_described(key, value) for key, value in members if callable(value)]
        yield Document(f"docstrings/{name}", "\n\n".join([inspect.getdoc(module) or name, *filter(None, described)]))


def _described(name: str, value: object) -> str:
    """`name(signature)`, then the docstring and, for a class, those of its public methods."""
    parts = [f"{name}{_signature(value)}\n{inspect.getdoc(value) or ''}".rstrip()]
    if inspect.isclass(value):
        for key in sorted(vars(value)):
            if not key.startswith("_") and (text := inspect.getdoc(getattr(value, key, None))):
                parts.append(f"{name}.{key}{_signature(getattr(value, key))}\n{text}")
    return "\n\n".join(parts)


def _signature(value: object) -> str:
    try:
        return str(inspect.signature(value))  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return ""


def _sources() -> Iterator[Document]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if _LEFT_OUT.isdisjoint(relative.parts) and not relative.parts[0].startswith(("_sysconfigdata", "config-")):
            try:
                yield Document(f"lib/{relative.as_posix()}", path.read_text(encoding="utf-8"))
            except (UnicodeDecodeError, OSError):
                continue
