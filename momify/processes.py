"""One process or several (torchrun): who is the first, waiting for the others, agreeing with them.

Outside torchrun every function here is free: nothing is waited for and torch is not imported.
"""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_PATIENCE = timedelta(days=1)  # one process may convert for hours while the others wait; a dead one is noticed at once

_HEAD_START = 10.0  # seconds; imports take processes of one machine apart


def rank() -> int:
    """Which process this is, from 0."""
    return int(os.environ.get("RANK", "0"))


def count() -> int:
    """How many processes work on this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process is the one that writes and prints."""
    return rank() == 0


def wait_for_all() -> None:
    """Return when every process has come here."""
    if count() > 1:
        import torch.distributed as dist

        _join()
        dist.barrier()


def any_of_all(flag: bool) -> bool:
    """Whether `flag` is true in at least one process; every process has to ask, and gets the same answer."""
    if count() == 1:
        return flag
    import torch
    import torch.distributed as dist

    _join()
    votes = torch.tensor([int(flag)])
    dist.all_reduce(votes, dist.ReduceOp.MAX)
    return bool(votes.item())


def sum_of_all(value: "Tensor") -> "Tensor":
    """The sum of a tensor of one shape over all processes, on the CPU; the tensor itself where there is one."""
    if count() == 1:
        return value
    import torch.distributed as dist

    _join()
    total = value.detach().to("cpu", copy=True)
    dist.all_reduce(total)
    return total


def let_first_speak() -> None:
    """Leave it to a machine's first process to tell of a mistake that is everybody's, as all are before they join.

    torchrun ends the others as soon as the first has spoken: who is left after a while has a mistake of its own.
    """
    dist = sys.modules.get("torch.distributed")
    joined = dist is not None and dist.is_available() and dist.is_initialized()
    if os.environ.get("LOCAL_RANK", "0") != "0" and not joined:
        time.sleep(_HEAD_START)


@contextmanager
def first_then_others() -> Iterator[None]:
    """Let the first process run the body alone, then the others: they find what it made."""
    if not is_first():
        wait_for_all()
    yield
    if is_first():
        wait_for_all()


def _join() -> None:
    """Start the process group, on the CPU (gloo) and beside it on the GPUs (nccl) where there are any."""
    import torch
    import torch.distributed as dist

    if dist.is_initialized():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=_PATIENCE)
