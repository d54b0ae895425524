"""How much of the source's quality each way of compressing gets back: the table of docs/results.md, row by row.

Every row has the same pool sizes, text, data order, schedule and number of tokens; only what the row names differs.
Ratios are held-out perplexity over the source's, block = stride, float32. Each cell is a run of its own under --out,
found again when the script is started anew.

    python benchmarks/recovery.py --source builtin:demo --trained-tokens 21299200 --data builtin:demo
    python benchmarks/recovery.py --rows static,momify --shares 0.07 --seeds 0,1,2 ...
"""

import argparse
import json
import statistics
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console

from momify.convert.source import read_config
from momify.convert.stored_mom import read_mom_config
from momify.data.blocks import TokenData, load_tokens
from momify.data.tokenizer import load_tokenizer
from momify.evaluate.results import read_results
from momify.files import write_json
from momify.measure.cost import dense_macs, kv_bytes_per_token, mom_macs, parameters, planned_usage
from momify.models import locate, read_provenance
from momify.pipeline import EvalOptions, evaluate_ppl, train
from momify.recipe import Recipe, make_recipe
from momify.recipe_blocks import DataBlock, TrainBlock
from momify.runs import opened_run
from momify.screen import Screen
from momify.subject import Subject
from momify.train.tokens import fewest_steps

