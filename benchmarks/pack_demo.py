"""Put a pretrained demo model into the package: half precision, tokenizer, and a card with measured numbers.

    momify train recipes/demo-pretrain.yaml && python benchmarks/pack_demo.py runs/demo-pretrain

The numbers on the card are measured on the file that is written, with all held-out text of this Python.
"""

import json
import platform
import sys
from pathlib import Path

import torch
from transformers import GPT2LMHeadModel

import momify.demo
from momify.data.blocks import load_tokens
from momify.data.tokenizer import load_tokenizer
from momify.evaluate.byte_lengths import byte_lengths
from momify.evaluate.perplexity import Perplexity, Protocol, perplexity
from momify.files import whole_folder, write_text
from momify.models import load_model
from momify.runs import Run
from momify.train.tokens import tokens_seen

LARGEST = 8 << 20  # bytes of the whole folder

CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
license: apache-2.0
tags: [gpt2, momify]
---
# momify's demo model

A GPT-2 of {layers} layers, width {width}, {heads} heads, {positions} positions and {parameters:,} parameters, with a
byte-level BPE of {vocabulary:,} entries of its own; half precision. Made to be compressed by `momify demo` and in tests, not
to be used.

**Trained on** the text that lies on every machine with Python, as found in CPython {python}: the standard library's source
(without tests and tables), its documentation topics, and the docstrings of its compiled modules; {train_tokens:,} tokens,
seen {epochs:.1f} times: {steps:,} steps, {seen:,} tokens in all. Documents whose name hashes to 0
modulo 20 were held out. The text is the Python Software Foundation's (PSF License); the model may repeat parts of it.

**Held-out**: perplexity {perplexity:.2f}, {loss:.4f} nats per token, {bits:.4f} bits per byte ({protocol}).

Made by

    momify train recipes/demo-pretrain.yaml && python benchmarks/pack_demo.py runs/demo-pretrain

The curve of that run is in `docs/log.md`.
"""  # noqa: E501


def pack(run: Path) -> Perplexity:
    """Write momify/demo/checkpoint from a run of phase 1; the held-out perplexity of what was written."""
    tokenizer = load_tokenizer(run / "source")
    model = GPT2LMHeadModel.from_pretrained(run / "source", dtype=torch.float16)
    target = Path(momify.demo.__file__).parent / "checkpoint"
    with whole_folder(target) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        found = card_for(folder, Run(run))
        size = sum(path.stat().st_size for path in folder.iterdir())
        if size > LARGEST:
            raise SystemExit(f"{size:,} bytes are more than {LARGEST:,}")
    print(f"{target}: {size:,} bytes, perplexity {found.perplexity:.3f}, {found.bits_per_byte:.4f} bits per byte")
    return found


def card_for(folder: Path, run: Run) -> Perplexity:
    """Measure the model in `folder`, of phase 1 of `run`, and write its card beside it."""
    tokenizer, recipe = load_tokenizer(folder), run.recipe
    data = load_tokens(recipe.data, tokenizer)
    tokens = data.valid_tensor()
    model = load_model(folder)
    found = perplexity(model, tokens, Protocol(data.block_length, data.block_length), byte_lengths(tokenizer)[tokens])
    config, settings = json.loads((folder / "config.json").read_text()), recipe.source.scratch.train or recipe.train
    seen = tokens_seen(run.pretraining / "checkpoints", data, settings)
    card = CARD.format(
        layers=config["n_layer"], width=config["n_embd"], heads=config["n_head"], positions=config["n_positions"],
        parameters=model.num_parameters(), vocabulary=config["vocab_size"], python=platform.python_version(),
        train_tokens=len(data.train), steps=settings.steps, seen=seen,
        epochs=seen / len(data.train), perplexity=found.perplexity, loss=found.loss,
        bits=found.bits_per_byte, protocol=found.protocol,
    )  # fmt: skip
    write_text(folder / "README.md", card)
    return found


if __name__ == "__main__":
    pack(Path(sys.argv[1]))
