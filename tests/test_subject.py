"""subject.py and what hangs on it: which model, which source and which text a command works on, where results go."""

import json
import re
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from momify.convert.source import open_source
from momify.data.tokenizer import load_tokenizer
from momify.models import load_model
from momify.replaced import set_aside
from momify.runs import _WRITTEN, plain_name
from momify.screen import Screen
from momify.subject import find_subject, results_folder
from momify.train.precision import computes_bf16

CONVERT = ("convert", "src", "--mha", 2, "--ffn", 3, "--calibration", "text.txt")


@pytest.fixture
def converted(there: Path, momify) -> Path:
    """A run that is converted only, by block influence."""
    told = momify(*CONVERT, "--importance", "cosine", "--name", "c")
    assert told.code == 0, told.err
    return Path("runs/c")


def another_source() -> None:
    """The same config, other weights."""
    model = load_model(Path("src"))
    model.transformer.wte.weight.data.add_(0.01)
    model.save_pretrained("src")


def test_results_of_a_model_outside_the_runs_lie_over_no_run_and_no_other_model(converted, momify):
    shutil.copytree("src", "elsewhere/c")
    shutil.copytree("src", "c2/c")
    before = sorted(converted.rglob("*"))
    folders = {results_folder(name, Path(name)) for name in ("elsewhere/c", "c2/c")}
    assert len(folders) == 2
    assert momify("eval", "elsewhere/c", "--tasks", "ppl", "--data", "text.txt").code == 0
    assert sorted(converted.rglob("*")) == before
    assert (results_folder("elsewhere/c", Path("elsewhere/c")) / "eval" / "ppl.json").exists()


def test_results_of_the_shipped_model_and_of_hub_names_go_under_their_names(there):
    assert results_folder("builtin:demo", Path("x/checkpoint")) == Path("runs/builtin-demo")
    assert results_folder("org/gpt2", Path("hub/snapshots/0a1b")) == Path("runs/org-gpt2")
    Path("runs/org-gpt2").mkdir(parents=True)
    Path("runs/org-gpt2/recipe.yaml").write_text("a run of that name")
    assert results_folder("org/gpt2", Path("x")) not in (Path("runs/org-gpt2"), results_folder("org-gpt2", Path("x")))


@pytest.mark.parametrize(
    ("name", "plain"),
    [("my gpt2", "my-gpt2"), ("модель", "model"), ("latest", "model-latest"), ("..", "model"), ("a/b:c", "a-b-c"),
     ("x" * 300, "x" * 90), ("gpt2", "gpt2")],
)  # fmt: skip
def test_plain_name(name, plain):
    assert plain_name(name) == plain


def test_a_folder_of_any_name_is_converted(there, momify):
    Path("src").rename("mein Modell ü")
    told = momify("convert", "mein Modell ü", *CONVERT[2:], "--importance", "cosine")
    assert told.code == 0, told.err
    assert Path("runs/mein-Modell-2x3/model/config.json").exists()
    told = momify("convert", "mein Modell ü", *CONVERT[2:], "--name", "my run")
    assert (told.code, told.err.count("\n")) == (2, 1)
    assert "--name" in told.err


def test_text_that_is_named_is_scored_whole(converted, momify):
    """Also one file without documents, shorter than a block, of which nothing could be held out."""
    text = Path("text.txt").read_text().replace("<|endoftext|>", "")
    Path("one.txt").write_text(text[:9000])
    Path("short.txt").write_text("def add(a, b):\n")
    for name in ("one.txt", "short.txt"):
        told = momify("eval", "c", "--tasks", "ppl", "--data", name, "--json")
        assert told.code == 0, told.err
        tokenizer = load_tokenizer(Path("src"))
        expected = len(tokenizer(Path(name).read_text(), add_special_tokens=False)["input_ids"]) + 1
        assert f" {expected:,} tokens" in json.loads(told.out)["ppl"]["models"]["mom"]["protocol"]


def test_calibration_needs_no_held_out_text(there, momify):
    Path("one.txt").write_text(Path("text.txt").read_text().replace("<|endoftext|>", "")[:9000])
    told = momify("convert", "src", "--mha", 2, "--ffn", 3, "--calibration", "one.txt", "--importance", "cosine")
    assert told.code == 0, told.err


@pytest.mark.parametrize("command", [("eval", "c", "--tasks", "ppl"), ("report", "c")])
def test_another_source_is_no_yardstick(converted, momify, command):
    another_source()
    told = momify(*command)
    assert (told.code, told.err.count("\n")) == (2, 1), told.err
    assert "SHA-256 differs" in told.err
    assert momify("eval", "c", "--tasks", "ppl", "--no-baseline").code == 0  # the model alone can be scored