SMALL = {"mha": 6, "ffn": 9, "importance": "greedy", "refit_ridge": 1e-3}  # what a row does not name
BARE = {"refit_tokens": 0}
LEARNED = {"importance": "layerdrop"}
HELD = {**LEARNED, "patch_rank": 16, "refit_ridge": 1.0}
FEW = {"mha": 3, "ffn": 12, "mha_steps": 6}
COSINE_10 = {"importance": "cosine", "refit_ridge": 10.0}
COSINE_30, FOLLOWED = {"importance": "cosine", "refit_ridge": 30.0}, {"hidden": None}
TRIAL_30 = {"importance": "trial", "refit_ridge": 30.0}
NORMUON, SPLICED = {"optimizer": "normuon"}, {"splice": None}
PLAIN = {"hidden": 0.0, "splice": 1, "schedule": "cosine", "warmup": 0.1, "matrix_rate": 1.0, "embedding_rate": 1.0}
LINE = {"schedule": "linear", "warmup": 0.03}
FAST = {**NORMUON, **LINE, "matrix_rate": 2.0}
SLOW = {**FOLLOWED, **SPLICED, **FAST, "embedding_rate": 0.5}

ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "control": ("the source, trained on", {"mom": {"mha": 12, "ffn": 12},
                                           "train": {"distill": 0.0, "cross_entropy": 1.0}}),
    "every_other": ("every other layer's (DistilGPT2's way)", {"mom": {**BARE, "importance": "every_other"}}),
    "cosine": ("lowest block influence (ShortGPT's measure)", {"mom": {**BARE, "importance": "cosine"}}),
    "cosine_refit": ("lowest block influence, what stays refitted", {"mom": {"importance": "cosine"}}),
    "cosine_patched": ("lowest block influence, rank-16 patches in their place: before a training",
                       {"mom": {"importance": "cosine", "refit_modules": False, "patch_rank": 16}}),
    "cosine_held": ("the same, what stays refitted too, with a ridge of 1",
                    {"mom": {"importance": "cosine", "refit_ridge": 1.0, "patch_rank": 16}}),
    "cosine_ridge": ("lowest block influence, what stays refitted with a ridge of 1",
                     {"mom": {"importance": "cosine", "refit_ridge": 1.0}}),
    "cosine_ridge_10": ("the same, a ridge of 10", {"mom": COSINE_10}),
    "cosine_ridge_30": ("the same, a ridge of 30", {"mom": COSINE_30}),
    "cosine_ridge_100": ("the same, a ridge of 100", {"mom": {"importance": "cosine", "refit_ridge": 100.0}}),
    "cosine_30_hidden": ("as `cosine_ridge_30`, hidden states followed too", {"mom": COSINE_30, "train": FOLLOWED}),
    "cosine_30_normuon": ("the same, NorMuon for the matrices", {"mom": COSINE_30, "train": {**FOLLOWED, **NORMUON}}),
    "cosine_30_adamw": ("the same, AdamW for all weights",
                        {"mom": COSINE_30, "train": {**FOLLOWED, "optimizer": "adamw"}}),
    "trial": ("what goes chosen by trial, else as `cosine_30_normuon`: the default conversion, with NorMuon",
              {"mom": TRIAL_30, "train": {**FOLLOWED, **NORMUON}}),
    "spliced": ("the same, each block of four places of the text",
                {"mom": TRIAL_30, "train": {**FOLLOWED, **NORMUON, **SPLICED}}),
    "linear": ("the same, the learning rate falling in a line after a shorter warm-up",
               {"mom": TRIAL_30, "train": {**FOLLOWED, **NORMUON, **SPLICED, **LINE}}),
    "fast": ("the same, matrices at twice the learning rate",
             {"mom": TRIAL_30, "train": {**FOLLOWED, **SPLICED, **FAST}}),
    "slow_embeddings": ("the same, embeddings at half of it: momify's default", {"mom": TRIAL_30, "train": SLOW}),
    "alone": ("the same, following predictions alone", {"mom": TRIAL_30, "train": {**SLOW, "hidden": 0.0}}),
    "cosine_fast": ("lowest block influence, left out, predictions alone, trained as `fast`",
                    {"mom": {**BARE, "importance": "cosine"}, "train": FAST}),
    "static_fast": ("greedy by loss, left out, predictions alone, trained as `fast`", {"mom": BARE, "train": FAST}),
    "cosine_normuon": ("lowest block influence, NorMuon for the matrices",
                       {"mom": {**BARE, "importance": "cosine"}, "train": NORMUON}),
    "cosine_hidden": ("lowest block influence, hidden states followed too",
                      {"mom": {**BARE, "importance": "cosine"}, "train": FOLLOWED}),
    "greedy_hidden": ("greedy by loss, refitted, hidden states followed too", {"train": FOLLOWED}),
    "every_other_hidden": ("every other layer's, hidden states followed too",
                           {"mom": {**BARE, "importance": "every_other"}, "train": FOLLOWED}),
    "cosine_30_frozen": ("as `cosine_30_hidden`, embeddings and head as the source has them",
                         {"mom": COSINE_30, "train": {**FOLLOWED, "freeze_embeddings": True}}),
    "frozen": ("as `cosine_ridge_10`, embeddings and head as the source has them",
               {"mom": COSINE_10, "train": {"freeze_embeddings": True}}),
    "magnitude": ("smallest weights", {"mom": {**BARE, "importance": "magnitude"}}),
    "static": ("greedy by loss, left out", {"mom": BARE}),
    "momify": ("greedy by loss, what stays refitted: the nearest start", {}),
    "fitted": ("greedy by what the refit leaves of the loss", {"mom": {"importance": "fitted"}}),
    "fitted_patched": ("the same, rank-16 patches beside it, judged with them",
                       {"mom": {"importance": "fitted", "patch_rank": 16}}),
    "ridge": ("greedy by loss, held to its own weights by a ridge of 1", {"mom": {"refit_ridge": 1.0}}),
    "layerdrop": ("greedy on a copy that learned to do without, left out", {"mom": {**BARE, **LEARNED}}),
    "layerdrop_patched": ("the same, rank-16 patches in their place",
                          {"mom": {**LEARNED, "refit_modules": False, "patch_rank": 16}}),
    "layerdrop_held": ("the same, refitted with a ridge of 1", {"mom": HELD}),
    "adamw": ("as `layerdrop_held`, AdamW for all weights", {"mom": HELD, "train": {"optimizer": "adamw"}}),
    "hidden": ("as `layerdrop_held`, hidden states followed too (weight 1, falling)",
               {"mom": HELD, "train": {"hidden": 1.0}}),
    "stand_ins_first": ("as `layerdrop_held`, patches alone for the first tenth",
                        {"mom": HELD, "train": {"stand_ins_first": 0.1}}),
    "patched": ("greedy by loss, rank-16 patches in their place", {"mom": {"refit_modules": False, "patch_rank": 16}}),
    "patched_refit": ("greedy by loss, refitted, rank-16 patches", {"mom": {"patch_rank": 16}}),
    "routed": ("the same with routers that explore (K = 1, every module in reach)",
               {"mom": {"reach": "all"}}),
    "reuse": ("removed half-layers run a neighbour's module",
              {"mom": {**BARE, "mha_steps": 12, "ffn_steps": 12, "step_rank": 0}}),
    "reuse_step": ("all kept modules refitted, removed half-layers run a neighbour's with changes of rank 16",
                   {"mom": {"mha_steps": 12, "ffn_steps": 12, "step_rank": 16}}),
    "more_steps": ("the same pool at 10 and 11 steps, changes and patches of rank 16",
                   {"mom": {"mha_steps": 10, "ffn_steps": 11, "step_rank": 16, "merge": True, "patch_rank": 16}}),
    "more_steps_4": ("the same, changes and patches of rank 4",
                     {"mom": {"mha_steps": 10, "ffn_steps": 11, "step_rank": 4, "merge": True, "patch_rank": 4}}),
    "reuse_cosine": ("the modules of `cosine_ridge_10` at all 12 + 12 steps",
                     {"mom": {**COSINE_10, "mha_steps": 12, "ffn_steps": 12, "step_rank": 0}}),
    "cosine_8_10": ("the same at 8 and 10 steps, changes of rank 4",
                    {"mom": {**COSINE_10, "mha_steps": 8, "ffn_steps": 10, "step_rank": 4}}),
    "cosine_7_10": ("lowest block influence, 7 and 10 modules: the parameters of `more_steps`",
                    {"mom": {**BARE, "importance": "cosine", "mha": 7, "ffn": 10}}),
    "paper_k1": ("the paper's way, K = 1", {"mom": {"init": "random"}, "train": {"balance": 0.01, "explore": 0.0}}),
    "paper_k2": ("the paper's way, K = 2", {"mom": {"init": "random", "modules_per_token": 2},
                                            "train": {"balance": 0.01}}),
    "paper_k3": ("the paper's way, K = 3", {"mom": {"init": "random", "modules_per_token": 3},
                                            "train": {"balance": 0.01}}),
    "few_mha_twice": (
        "12 -> 3 attention modules at 6 steps, all 12 feed-forward",
        {"mom": {**FEW, "step_rank": 0}},
    ),
    "few_mha_delta": (
        "the same, step changes of rank 16, modules as one layer had them",
        {"mom": {**FEW, "step_rank": 16, "merge": False}},
    ),
    "few_mha_delta_4": (
        "the same, step changes of rank 4 around common modules",
        {"mom": {**FEW, "step_rank": 4, "merge": True}},
    ),
    "few_mha_delta_12": (
        "the same, step changes of rank 12 around common modules",
        {"mom": {**FEW, "step_rank": 12, "merge": True}},
    ),
    "few_mha_delta_cosine": (
        "the same as `few_mha_delta_12`, chosen by block influence, a ridge of 10",
        {"mom": {**FEW, "step_rank": 12, "merge": True, **COSINE_10}},
    ),
    "few_mha_delta_merged": (
        "the same, step changes of rank 16 around common modules",
        {"mom": {**FEW, "step_rank": 16, "merge": True}},
    ),
    "few_mha_merged": (
        "the same, no changes, modules start as the mean of their layers",
        {"mom": {**FEW, "step_rank": 0, "merge": True}},
    ),
    "few_default": (
        "the same as `few_mha_delta_cosine`, a ridge of 30, trained as momify does by default",
        {"mom": {**FEW, **COSINE_30, "step_rank": 12, "merge": True}, "train": SLOW},
    ),
    "few_default_4": (
        "the same, step changes of rank 4",
        {"mom": {**FEW, **COSINE_30, "step_rank": 4, "merge": True}, "train": SLOW},
    ),
    "few_mha": ("12 -> 3 attention modules at 3 steps, all 12 feed-forward", {"mom": {"mha": 3, "ffn": 12}}),
}  # fmt: skip


