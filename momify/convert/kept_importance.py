"""An importance that took a training to measure, kept on disk: converting again with the same pool reads it."""

import hashlib
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from momify.convert.importance import Importance
from momify.data.cache import cache_folder
from momify.errors import MomifyError
from momify.files import read_json, write_json


def importance_file(source_sha256: str, texts: tuple[Tensor, ...], way: str) -> Path:
    """Where the importance of a source on `texts` (S, T) int64 each, measured in the `way` spelled out, is kept."""
    content = hashlib.sha256(f"{source_sha256} {way}".encode())
    for tokens in texts:
        content.update(str(tuple(tokens.shape)).encode())
        content.update(tokens.contiguous().cpu().numpy().tobytes())
    return cache_folder() / "importance" / f"{content.hexdigest()[:32]}.json"


def kept_importance(path: Path, measure: Callable[[], Importance]) -> Importance:
    """What is kept at `path`; measured and kept where nothing is, or nothing that can be read."""
    found = _read(path)
    if found is None:
        found = measure()
        write_json(path, found.to_dict())
    return found


def _read(path: Path) -> Importance | None:
    try:
        return Importance.from_dict(read_json(path)) if path.exists() else None
    except (MomifyError, TypeError, KeyError, AttributeError):
        return None
