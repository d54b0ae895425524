"""Fine-tuned models that the user asked to keep, each with a note of which score is its own."""

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from momify.evaluate.results import Key
from momify.files import read_json, whole_folder, write_json

_NOTE = "momify_score.json"


def keep_head(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write a fine-tuned model with its tokenizer, whole or not at all; from_pretrained of its class reads it."""
    with whole_folder(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        write_json(temporary / _NOTE, {"key": None})  # killed before its score is kept, it is no score's own


def note_score(folder: Path, key: Key) -> None:
    """Note beside a kept model, where the task kept one, under which key it was scored."""
    if folder.is_dir():
        write_json(folder / _NOTE, {"key": key})


def is_kept(folder: Path, key: Key) -> bool:
    """Whether the model that was scored under `key` lies there; one without a note counts, as none were noted once."""
    if not (folder / "config.json").is_file():
        return False
    note = folder / _NOTE
    return not note.exists() or read_json(note) == {"key": key}