@dataclass(frozen=True)
class Study:
    """What all cells share: the source, tokens that it was trained on, text, block, settings of the training."""

    source: str
    trained_tokens: int
    data: dict[str, Any]
    train: dict[str, Any]
    windows: int  # held-out blocks scored at most
    out: Path

    @property
    def block(self) -> int:
        """Tokens of a sequence."""
        return self.data["block_length"]

    @cached_property
    def text(self) -> TokenData:
        """The text in the source's tokens."""
        return load_tokens(DataBlock(**self.data), load_tokenizer(locate(self.source)))

    def folder(self, row: str, share: float, seed: int) -> Path:
        """Where a cell's run lies."""
        return self.out / f"{row}-{share:g}-seed{seed}"

    def recipe(self, row: str, share: float, seed: int) -> Recipe:
        """The recipe of one cell: `share` of the source's own training tokens."""
        changes = ROWS[row][1]
        steps = fewest_steps(max(1, round(share * self.trained_tokens)), self.text, TrainBlock(**self.train))
        folder = self.folder(row, share, seed)
        name = folder.name
        values = {
            "run": {"name": name, "seed": seed, "dir": str(folder)},
            "source": {"model": self.source},
            "mom": {**SMALL, **changes.get("mom", {})},
            "data": self.data,
            "train": {**self.train, "steps": steps, "save_every": max(steps, 1), "keep": 1, **changes.get("train", {})},
            "eval": {"limit": self.windows},
        }
        return make_recipe(values, name)


