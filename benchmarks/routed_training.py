"""Recovery of models of equal MACs, static and routed, from one source on the same batches: `routing.py --train`."""

import argparse
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from momify.conversion import convert
from momify.convert.source import read_config
from momify.convert.walk import Fork, halves, walk
from momify.data.blocks import load_tokens
from momify.data.tokenizer import load_tokenizer
from momify.evaluate.results import read_results
from momify.files import read_json, write_json
from momify.measure.budget import budget_of, spend
from momify.measure.cost import dense_macs, kv_bytes_per_token, mom_macs, parameters
from momify.measure.routing import realised
from momify.model import MomForCausalLM
from momify.model.layout import HalfStep
from momify.model.router import router_logits
from momify.models import load_mom, locate, read_provenance
from momify.pipeline import EvalOptions, evaluate_ppl, train
from momify.recipe import Recipe, make_recipe
from momify.runs import Run, opened_run
from momify.screen import Screen
from momify.subject import Subject

SETTLE_BLOCKS = 64
MIXED_TAU = 0.2  # as the paper: near a choice of one


def trained_rows(layers: int) -> dict[str, tuple[str, dict[str, Any]]]:
    """Models of about three quarters of a source's MACs: three quarters of its attention, the rest as each row says."""
    kept = {"mha": layers * 3 // 4, "patch_rank": 16, "importance": "greedy", "refit_ridge": 1e-3}
    saved = 2 * layers * 3 / 4  # half-layers' worth of MACs
    budget = round(saved / (kept["mha"] + layers), 3)
    routed = {**kept, "ffn": layers, "budget": budget}
    return {
        "static": ("half-layers left out for good, patched", {"mom": {**kept, "ffn": layers * 3 // 4}}),
        "supervised": (
            "feed-forward routed, routers fitted and supervised",
            {"mom": routed, "train": {"supervise": 0.1}},
        ),
        "fitted": ("feed-forward routed, routers fitted and frozen", {"mom": routed}),
        "mixed": ("feed-forward routed, K = 2 while training: home and patch mixed by the gates", {"mom": routed}),
    }


def train_table(given: argparse.Namespace) -> None:
    """Print what each row recovers, row by row as it comes; a finished run is read, not trained again."""
    print("| | parameters | MACs | KV | before | after | source |\n|---|---:|---:|---:|---:|---:|---:|", flush=True)
    dense = read_config(locate(given.source))
    for name, (title, changes) in trained_rows(dense.n_layer).items():
        if name not in given.rows.split(","):
            continue
        values = {
            "run": {"name": name, "seed": given.seed, "dir": str(given.out / f"{name}-{given.train}-{given.seed}")},
            "source": {"model": given.source},
            "mom": {"refit_tokens": 32_768, **changes["mom"]},
            "data": {"train": given.data, "valid": given.valid, "block_length": given.block},
            "train": {"steps": given.train, "batch_size": 4, "optimizer": "muon", "learning_rate": 1e-3, "hidden": 0.0,
                      "splice": 1, "schedule": "cosine", "warmup": 0.1, "matrix_rate": 1.0, "embedding_rate": 1.0,
                      "save_every": given.train, "keep": 1, **changes.get("train", {})},
            "eval": {"limit": given.windows},
        }  # fmt: skip
        recipe, screen = make_recipe(values, name), Screen(Console(stderr=True), quiet=True)
        with opened_run(recipe, resume=(recipe.folder / "recipe.yaml").is_file()) as run:
            if name == "mixed":
                train_mixed(recipe, run, screen)
            else:
                train_or_stop(recipe, run, screen)
            evaluate_ppl(Subject(name, run.model, "mom", run, recipe), EvalOptions(limit=given.windows), screen)
        kept = {
            entry.role: entry.score.metrics["perplexity"] for entry in read_results(run.folder / "eval" / "ppl.json")
        }
        model = load_mom(run.model)
        costs = [
            parameters(model.config).total / parameters(dense).total,
            spent_macs(model, given, recipe) / dense_macs(dense, 1, given.block).total,
            kv_bytes_per_token(model.config) / kv_bytes_per_token(dense),
        ]
        ratios = [kept["start"] / kept["source"], kept["mom"] / kept["source"]]
        cells = [f"{one:.3f}" for one in (*costs, *ratios)] + [f"{kept['source']:.2f}"]
        print(f"| {title} (`{name}`) | " + " | ".join(cells) + " |", flush=True)


def train_or_stop(recipe: Recipe, run: Run, screen: Screen) -> None:
    """Train, or end the script where a signal ended the training: there is nothing to tell of it yet."""
    if train(recipe, run, screen, resume=True):
        raise SystemExit(f"stopped at {recipe.run.name}; start again to go on")


def train_mixed(recipe: Recipe, run: Run, screen: Screen) -> None:
    """Train with both choices of a half-step mixed by their gates; then each token takes the larger of the two.

    The threshold is then set on training text so that the budget is spent.
    """
    if not (run.model / "config.json").is_file():
        convert(recipe, run, screen)
    if not read_provenance(run.model)["trained"]["steps"]:
        set_choosing(run.model, modules_per_token=2, router_tau=MIXED_TAU)
        train_or_stop(recipe, run, screen)
    set_choosing(run.model, modules_per_token=1)
    model = load_mom(run.model)
    text = load_tokens(recipe.data, load_tokenizer(run.model)).spread_blocks(SETTLE_BLOCKS)
    set_choosing(run.model, router_threshold=threshold_for(model, text, recipe.mom.budget))


@torch.inference_mode()
def threshold_for(model: MomForCausalLM, text: Tensor, share: float) -> float:
    """The threshold at which the forks of `model` spend that share of the reachable MACs on text (S, T)."""
    budget = budget_of(model.config, text.shape[1])
    savings = [budget.savings[half.kind] for half in halves(model) if half.forks]
    threshold = model.config.router_threshold
    for _ in range(4):  # who skips changes what is before the next half-step
        threshold = spend(scores_below(model, text, threshold), savings, budget.full - share)
    return threshold


def scores_below(model: MomForCausalLM, text: Tensor, threshold: float) -> list[Tensor]:
    """What running is worth to each token by its router, (n,) for each fork, where those below the threshold skip."""
    scores: list[Tensor] = []

    def judge(half: HalfStep, forks: list[Fork]) -> list[Tensor]:
        router = (model.model.mha_router if half.kind == "mha" else model.model.ffn_router)()[half.route]
        logits = [router_logits(fork.x_hat, router) for fork in forks]
        worth = [one[:, half.home] - one[:, half.skip] for one in logits]
        scores.append(torch.cat(worth))
        return [one < threshold for one in worth]

    walk(model, text, judge)
    return scores


def set_choosing(folder: Path, **fields: float) -> None:
    """Change how tokens choose, in a model's config."""
    write_json(folder / "config.json", read_json(folder / "config.json") | fields)


@torch.inference_mode()
def spent_macs(model: MomForCausalLM, given: argparse.Namespace, recipe: Recipe) -> float:
    """MACs of a block as it was routed, mean over 64 held-out blocks."""
    tokens = load_tokens(recipe.data, load_tokenizer(locate(given.source))).valid_tensor(64 * given.block)
    blocks, total = tokens[: len(tokens) // given.block * given.block].view(-1, given.block), 0.0
    for block in blocks.split(4):
        routing = model(input_ids=block, output_router_logits=True, use_cache=False).routing
        total += mom_macs(model.config, len(block), given.block, realised(routing, block.numel())).total
    return total / len(blocks)
