"""Phase 1: a dense GPT-2 of the recipe's shape, with random weights."""

from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerBase

from momify.recipe_blocks import Scratch


def dense_gpt2(scratch: Scratch, tokenizer: PreTrainedTokenizerBase) -> GPT2LMHeadModel:
    """An untrained GPT-2 whose vocabulary is the tokenizer's; weights as GPT-2 draws them, from torch's seed."""
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=scratch.context,
        n_embd=scratch.width,
        n_layer=scratch.layers,
        n_head=scratch.heads,
        resid_pdrop=scratch.dropout,
        embd_pdrop=scratch.dropout,
        attn_pdrop=scratch.dropout,
        bos_token_id=tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return GPT2LMHeadModel(config)