def run_cell(study: Study, row: str, share: float, seed: int, screen: Screen) -> dict[str, Any]:
    """Train one cell, or read what it came to; ratios, costs, and tokens per second of its training."""
    result = study.folder(row, share, seed) / "cell.json"
    if not result.is_file():
        recipe = study.recipe(row, share, seed)
        began = time.monotonic()
        resume = (recipe.folder / "recipe.yaml").is_file()
        with opened_run(recipe, resume) as run:
            if train(recipe, run, screen, resume):
                raise SystemExit(f"stopped at {recipe.run.name}; start again to go on")
            seconds = time.monotonic() - began
            subject = Subject(run.folder.name, run.model, "mom", run, recipe)
            evaluate_ppl(subject, EvalOptions(limit=recipe.eval.limit), screen)
            write_json(result, {**outcome(study, recipe), "seconds": seconds})
    found = json.loads(result.read_text())
    print(f"{result.parent.name}: {found['before']:.3f} -> {found['after']:.4f}", flush=True)
    return found


def outcome(study: Study, recipe: Recipe) -> dict[str, Any]:
    """The cell's numbers, from its run folder."""
    logged = [json.loads(line) for line in (recipe.folder / "metrics.jsonl").read_text().splitlines()]
    speeds = [line["tokens_per_second"] for line in logged if "tokens_per_second" in line]
    kept = {entry.role: entry.score.metrics for entry in read_results(recipe.folder / "eval" / "ppl.json")}
    source, start, trained = (kept[role]["perplexity"] for role in ("source", "start", "mom"))
    config, dense, length = read_mom_config(recipe.folder / "model"), read_config(locate(study.source)), study.block
    macs = mom_macs(config, 1, length, planned_usage(config, 1, length)).total / dense_macs(dense, 1, length).total
    return {
        "tokens": read_provenance(recipe.folder / "model")["trained"]["tokens"],
        "source": source,
        "before": start / source,
        "after": trained / source,
        "divergence": kept["mom"].get("divergence"),
        "parameters": parameters(config).total / parameters(dense).total,
        "macs": macs,
        "kv": kv_bytes_per_token(config) / kv_bytes_per_token(dense),
        "tokens_per_second": statistics.median(speeds) if speeds else None,
    }