def test_phase_one_alone_is_a_model(there, momify):
    recipe = """
run: {name: dense}
source: {scratch: {layers: 2, width: 16, heads: 2, context: 32, vocabulary: 300}}
data: {train: text.txt, block_length: 32}
train: {steps: 2, batch_size: 2}
"""
    Path("dense.yaml").write_text(recipe)
    assert momify("train", "dense.yaml").code == 0
    told = momify("eval", "dense", "--tasks", "ppl", "--json")
    assert told.code == 0, told.err
    assert "dense" in json.loads(told.out)["ppl"]["models"]
    subject = find_subject("dense", Screen(Console()))
    assert (subject.kind, subject.folder) == ("gpt2", Path("runs/dense/source"))


def test_report_says_when_it_looked_at_a_part_and_an_export_tells_of_its_own_weights_alone(converted, momify):
    told = momify("report", "c", "--limit", 2)
    assert told.code == 0, told.err
    assert "(limited)" in told.out
    for name in ("report.md", "report.html"):
        assert "(limited)" in (converted / name).read_text()
    assert momify("report", "c").code == 0
    whole = json.loads((converted / "report.json").read_text())
    assert not whole["perplexity"]["limited"]
    assert "(limited)" not in (converted / "report.md").read_text()
    assert momify("export", "c").code == 0
    assert "text held out of text.txt" in (converted / "export" / "README.md").read_text()

    trained = momify("train", converted / "recipe.yaml", "train.steps=2", "train.batch_size=2")
    assert trained.code == 0, trained.err
    told = momify("export", "c")
    assert "of other weights" in told.out
    assert "erplexity" not in (converted / "export" / "README.md").read_text()
    assert momify("report", "c").code == 0
    assert momify("export", "c").code == 0
    assert "text held out of text.txt" in (converted / "export" / "README.md").read_text()


def test_training_that_goes_on_with_other_text_or_precision_says_so(there, momify):
    steps = ("tiny.yaml", "train.save_every=2", "mom.importance=cosine")
    assert momify("train", *steps).code == 0
    text = Path("text.txt").read_text()
    for changed, override, said in (
        (text, "train.precision=fp32", None),
        (text.replace("def ", "fun "), "train.precision=fp32", "was trained on other text"),
        (text, "train.precision=null", None if computes_bf16("cpu") is False else "was trained in fp32"),
    ):
        shutil.rmtree("runs/tiny/model")
        shutil.rmtree("runs/tiny/checkpoints/checkpoint-6")  # killed before the last step
        Path("text.txt").write_text(changed)
        told = momify("train", *steps, override, "--resume")
        assert told.code == 0, told.err
        assert ("was trained" in told.out) == (said is not None)
        assert (said or "") in told.out


@pytest.mark.parametrize(
    "mistake", [("mom.reach=skip", "train.budget=0.01"), ("data.train=nothing.txt",), ("data.block_length=4096",),
                ("mom.refit_ridge=1e-5",)],
)  # fmt: skip
def test_no_mistake_costs_the_run_that_was_to_be_overwritten(mistake, there, momify):
    assert momify("train", "tiny.yaml", "mom.importance=cosine").code == 0
    run = Path("runs/tiny")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    told = momify("train", "tiny.yaml", "mom.importance=cosine", "--overwrite", *mistake)
    assert (told.code, told.err.count("\n")) == (2, 1), told.err
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_command_after_a_kill_finds_the_run_that_was_being_replaced(converted, momify):
    config = (converted / "model/config.json").read_bytes()
    set_aside(converted, _WRITTEN)
    (converted / "recipe.yaml").write_text((converted / ".earlier-run/recipe.yaml").read_text())
    assert momify("eval", "c", "--tasks", "ppl").code == 0
    assert (converted / "model/config.json").read_bytes() == config
    assert not (converted / ".earlier-run").exists()


def test_report_takes_no_start_of_another_text(there, momify):
    assert momify("train", "tiny.yaml", "mom.importance=cosine", "eval.limit=4").code == 0
    text = Path("text.txt").read_text()
    Path("other.txt").write_text(text[len(text) // 2 :])
    assert momify("report", "tiny", "--data", "other.txt", "--limit", 4).code == 0
    assert json.loads(Path("runs/tiny/report.json").read_text())["perplexity"]["mom_start"] is None
    scores = Path("runs/tiny/eval/ppl.json")
    kept = json.loads(scores.read_text())
    start = next(entry for entry in kept["entries"] if entry["role"] == "start")
    start["score"]["protocol"], told = re.subn(r" of [0-9,]+ bytes", "", start["score"]["protocol"])
    assert told == 1  # as versions before 2026-11-26 had it
    scores.write_text(json.dumps(kept))
    assert momify("report", "tiny").code == 0
    assert json.loads(Path("runs/tiny/report.json").read_text())["perplexity"]["mom_start"] is not None


def test_source_in_half_precision_is_told(there, momify):
    load_model(Path("src")).half().save_pretrained("half")
    for path in Path("src").glob("tokenizer*"):
        shutil.copy(path, "half")
    told = momify("convert", "half", "--mha", 4, "--ffn", 4)
    assert told.code == 0, told.err
    assert "float16" in told.out
    assert open_source(Path("half")).dtype.itemsize == 2
