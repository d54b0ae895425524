"""A place to stand in for tests that start `momify train` as a process of its own."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from momify.data.tokenizer import train_tokenizer
from momify.demo.corpus import documents

RECIPE = """
run: {name: tiny}
source: {model: src}
mom: {mha: 2, ffn: 3, calibration_blocks: 4, reach: all, importance: cosine, refit_tokens: 4096}
data: {train: text.txt, block_length: 32, valid_tokens: 512}
train: {steps: 60, batch_size: 4, micro_batch: 2, precision: fp32, learning_rate: 1.0e-2, dropout: 0.1, explore: 0.2,
        balance: 0.01, cross_entropy: 0.5, save_every: 7, eval_every: 5, log_every: 4, keep: 2}
"""
UNSTABLE = "tokens_per_second"
MAIN = """
import datasets.config, os
os.environ |= {}
datasets.config.HF_DATASETS_CACHE = os.environ["HF_DATASETS_CACHE"]  # read at the import, which is over
{}
from momify.cli import main
main()
"""


@dataclass(frozen=True)
class Place:
    """A folder with src/ (a tiny GPT-2), text.txt and tiny.yaml, in which momify is started."""

    folder: Path
    forking: Callable[..., Any]

    @property
    def run(self) -> Path:
        return self.folder / "runs" / "tiny"

    @property
    def checkpoints(self) -> Path:
        return self.run / "checkpoints"

    def start(self, *arguments: str, launcher: tuple[str, ...] = (), module: bool = True, first: str = "") -> Any:
        """`momify ARGUMENTS` in a process of its own, or the launcher's script; out.txt and err.txt get its streams.

        Without a launcher it is forked from a Python that has done the imports, and runs `first` before all else.
        """
        more = {"MOMIFY_CACHE": str(self.folder / "cache"), "HF_DATASETS_CACHE": str(self.folder / "datasets"),
                "OMP_NUM_THREADS": "1", "COLUMNS": "200"}  # fmt: skip
        if not launcher:
            return self.forking().start(MAIN.format(more, first), self.folder, *arguments)
        command = [*launcher, *(("-m", "momify") if module else ()), *arguments]
        with open(self.folder / "out.txt", "w") as out, open(self.folder / "err.txt", "w") as err:
            return subprocess.Popen(command, cwd=self.folder, env=os.environ | more, stdout=out, stderr=err)

    def finish(self, *arguments: str, **more: Any) -> int:
        """As `start`, waiting for the end; the exit code."""
        process = self.start(*arguments, **more)
        try:
            return process.wait(timeout=240)
        finally:
            process.kill()

    @property
    def out(self) -> str:
        return (self.folder / "out.txt").read_text()

    @property
    def err(self) -> str:
        return (self.folder / "err.txt").read_text()

    def rows(self) -> list[dict]:
        """metrics.jsonl without what no two runs share."""
        lines = (self.run / "metrics.jsonl").read_text().splitlines()
        return [{key: value for key, value in json.loads(line).items() if key != UNSTABLE} for line in lines]

    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.run / "model" / "model.safetensors")


@pytest.fixture(scope="session")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that each place is a copy of."""
    folder = tmp_path_factory.mktemp("ground")
    texts = [document.text for document in documents()[:60]]
    tokenizer = train_tokenizer(texts, 512)
    config = GPT2Config(vocab_size=512, n_positions=64, n_embd=32, n_layer=4, n_head=4, bos_token_id=0, eos_token_id=0)
    torch.manual_seed(0)
    GPT2LMHeadModel(config).save_pretrained(folder / "src")
    tokenizer.save_pretrained(folder / "src")
    (folder / "text.txt").write_text("\n<|endoftext|>\n".join(text[:1000] for text in texts))
    (folder / "tiny.yaml").write_text(RECIPE)
    return folder


@pytest.fixture
def new_place(ground: Path, tmp_path: Path, forking: Callable[..., Any]) -> Callable[[str], Place]:
    """Makes a fresh place of that name."""

    def make(name: str = "place") -> Place:
        shutil.copytree(ground, tmp_path / name)
        return Place(tmp_path / name, forking)

    return make


@pytest.fixture(scope="session")
def undisturbed(ground: Path, tmp_path_factory: pytest.TempPathFactory, forking: Callable[..., Any]) -> Place:
    """A place where tiny.yaml was trained in one go, by a fresh Python, whose hash seed no other has."""
    folder = tmp_path_factory.mktemp("undisturbed") / "w"
    shutil.copytree(ground, folder)
    place = Place(folder, forking)
    assert place.finish("train", "tiny.yaml", launcher=(sys.executable,)) == 0, place.err
    return place