def write_table(cells: dict[tuple[str, float], list[dict[str, Any]]], shares: list[float]) -> str:
    """Markdown: a row each way, means over seeds with their half range."""
    heads = [head for share in shares for head in (f"after {share:.1%}", "divergence, nats")]
    lines = [
        "| | parameters | MACs | KV | before | " + " | ".join(heads) + " | tokens/s |",
        "|---|" + "---:|" * (5 + len(heads)),
    ]
    for row, (title, _) in ROWS.items():
        mine = {share: cells[row, share] for share in shares if (row, share) in cells}
        if mine:
            one = next(iter(mine.values()))
            costs = [f"{one[0][name]:.2f}" for name in ("parameters", "macs", "kv")]
            after = [_spread(mine.get(share, []), name) for share in shares for name in ("after", "divergence")]
            before = _spread(one, "before")
            speed = [
                cell["tokens_per_second"] for found in mine.values() for cell in found if cell["tokens_per_second"]
            ]
            shown = f"{statistics.median(speed):,.0f}" if speed else "-"
            lines.append(f"| {title} (`{row}`) | " + " | ".join([*costs, before, *after, shown]) + " |")
    return "\n".join(lines) + "\n"


def _spread(found: list[dict[str, Any]], name: str) -> str:
    """1.052, or with several seeds 1.052 ± 0.003 (half the range); - where nothing was measured."""
    values = [cell[name] for cell in found if cell.get(name) is not None]
    if not values:
        return "-"
    half, places = (max(values) - min(values)) / 2, 4 if name == "divergence" else 3
    return f"{statistics.mean(values):.{places}f}" + (f" ± {half:.{places}f}" if len(values) > 1 else "")


def listed_rows(text: str) -> list[str]:
    """Names of rows, with commas between."""
    rows = text.split(",")
    if unknown := [row for row in rows if row not in ROWS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is no row; known: {', '.join(ROWS)}")
    return rows


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="builtin:demo", help="hub name, folder or builtin:demo")
    parser.add_argument("--trained-tokens", type=int, default=21_299_200, help="tokens that the source was trained on")
    parser.add_argument("--data", nargs="+", default=["builtin:demo"])
    parser.add_argument("--valid", nargs="+", help="held-out text; documents of --data if left out")
    parser.add_argument("--block", type=int, default=256)
    parser.add_argument("--windows", type=int, default=65_536, help="held-out blocks scored at most")
    parser.add_argument("--batch-size", type=int, default=4, help="sequences a step")
    parser.add_argument("--learning-rate", type=float, default=1.0e-3)
    parser.add_argument("--optimizer", default="muon")
    parser.add_argument("--rows", type=listed_rows, default=list(ROWS))
    parser.add_argument("--shares", default="0.025,0.07,0.25", help="of the tokens that the source was trained on")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--table", action="store_true", help="train nothing: the table of the cells that are there")
    parser.add_argument("--out", type=Path, default=Path("runs/recovery"))
    return parser.parse_args()


def main() -> None:
    """Run the cells asked for, then print the table of all that are there."""
    given = read_arguments()
    data = {"train": given.data, "valid": given.valid, "block_length": given.block}
    names = ("batch_size", "learning_rate", "optimizer")
    settings = {name: getattr(given, name) for name in names} | PLAIN  # where rows say nothing
    study = Study(given.source, given.trained_tokens, data, settings, given.windows, given.out)
    screen, shares = Screen(Console(stderr=True), quiet=True), [float(share) for share in given.shares.split(",")]
    cells: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for share in shares:
        for row in given.rows:
            for seed in map(int, given.seeds.split(",")):
                if not given.table or (study.folder(row, share, seed) / "cell.json").is_file():
                    cells.setdefault((row, share), []).append(run_cell(study, row, share, seed, screen))
    print(write_table(cells, shares))


if __name__ == "__main__":
    main()
