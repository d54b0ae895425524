"""Where tensors are worked on: the accelerator of this machine, or its processor."""

import torch


def best_device() -> torch.device:
    """The accelerator if there is one, else the CPU."""
    found = torch.accelerator.current_accelerator(check_available=True) if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


def device_for(needed: int) -> torch.device:
    """The GPU if it computes in float64 and `needed` bytes of its memory are free, else the CPU.

    Apple's has no float64, which fits in closed form are made in.
    """
    if best_device().type == "cuda" and torch.cuda.mem_get_info()[0] >= needed:
        return best_device()
    return torch.device("cpu")
