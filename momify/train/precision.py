"""Which precision a training takes on this machine: bfloat16 only pays where it is computed, not imitated."""

from typing import Literal

import torch

from momify.devices import best_device
from momify.recipe_blocks import TrainBlock


def computes_bf16(device: str) -> bool:
    """Whether a device type (`cpu`, `cuda` ...) multiplies bfloat16 matrices at float32's speed or better.

    A processor without AVX-512 (or Arm's BF16) imitates it value by value, at a tenth of float32's speed.
    """
    if device == "cpu":
        supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
        return supported is not None and bool(supported())
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    supported = getattr(getattr(torch, device, None), "is_bf16_supported", None)  # xpu and others have one, mps none
    return supported is not None and bool(supported())


def precision_here(settings: TrainBlock) -> Literal["fp32", "bf16"]:
    """`train.precision` decided: as it says, else bf16 where this machine computes it."""
    return settings.precision or ("bf16" if computes_bf16(best_device().type) else "fp32")
