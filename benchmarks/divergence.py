"""How far trained models are from their sources on held-out text, in nats: the mean of KL(source || model) per token.

A ratio of perplexities also pays a model for what its source has wrong: an overfitted source is easily beaten on text
that it has not seen. The divergence is 0 for the source itself and for nothing else. Takes run folders, whose recipes
name source and text; float32, block = stride = data.block_length.

    python benchmarks/divergence.py runs/recovery/cosine-0.025-seed0 runs/recovery/frozen-0.025-seed0
"""

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from momify.data.blocks import load_tokens
from momify.data.tokenizer import load_tokenizer
from momify.models import load_model, locate
from momify.recipe import Recipe, load_recipe
from momify.train.losses import distillation_loss, next_token_loss

_BATCH = 16


@torch.inference_mode()
def apart(model: PreTrainedModel, source: PreTrainedModel, blocks: Tensor) -> tuple[float, float]:
    """Divergence of a model from its source in nats, and its perplexity over the source's, on blocks (S, T)."""
    divergence = excess = 0.0
    for batch in blocks.split(_BATCH):
        ours, theirs = model(batch).logits, source(batch).logits
        divergence += float(distillation_loss(ours, theirs)) * len(batch)
        excess += float(next_token_loss(ours, batch) - next_token_loss(theirs, batch)) * len(batch)
    return divergence / len(blocks), math.exp(excess / len(blocks))


def held_out(recipe: Recipe, tokens: int) -> Tensor:
    """The first `tokens` held-out tokens of a run, (S, T) int64."""
    length = recipe.data.block_length
    text = load_tokens(recipe.data, load_tokenizer(locate(recipe.source.model))).valid_tensor(tokens)
    return text[: len(text) // length * length].view(-1, length)


def main() -> None:
    """Print a line for each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--tokens", type=int, default=65_536, help="held-out tokens, at most")
    given = parser.parse_args()
    print("| run | divergence, nats | perplexity over the source's |\n|---|---:|---:|")
    for folder in given.runs:
        recipe = load_recipe(folder / "recipe.yaml")
        if recipe.source.model is None:
            parser.error(f"{folder}: its recipe names no source.model to compare with")
        model, source = (load_model(one) for one in (folder / "model", locate(recipe.source.model)))
        divergence, ratio = apart(model, source, held_out(recipe, given.tokens))
        print(f"| {folder.name} | {divergence:.4f} | {ratio:.4f} |", flush=True)


if __name__ == "__main__":
    main()
