"""Bytes of tensors alive, operator by operator: what a forward pass needs at its peak, without an allocator to ask.

The process's own size (RSS) says little: it holds libraries, freed pages and files. Counted here are the storages that
operators return, from the moment they appear until the last tensor on them is gone. Scratch space inside an operator
is not seen. Works on the CPU and, without computing anything, on the meta device.
"""

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensor storages alive while the block runs: `now`, and `peak`, the most there ever was.

    `known`: all tensors that are alive before (weights, inputs, a cache), counted from the start and until they are
    freed; one that is left out would be taken for new as soon as an operator looks at it.
    A storage counts once, however many tensors look at it.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, weakref.ref] = {}
        for tensor in known:
            self._add(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._add(leaf)
        return out

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._alive:
            return
        size = storage.nbytes()

        def gone(_: weakref.ref) -> None:
            self.now -= size
            del self._alive[key]

        self._alive[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)
