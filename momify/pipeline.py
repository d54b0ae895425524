"""A run, step by step: the table of contents. Each function is one verb; its chapter is the folder of that name."""

import torch
from datasets.utils.logging import disable_progress_bar
from transformers import set_seed
from transformers.utils import logging as transformers_logging

from momify.files import whole_folder
from momify.recipe import Recipe
from momify.runs import Run
from momify.screen import Screen
from momify.train.blocks import load_tokens
from momify.train.documents import read_corpus
from momify.train.fit import Place, Stopped, fit
from momify.train.scratch import dense_gpt2
from momify.train.tokenizer import load_tokenizer, train_tokenizer


def quiet_libraries() -> None:
    """Silence the bars and advice of the libraries underneath; momify shows its own."""
    disable_progress_bar()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def pretrain(recipe: Recipe, run: Run, screen: Screen, resume: bool = False) -> Stopped | None:
    """Phase 1: train a dense GPT-2 from random weights into `run.source`."""
    scratch, settings = recipe.source.scratch, recipe.source.scratch.train or recipe.train
    corpus = read_corpus(recipe.data)
    if (run.pretraining / "tokenizer").is_dir():
        tokenizer = load_tokenizer(run.pretraining / "tokenizer")
    elif scratch.tokenizer:
        tokenizer = load_tokenizer(scratch.tokenizer)
    else:
        screen.say(f"learning a byte-level BPE of {scratch.vocabulary} entries")
        tokenizer = train_tokenizer(corpus.train["text"], scratch.vocabulary)
    with whole_folder(run.pretraining / "tokenizer") as folder:
        tokenizer.save_pretrained(folder)
    data = load_tokens(recipe.data, tokenizer, corpus)
    set_seed(recipe.run.seed)
    model = dense_gpt2(scratch, tokenizer)
    screen.say(
        f"phase 1: {model.num_parameters():,} parameters, {len(data.train):,} tokens of text ({len(data.valid):,} held out), "
        f"{settings.steps:,} steps of {settings.batch_size * data.block_length:,} tokens"
    )
    place = Place(run.pretraining, "phase 1", screen.console, recipe.run.seed, resume)
    if stopped := fit(model, None, data, settings, place):
        return stopped
    with whole_folder(run.source) as folder:
        model.to(torch.float32).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    screen.say(f"wrote {run.source}")
    return None
