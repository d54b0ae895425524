"""Which precision a training takes on this machine: bfloat16 only pays where it is computed, not imitated."""

import torch

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


def training_device() -> str:
    """The device type that a training takes: an accelerator where there is one."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator.type if accelerator else "cpu"


def in_bf16(settings: TrainBlock, device: str) -> bool:
    """Whether a training on `device` runs in bfloat16: as train.precision says, or where the device computes it."""
    return computes_bf16(device) if settings.precision is None else settings.precision == "bf16"
