"""Much text and odd text through whole commands: 10,000 lines, and 1,000 documents of every kind."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel
from typer.testing import CliRunner

from momify.cli import app
from momify.data.tokenizer import train_tokenizer
from momify.demo.corpus import documents

RECIPE = """
run: {name: r}
source: {model: src}
mom: {mha: 2, ffn: 2, calibration_blocks: 2, refit_tokens: 256}
data: {train: odd.txt, block_length: 32}
train: {steps: 2, batch_size: 2, precision: fp32}
eval: {limit: 40}
"""
KINDS = (b"a plain line", b"", b" \t ", b"\xff\xfe\x80 bad bytes", b"\x00\x01\x1b[31m", "üñ\u2028\u202e".encode(),
         b"word " * 300, b"\xf0\x9f\x92\xa9 <script>alert(1)</script>")  # fmt: skip
Momify = Callable[..., str]


@pytest.fixture
def momify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Momify:
    """Calls `momify ARGUMENTS`, which has to succeed, in a folder with a tiny source; what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOMIFY_CACHE", str(tmp_path / "cache"))
    config = GPT2Config(vocab_size=300, n_positions=64, n_embd=16, n_layer=3, n_head=2, bos_token_id=0, eos_token_id=0)
    torch.manual_seed(0)
    GPT2LMHeadModel(config).save_pretrained("src")
    train_tokenizer([document.text for document in documents()[:30]], 300).save_pretrained("src")
    Path("r.yaml").write_text(RECIPE)

    def call(*arguments: str) -> str:
        done = CliRunner().invoke(app, list(arguments))
        assert done.exit_code == 0, (done.output, done.exception)
        return done.stdout

    return call


def odd_documents() -> bytes:
    """1,000: empty ones, some of 1,500 characters and one of a million, no UTF-8, control characters, markup."""
    texts = [KINDS[i % len(KINDS)] + b" %d" % i if KINDS[i % len(KINDS)].strip() else b"" for i in range(999)]
    return b"\n<|endoftext|>\n".join([*texts, b"x" * 1_000_000])


def test_thousand_odd_documents_are_converted_trained_and_scored_on(momify: Momify) -> None:
    Path("odd.txt").write_bytes(odd_documents())
    momify("train", "r.yaml")
    scores = json.loads(momify("eval", "r", "--json"))
    assert "NaN" not in json.dumps(scores)
    momify("routes", "r", "--text", odd_documents()[:60].decode("utf-8", "replace"))


@pytest.mark.slow  # a report measures speed
def test_ten_thousand_lines_are_evaluated_and_reported(momify: Momify) -> None:
    Path("big.txt").write_text("".join(f"line {i}: the cat sat on mat {i * 7919 % 10_000}\n" for i in range(10_000)))
    momify("convert", "src", "--mha", "2", "--ffn", "2", "--calibration", "big.txt", "--name", "c")
    report = json.loads(momify("report", "c", "--data", "big.txt", "--json"))
    source = report["perplexity"]["source"]
    assert source["tokens"] > 15_000  # a tenth of the text, whole documents of 1,000 lines: one of ten
    assert 0.9 * source["tokens"] < source["scored"] < source["tokens"]
    assert Path("runs/c/report.html").stat().st_size < 300_000  # the page does not grow with the text
