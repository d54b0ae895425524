"""The command line, end to end on a tiny source: what it prints, writes and refuses."""

import errno
import json
import os
import resource
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2LMHeadModel

from momify.cli import app
from momify.demo.recipe import demo_recipe
from momify.models import load_mom
from momify.recipe import dump_recipe
from momify.recipe_blocks import SPLICE
from momify.train.fit import Stopped

COMMANDS = (
    "demo",
    "run",
    "convert",
    "plan",
    "train",
    "eval",
    "report",
    "export",
    "generate",
    "routes",
    "validate",
    "sweep",
)
Momify = Callable[..., Any]  # `momify ARGUMENTS` in this process: code, out, err


@pytest.fixture(scope="session")
def finished(workplace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workplace after `momify run tiny.yaml`, made once in a Python of its own."""
    folder = tmp_path_factory.mktemp("finished") / "w"
    shutil.copytree(workplace, folder)
    environment = {**os.environ, "MOMIFY_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "momify", "run", "tiny.yaml"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (folder / "stdout.txt").write_text(done.stdout)
    return folder


def test_run_goes_all_the_way(finished: Path) -> None:
    run = finished / "runs" / "tiny"
    for name in ("recipe.yaml", "metrics.jsonl", "log.txt", "report.json", "report.md", "eval/ppl.json",
                 "model/model.safetensors", "model/momify.json", "export/modeling.py", "export/README.md"):  # fmt: skip
        assert (run / name).stat().st_size > 0, name
    last = (finished / "stdout.txt").read_text().splitlines()[-1]
    for word in ("parameters", "MACs", "KV cache", "perplexity", "->"):
        assert word in last
    report = json.loads((run / "report.json").read_text())
    assert report["macs"]["mom"]["agree"]
    assert report["perplexity"]["mom_start"]["perplexity"] != report["perplexity"]["mom_trained"]["perplexity"]
    assert report["provenance"]["source_sha256"]
    start, trained = (report["perplexity"][side]["divergence"] for side in ("mom_start", "mom_trained"))
    assert 0 < trained != start > 0
    assert report["training"]["curves"]["hidden_loss"]
    assert report["training"]["splice"] == SPLICE, "the report is told what the training did"
    assert f"tokens by normuon, blocks of {SPLICE} pieces" in (finished / "stdout.txt").read_text()


def test_removal_is_told_before_it_is_done(finished: Path) -> None:
    shown = (finished / "stdout.txt").read_text()
    assert shown.index("removes 2 of 4 attention modules") < shown.index("wrote runs/tiny/model")
    assert "removes 2 of 4" in (finished / "runs/tiny/log.txt").read_text()


def test_export_gives_the_same_greedy_tokens_without_momify(finished: Path, tmp_path: Path) -> None:
    script = (
        "import sys; sys.modules['momify'] = None\n"
        "import torch, json\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "m = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()\n"
        "t = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "ids = t('def main(', return_tensors='pt').input_ids\n"
        "print(json.dumps(m.generate(ids, max_new_tokens=12, do_sample=False)[0].tolist()))\n"
    )
    run = finished / "runs" / "tiny"
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", script, str(run / "export")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    ours = load_mom(run / "model").generate(torch.tensor([found[:-12]]), max_new_tokens=12, do_sample=False)
    assert found == ours[0].tolist()


def test_convert_eval_report_export_generate(there: Path, momify: Momify) -> None:
    kept = ("--mha", 2, "--ffn", 3, "--importance", "greedy")
    done = momify("convert", "src", *kept, "--calibration", "text.txt", "--name", "c")
    assert (done.code, done.err) == (0, ""), done.err
    assert "removes 2 of 4 attention modules" in done.out
    scores = json.loads(momify("eval", "--tasks", "ppl", "--json").out)["ppl"]["models"]
    assert set(scores) == {"source", "mom"}
    assert scores["mom"]["protocol"] == scores["source"]["protocol"]
    assert scores["mom"]["metrics"]["loss"] != scores["source"]["metrics"]["loss"]
    report = json.loads(momify("report", "c", "--json").out)
    assert report["perplexity"]["mom_trained"] is None
    assert momify("export", "c", "--out", "elsewhere", "--quiet").out == "elsewhere\n"
    assert (there / "elsewhere" / "config.json").exists()
    done = momify("export", "c", "--format", "gpt2", "--out", "plain")
    assert (done.code, done.err) == (0, ""), done.err
    assert "3 GPT-2 layers run 2 attention and 3 feed-forward halves" in done.out
    assert momify("generate", "plain", "--tokens", 5).code == 0
    one, two = (momify("generate", "c", "--prompt", "def ", "--tokens", 5, "--seed", 3) for _ in range(2))
    assert one.out == two.out
    assert one.out.startswith("def ")
    assert json.loads(momify("generate", "src", "--temperature", 0, "--tokens", 5, "--json").out)["tokens"] == 5
    assert momify("generate", "c", "--beams", 2, "--tokens", 5).code == 0
    assert momify("routes", "c", "--text", "def main(<script>):", "--leave-one-out", "-q").out == "runs/c/routes.html\n"
    assert "&lt;" in (there / "runs/c/routes.html").read_text()
    short = ("train.steps=2", "train.batch_size=2", "train.precision=fp32")
    assert momify("train", "runs/c/recipe.yaml", *short, "--quiet").out == "runs/c/model\n"
    again = momify("train", "runs/c/recipe.yaml")
    assert (again.code, again.err.count("\n")) == (2, 1)


def test_full_pool_loses_nothing_at_the_start(there: Path, momify: Momify) -> None:
    assert momify("convert", "src", "--mha", 4, "--ffn", 4, "--name", "full", "--calibration", "text.txt").code == 0
    scores = {role: found["metrics"]["loss"]["mean"]
              for role, found in json.loads(momify("eval", "full", "--json").out)["ppl"]["models"].items()}  # fmt: skip
    assert scores["mom"] == pytest.approx(scores["source"], abs=1e-6)


def test_another_model_in_the_place_of_the_source_teaches_nothing(there: Path, momify: Momify) -> None:
    words = ("--importance", "cosine", "--name", "other", "--calibration", "text.txt")
    assert momify("convert", "src", "--mha", 2, "--ffn", 3, *words).code == 0
    before = (there / "runs/other/model/model.safetensors").read_bytes()
    source = GPT2LMHeadModel.from_pretrained(there / "src")
    with torch.no_grad():
        source.transformer.h[0].mlp.c_fc.weight[0, 0] += 1
    source.save_pretrained(there / "src")
    done = momify("train", "runs/other/recipe.yaml", "train.steps=2")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "is not the source that runs/other/model was made from: its SHA-256 differs" in done.err
    assert (there / "runs/other/model/model.safetensors").read_bytes() == before


def test_a_model_that_does_not_say_whether_it_is_trained_is_not_trained(there: Path, momify: Momify) -> None:
    words = ("--importance", "cosine", "--name", "lost", "--calibration", "text.txt")
    assert momify("convert", "src", "--mha", 2, "--ffn", 3, *words).code == 0
    (there / "runs/lost/model/momify.json").unlink()
    done = momify("train", "runs/lost/recipe.yaml")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "runs/lost/model/momify.json does not say whether the model is trained; convert the source again" in done.err


def test_a_stopped_run_says_what_to_type_and_quiet_shows_no_bar(
    there: Path, momify: Momify, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = []
    monkeypatch.setattr("momify.pipeline.fit", lambda *given: places.append(given[4]) or Stopped("SIGINT", 3))
    for how in ((), ("--quiet", "--overwrite")):
        done = momify("train", "tiny.yaml", "run.dir=my runs/tiny", *how)
        assert done.code == 1
        command = done.err.splitlines()[-1].partition("go on with: ")[2]
        assert shlex.split(command) == ["momify", "train", "my runs/tiny/recipe.yaml", "--resume"]
    assert [place.bars for place in places] == [True, False]


@pytest.mark.parametrize(("local_rank", "waits"), [("0", False), ("1", True)])
def test_one_process_of_a_machine_tells_of_a_mistake(
    momify: Momify, local_rank: str, waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun ends the others meanwhile."""
    waited = []
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    monkeypatch.setattr("momify.processes.time.sleep", waited.append)
    done = momify("train", "none.yaml")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert bool(waited) == waits


def test_finished_run_is_not_trained_twice(finished: Path, there: Path, momify: Momify) -> None:
    shutil.copytree(finished / "runs", there / "runs", symlinks=True)
    before = (there / "runs/tiny/model/model.safetensors").read_bytes()
    assert momify("run", "tiny.yaml").code == 2
    assert momify("run", "tiny.yaml", "--resume").code == 0
    assert (there / "runs/tiny/model/model.safetensors").read_bytes() == before


def test_a_model_that_chooses_is_no_plain_gpt2(finished: Path, momify: Momify, tmp_path: Path) -> None:
    done = momify("export", finished / "runs/tiny/model", "--format", "gpt2", "--out", tmp_path / "plain")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "--format mom" in done.err
    assert not (tmp_path / "plain").exists()


def test_phase_one_then_two(there: Path, momify: Momify) -> None:
    (there / "both.yaml").write_text(
        "run: {name: both}\n"
        "source: {scratch: {layers: 2, width: 32, heads: 2, context: 32, vocabulary: 400,"
        " train: {steps: 3, batch_size: 2, precision: fp32}}}\n"
        "mom: {mha: 1, ffn: 2, calibration_blocks: 2}\n"
        "data: {train: text.txt, block_length: 32}\n"
        "train: {steps: 2, batch_size: 2, precision: fp32}\n"
    )
    done = momify("run", "both.yaml")
    assert done.code == 0, done.err
    assert (there / "runs/both/source/model.safetensors").exists()
    assert momify("eval", "runs/both/source", "--data", "text.txt").code == 0


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command: str, momify: Momify) -> None:
    done = momify(command, "--help")
    assert done.code == 0
    assert f"Example: momify {command}" in done.out


