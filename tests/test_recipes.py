"""Every shipped recipe really runs: two steps of each phase, with a tiny source and text in the place of its own.

Only sizes, texts and step counts are overridden; layers, pools, depths, K, start, losses, schedule stay as shipped.
"""

import os
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import momify
from momify.convert.stored_mom import read_mom_config
from momify.data.tokenizer import train_tokenizer
from momify.demo.corpus import documents
from momify.demo.recipe import demo_recipe
from momify.models import load_model, read_provenance
from momify.pipeline import check, train
from momify.recipe import Recipe, load_recipe
from momify.runs import Run, opened_run
from momify.screen import Screen

RECIPES = Path(__file__).parents[1] / "recipes"
BLOCK, ENTRIES, WIDTH = 16, 300, 8
LAYERS = {"small": 12, "medium": 24, "large": 36, "demo": 12}  # of each source that a recipe does not make itself
NAMES = [path.stem for path in sorted(RECIPES.glob("*.yaml"))]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer([document.text for document in documents()[:40]], ENTRIES)


@pytest.fixture
def there(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to stand in, with a text and a tokenizer."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOMIFY_CACHE", str(tmp_path / "cache"))
    tokenizer.save_pretrained("tokenizer")
    Path("text.txt").write_text("\n<|endoftext|>\n".join(document.text[:500] for document in documents()[:20]))
    return tmp_path


def tiny(name: str) -> list[str]:
    """Overrides that shrink a recipe; its source, if it takes one, becomes `source/` here."""
    shipped = load_recipe(RECIPES / f"{name}.yaml")
    short = {"steps": 2, "batch_size": 2, "save_every": 2, "eval_every": 2}
    short["micro_batch"] = "null" if shipped.train.micro_batch is None else 1
    changes = {"data.train": "text.txt", "data.valid": "null", "data.block_length": BLOCK, "data.valid_tokens": 64}
    changes |= {f"train.{key}": value for key, value in short.items()}
    if shipped.mom:
        changes |= {"mom.calibration_blocks": 1, "mom.refit_tokens": min(shipped.mom.refit_tokens, 64)}
    scratch = shipped.source.scratch
    if scratch:
        sizes = {"width": WIDTH, "heads": 2, "context": BLOCK, "vocabulary": ENTRIES}
        changes |= {f"source.scratch.{key}": value for key, value in sizes.items()}
        changes |= {f"source.scratch.train.{key}": value for key, value in short.items()} if scratch.train else {}
        changes |= {"source.scratch.tokenizer": "tokenizer"} if scratch.tokenizer else {}
    else:
        changes["source.model"] = "source"
    return [f"{key}={value}" for key, value in changes.items()]


def make_source(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """A random GPT-2 of as many layers as the recipe's own source."""
    layers = LAYERS[name.split("-")[0]]
    config = GPT2Config(vocab_size=ENTRIES, n_positions=BLOCK, n_embd=WIDTH, n_layer=layers, n_head=2)
    GPT2LMHeadModel(config).save_pretrained("source")
    tokenizer.save_pretrained("source")


def run_tiny(name: str, tokenizer: PreTrainedTokenizerFast) -> tuple[Recipe, Run]:
    """The recipe, shrunk and trained."""
    recipe = load_recipe(RECIPES / f"{name}.yaml", tiny(name))
    if recipe.source.model:
        make_source(name, tokenizer)
    screen = Screen(Console(quiet=True), quiet=True)
    check(recipe, screen)
    with opened_run(recipe, resume=False) as run:
        assert train(recipe, run, screen) is None
    return recipe, run


LARGER = {"large", "medium-e", "medium-p", "large-e", "large-p"}  # as medium, small-e and small-p, with more layers


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in LARGER else n for n in NAMES])
def test_recipe_trains_for_two_steps(name: str, there: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    recipe, run = run_tiny(name, tokenizer)
    if recipe.source.scratch:
        layer = load_model(run.source).transformer.h[recipe.source.scratch.layers - 1]
        untouched = layer.ln_1.weight.eq(1).all() and layer.mlp.c_fc.bias.eq(0).all()  # as GPT-2 is drawn
        assert untouched != recipe.source.scratch.pretrain
    pretrained = recipe.source.scratch is not None and recipe.source.scratch.pretrain
    assert (run.pretraining / "metrics.jsonl").exists() == pretrained
    if recipe.mom is None:
        return
    config, layers = read_mom_config(run.model), load_model(run.source if recipe.source.scratch else Path("source"))
    depth = recipe.mom.depth or layers.config.n_layer
    assert (config.num_mha_modules, config.num_ffn_modules) == (recipe.mom.mha, recipe.mom.ffn)
    assert (config.num_steps, config.modules_per_token) == (depth, recipe.mom.modules_per_token)
    if recipe.mom.mha_steps:
        assert len(config.running("mha")) == recipe.mom.mha_steps
    assert read_provenance(run.model)["trained"]["steps"] == 2
    logits = load_model(run.model)(torch.zeros(1, BLOCK, dtype=torch.int64)).logits
    assert logits.isfinite().all()


def test_paper_settings_of_the_three_sizes() -> None:
    """The issue's list, on each file that trains on OpenWebText."""
    found = [path for path in RECIPES.glob("*.yaml") if "openwebtext" in path.read_text()]
    assert {path.stem.split("-")[0] for path in found} == {"small", "medium", "large"}
    for path in found:
        recipe = load_recipe(path)
        assert (recipe.data.valid_tokens, recipe.data.block_length) == (4_000_000, 1024), path
        for block in filter(None, (recipe.train, recipe.source.scratch and recipe.source.scratch.train)):
            assert (block.batch_size, block.learning_rate, block.warmup) == (64, 1e-3, 0.1), path
            assert (block.optimizer, block.schedule) == ("adamw", "cosine"), path  # momify's own are unmeasured there
            assert (block.dropout, block.precision) == (0, "bf16"), path
        if recipe.source.model:  # made by the recipe of that size
            assert os.path.normpath(recipe.source.model) == f"runs/{path.stem.split('-')[0]}/source"


@pytest.mark.parametrize("name", ["demo", "demo-pretrain", "wikipedia-pretrain"])
def test_what_a_laptop_runs_leaves_precision_to_the_machine(name: str) -> None:
    assert load_recipe(RECIPES / f"{name}.yaml").train.precision is None
    assert demo_recipe().train.precision is None


def test_the_shipped_demo_recipe_is_that_of_the_command() -> None:
    """One file: the one beside the others is a link."""
    assert (RECIPES / "demo.yaml").samefile(Path(momify.__file__).parent / "demo" / "demo.yaml")
