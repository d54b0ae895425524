"""How many bytes of text each token stands for: what turns a loss per token into bits per byte."""

import torch
from tokenizers import pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerBase


def byte_lengths(tokenizer: PreTrainedTokenizerBase) -> Tensor | None:
    """Bytes per token id (V,) int64 of a byte-level tokenizer, 0 for special tokens; None for another kind.

    In a byte-level vocabulary each character of a token's name stands for one byte.
    """
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    special = set(tokenizer.all_special_ids)
    lengths = torch.zeros(len(tokenizer), dtype=torch.int64)
    for name, index in tokenizer.get_vocab().items():
        if index in special:
            continue
        if not alphabet.issuperset(name):
            return None
        lengths[index] = len(name)
    return lengths