def test_every_command_is_known_here() -> None:
    names = {command.name or command.callback.__name__ for command in app.registered_commands}
    assert names == set(COMMANDS)


def test_demo_takes_no_earlier_run_away_unasked(
    momify: Momify, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As every run: `momify run recipes/demo.yaml` writes to the same folder, and may have trained for days."""
    monkeypatch.chdir(tmp_path)
    earlier = tmp_path / "runs/demo"
    (earlier / "checkpoints/checkpoint-5").mkdir(parents=True)
    (earlier / "recipe.yaml").write_text(dump_recipe(demo_recipe()), encoding="utf-8")
    (earlier / "metrics.jsonl").write_text('{"phase": "mom", "step": 5, "loss": 3.0}\n', encoding="utf-8")
    done = momify("demo")
    assert done.code == 2
    assert "runs/demo holds an earlier run; --resume" in done.err
    assert (earlier / "metrics.jsonl").exists()


def test_help_is_instant() -> None:
    """Beside a Python that loads what prints any help, in CPU seconds, alternating: machines differ, and are busy.

    1.2 to 1.4 times as long here; with torch it would be five times.
    """
    taken: dict[str, list[float]] = {"-m momify --help": [], "-c 'import typer.rich_utils'": []}
    for _ in range(5):
        for command, seconds in taken.items():
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run([sys.executable, *shlex.split(command)], capture_output=True, check=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    momify, typer = (min(seconds) for seconds in taken.values())
    assert momify < 2 * typer


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


CONVERT = ["convert", "src", "--mha", "2", "--ffn", "2"]
WRONG = [
    (["convert", "nowhere/", "--mha", "2", "--ffn", "2"], None, "does not exist"),
    (["convert", "src", "--mha", "0", "--ffn", "2"], None, "mom.mha"),
    (["convert", "src", "--mha", "-1", "--ffn", "2"], None, "mom.mha"),
    (["convert", "src", "--mha", "5", "--ffn", "2"], None, "mha is 5; the source has 4"),
    (["convert", "src", "--mha", "2", "--ffn", "5"], None, "ffn is 5; the source has 4"),
    ([*CONVERT, "--top-k", "9"], None, "modules_per_token is 9"),
    ([*CONVERT, "--mha-steps", "9"], None, "mha_steps is 9"),
    ([*CONVERT, "--merge", "--init", "random"], None, "merge follows the homes"),
    ([*CONVERT, "--reach", "far"], None, "mom.reach"),
    ([*CONVERT, "--patch-rank", "33"], None, "patch_rank is 33; the source is 32 wide"),
    ([*CONVERT, "--name", "../up"], None, "run.name"),
    ([*CONVERT, "--calibration", "no.txt"], None, "no.txt does not exist"),
    (CONVERT, lambda f: truncate(f / "src/model.safetensors"), "model.safetensors"),
    (CONVERT, lambda f: (f / "src/config.json").write_text("{"), "config.json"),
    (CONVERT, lambda f: (f / "src/config.json").write_text('{"model_type": "bert"}'),
     "bert"),
    (CONVERT, lambda f: (f / "src/tokenizer.json").unlink(), "tokenizer"),
    (["run", "nope.yaml"], None, "does not exist"),
    (["run", "tiny.yaml", "mom.mah=3"], None, "did you mean 'mha'"),
    (["run", "tiny.yaml", "mom=3", "mom.mha=9"], None, "block.key=value"),
    (["run", "tiny.yaml", "mom.mha=9"], None, "mha is 9"),
    (["run", "tiny.yaml", "data.block_length=128"], None, "exceeds the source's 64 positions"),
    (["run", "tiny.yaml", "source.model=gone/"], None, "does not exist"),
    (["run", "tiny.yaml", "data.train=gone.txt"], None, "gone.txt does not exist"),
    (["run", "tiny.yaml", "--resume"], None, "no run to resume"),
    (["train", "tiny.yaml"], lambda f: (f / "tiny.yaml").write_text(""), "is empty"),
    (["train", "tiny.yaml"], lambda f: (f / "tiny.yaml").write_text("a: ["), "not valid YAML"),
    (["validate", "tiny.yaml"], lambda f: (f / "tiny.yaml").write_text("- 1"), "holds a list"),
    (["eval", "--tasks", "glu"], None, "unknown task 'glu'"),
    (["eval"], None, "no run under"),
    (["eval", "src"], None, "--data FILE"),
    (["eval", "src", "--data", "text.txt", "--block", "500"], None, "500"),
    (["report", "src"], None, "dense"),
    (["export", "src"], None, "dense"),
    (["export", "--format", "gguf"], None, "gguf"),
    (["routes", "src", "--text", "x"], None, "dense"),
    (["routes", "src"], None, "--text or --file"),
    (["routes", "src", "--file", "none.txt"], None, "none.txt cannot be read"),
    (["plan", "src", "--mha", "9", "--ffn", "2"], None, "mha is 9"),
    (["generate", "gone/"], None, "does not exist"),
    (["generate", "src", "--prompt", "a b c d e f " * 40], None, "positions"),
    (["demo", "train.stesp=1"], None, "did you mean 'steps'"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "prepare", "words"), WRONG, ids=[" ".join(w[0])[:50] + w[2][:12] for w in WRONG])
def test_mistakes_give_one_line_and_exit_code_2(
    arguments: list[str], prepare: Callable[[Path], object] | None, words: str, there: Path, momify: Momify
) -> None:
    if prepare:
        prepare(there)
    done = momify(*arguments)
    assert done.code == 2, done
    assert words in done.err
    lines = [line for line in done.err.splitlines() if line]
    assert len(lines) == 1, done.err
    assert lines[0].startswith("momify: ")
    assert not (there / "runs").exists()  # nothing half-written


USAGE = [
    ("frobnicate", "no such command 'frobnicate'", "momify --help"),
    ("--nope", "no such option: --nope", "momify --help"),
    ("--version=3", "option '--version' does not take a value", "momify --help"),
    ("convert", "missing argument", "momify convert --help"),
    ("convert src --ffn 2", "missing option '--mha'", "momify convert --help"),
    ("convert src --mha many --ffn 2", "invalid value for '--mha'", "momify convert --help"),
    ("convert src --mha", "option '--mha' requires an argument", "momify convert --help"),
    ("convert src other --mha 2 --ffn 2", "got unexpected extra argument", "momify convert --help"),
    ("eval --block x", "invalid value for '--block'", "momify eval --help"),
    ("eval --blocks 3", "no such option: --blocks", "momify eval --help"),
    ("train", "missing argument", "momify train --help"),
    ("plan src --mha two", "invalid value for '--mha'", "momify plan --help"),
    ("sweep src --tokens some", "invalid value for '--tokens'", "momify sweep --help"),
]


@pytest.mark.parametrize(("arguments", "words", "remedy"), USAGE, ids=[usage[0] for usage in USAGE])
def test_wrong_usage_is_one_line_and_exit_code_2(arguments: str, words: str, remedy: str, momify: Momify) -> None:
    done = momify(*arguments.split())
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1), done
    assert done.err.startswith(f"momify: {words}")
    assert done.err.endswith(f"; see {remedy}\n")


def test_wrong_usage_names_the_value(momify: Momify) -> None:
    assert "'many'" in momify("convert", "src", "--mha", "many", "--ffn", "2").err
    assert "'0'" in momify("eval", "--limit", "0").err


def test_the_bare_command_shows_its_help_and_nothing_else(momify: Momify) -> None:
    done = momify()
    assert (done.code, done.err) == (2, "")
    assert "validate" in done.out
    assert momify("--help").out.strip() == done.out.strip()
    assert momify("--version") == (0, f"{version('momify')}\n", "")


def test_a_code_of_a_command_s_own_comes_through(there: Path, momify: Momify) -> None:
    (there / "bad.yaml").write_text("- 1")
    done = momify("validate", "tiny.yaml", "bad.yaml")
    assert (done.code, done.out) == (2, "tiny.yaml: ok\n")
    assert "bad.yaml holds a list" in done.err


@pytest.mark.parametrize(("raised", "code"), [(KeyboardInterrupt, 130), (EOFError, 1), (BrokenPipeError, 1)])
def test_what_is_broken_off_has_its_code(
    raised: type[BaseException], code: int, momify: Momify, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise raised(errno.EPIPE, "gone")

    monkeypatch.setattr("momify.recipe.load_recipe", broken)
    done = momify("validate", "x.yaml")
    assert (done.code, done.out) == (code, "")
    assert "Traceback" not in done.err
    assert ("momify: interrupted" in done.err) == (code == 130)
