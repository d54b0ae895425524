"""What every export has in common: where it may be written, what it carries along, and what momify.json says of it."""

import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from momify.convert.weight_files import inside, read_json
from momify.errors import MomifyError

TEXTS = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt",
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
)  # fmt: skip
PROVENANCE = "momify.json"
Json = dict[str, Any]


def check_target(model_folder: Path, target: Path) -> None:
    """Raise MomifyError where writing to `target` would destroy something that is not an earlier export."""
    if not target.exists():
        return
    if not target.is_dir():
        raise MomifyError(f"export target {target} is a file; name a new folder")
    if target.resolve() == model_folder.resolve():
        raise MomifyError(f"export target {target} is the model folder itself; name another folder")
    if any(target.iterdir()) and not _is_export(target):
        raise MomifyError(f"export target {target} holds something else than an earlier export; name a new folder")


def _is_export(folder: Path) -> bool:
    """Whether an export wrote `folder`: its momify.json says so."""
    try:
        return "export" in json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, TypeError):
        return False


def companions(folder: Path, names: tuple[str, ...] = TEXTS) -> list[Path]:
    """Tokenizer and generation settings of a model, as far as they are there."""
    return [path for path in (inside(folder, name) for name in names) if path.is_file()]


def provenance(folder: Path, form: str) -> Json:
    """momify.json of the model in `folder`, with the word that this is an export of it in the format `form`."""
    path = folder / PROVENANCE
    known = read_json(path) if path.is_file() else {}
    try:
        momify = version("momify")
    except PackageNotFoundError:
        momify = "unknown"  # run from a source tree
    return {**known, "export": {"format": form, "momify": momify}}
