"""Fine-tuned models that the user asked to keep."""

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from momify.files import whole_folder


def keep_head(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write a fine-tuned model with its tokenizer, whole or not at all; from_pretrained of its class reads it."""
    with whole_folder(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
