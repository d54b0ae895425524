"""Where tensors are worked on: the accelerator of this machine, or its processor."""

import gc

import torch


def best_device() -> torch.device:
    """The accelerator if there is one, else the CPU."""
    found = torch.accelerator.current_accelerator(check_available=True) if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


def device_for(needed: int) -> torch.device:
    """The GPU if it computes in float64 and `needed` bytes of its memory are free, else the CPU.

    Apple's has no float64, which fits in closed form are made in. What nobody uses any more is given back first: torch
    keeps the memory of a training that is over, and its Trainer, which refers to itself, the weights and the moments.
    """
    if best_device().type != "cuda":
        return torch.device("cpu")
    gc.collect()
    torch.cuda.empty_cache()
    return best_device() if torch.cuda.mem_get_info()[0] >= needed else torch.device("cpu")
