"""Losses of a source with half-layers left out, kept on disk: another --mha or --ffn measures only what is new."""

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from momify.data.cache import cache_folder
from momify.errors import MomifyError
from momify.files import read_json, write_json


@contextmanager
def kept_losses(source_sha256: str, tokens: Tensor, way: str = "") -> Iterator[dict[str, float]]:
    """Known losses in nats by `importance.set_key`; what was added is written when the block ends, however it ends.

    They hold for one source, one calibration text and one `way` of fitting what is left ("": none), spelled out: the
    file's name is the hash of them. A file that cannot be read is made anew.
    """
    path = losses_file(source_sha256, tokens, way)
    known = _read(path)
    before = len(known)
    try:
        yield known
    finally:
        if len(known) > before:
            write_json(path, {key: loss for key, loss in known.items() if _is_loss(loss)})


def losses_file(source_sha256: str, tokens: Tensor, way: str = "") -> Path:
    """Where the losses of a source on `tokens` (S, T) are kept."""
    content = hashlib.sha256(f"{source_sha256}{way}".encode())
    content.update(str(tuple(tokens.shape)).encode())
    content.update(tokens.contiguous().cpu().numpy().tobytes())
    return cache_folder() / "losses" / f"{content.hexdigest()[:32]}.json"


def _read(path: Path) -> dict[str, float]:
    try:
        known = read_json(path) if path.exists() else {}
    except MomifyError:
        return {}
    good = isinstance(known, dict) and all(_is_loss(value) for value in known.values())
    return dict(known) if good else {}


def _is_loss(value: Any) -> bool:
    return isinstance(value, float) and math.isfinite(value)
