"""A post-import hook: do something once a module of another package has been imported, without importing it.

`wrapt.when_imported` does the same and imports asyncio and more on its way, a fifth of what `momify --help` takes.
"""

import sys
from collections.abc import Callable, Iterable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # importlib.abc would load a dozen modules, and the import system asks for the methods alone
    from importlib.abc import Loader


def when_imported(names: Iterable[str], after: Callable[[ModuleType], Any]) -> None:
    """Call `after(module)` for each of these modules: now for those imported already, else at the end of their import.

    An error that `after` raises ends that import, as one in the module itself would.
    """
    names = frozenset(names)
    sys.meta_path.insert(0, _Finder(names, after))
    for name in names & sys.modules.keys():
        after(sys.modules[name])


class _Finder:
    """Finds what the other finders find, and for the named modules puts a loader around theirs."""

    def __init__(self, names: frozenset[str], after: Callable[[ModuleType], Any]) -> None:
        self.names = names
        self.after = after

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in self.names:
            return None
        for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]:
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader, self.after)
                return spec
        return None


class _Loader:
    """Loads as the loader inside does, and then calls `after`."""

    def __init__(self, loader: "Loader", after: Callable[[ModuleType], Any]) -> None:
        self.loader = loader
        self.after = after

    def __getattr__(self, name: str) -> Any:
        """What only the loader inside knows, such as the source: whoever asks the spec for it before the import."""
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__.loader = module.__loader__ = self.loader  # the module looks as if nobody had been here
        self.loader.exec_module(module)
        self.after(module)
