"""`momify plan` as a user calls it: at once, without torch, and in lines that convert understands."""

import json
import resource
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import GPT2Config
from typer.testing import CliRunner

from momify.cli import app
from momify.convert.homes import Request, check_request
from momify.plan.make import command, make_plan, premises, training_speed
from momify.plan.show import duration

Invoke = Callable[..., str]


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Invoke:
    """Calls `momify plan ARGUMENTS`, gives what it prints."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: object) -> str:
        done = CliRunner().invoke(app, ["plan", *map(str, arguments)])
        assert done.exit_code == 0, done.output
        return done.stdout

    return call


def cpu_seconds(code: str, *arguments: str) -> float:
    """CPU seconds, as the machine may be busy, of Python running `code`."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize("arguments", [["--mha", "8", "--ffn", "36"], ["--budget", "flops<=0.84,kv<=0.5,params<=0.75"]])
def test_it_answers_at_once_and_leaves_torch_alone(arguments: list[str]) -> None:
    """In less time than torch alone takes to be imported: half a second to a second."""
    code = (
        "import sys; sys.argv = ['momify', 'plan', 'gpt2-xl', *sys.argv[1:]]\n"
        "from momify.cli import app\n"
        "try: app()\n"
        "finally: assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    assert cpu_seconds(code, *arguments) < cpu_seconds("import torch")


def test_gpt2_large_as_json(plan: Invoke) -> None:
    found = json.loads(plan("gpt2-large", "--mha", 8, "--ffn", 36, "--mha-steps", 16, "--json"))
    assert found["source"]["parameters"]["total"] == 774_030_080
    assert found["source"]["macs"] / 1e12 == pytest.approx(0.887, abs=5e-4)
    assert found["source"]["flops"] == 2 * found["source"]["macs"]
    assert (found["source"]["kv_bytes_per_token"], found["mom"]["kv_bytes_per_token"]) == (180 * 1024, 80 * 1024)
    assert found["source"]["kv_bytes"] == 180 * 1024 * 1024
    assert found["source"]["weight_bytes"]["bfloat16"] == 2 * 774_030_080
    assert found["command"] == "momify convert gpt2-large --mha 8 --ffn 36 --mha-steps 16"
    assert found["training"]["bytes"] > 20 * 2**30


def test_a_table(plan: Invoke) -> None:
    shown = plan("gpt2-large", "--mha", 8, "--ffn", 36, "--mha-steps", 16)
    for words in (
        "774 M",
        "180 KiB",
        "80.0 KiB",
        "FLOPs, 1,024 tokens",
        "1.77 T",
        "fits an a100 with train.micro_batch=",
    ):
        assert words in shown
    assert shown.rstrip().endswith("momify convert gpt2-large --mha 8 --ffn 36 --mha-steps 16")


def test_a_search(plan: Invoke) -> None:
    found = json.loads(plan("gpt2-large", "--budget", "flops<=0.84,kv<=0.5,params<=0.75", "--json"))
    assert 1 <= len(found) <= 5
    for one in found:
        assert one["mom"]["macs_at_most"] <= 0.84 * one["source"]["macs"]
        assert one["mom"]["kv_bytes"] <= 0.5 * one["source"]["kv_bytes"]
        assert one["mom"]["parameters"]["total"] <= 0.75 * one["source"]["parameters"]["total"]
    shown = plan("gpt2-large", "--budget", "flops<=0.84,kv<=0.5,params<=0.75")
    assert [line for line in shown.splitlines() if line.startswith("momify")] == [one["command"] for one in found]


REQUESTS = [
    Request(3, 2),
    Request(2, 3, depth=3, mha_steps=2),
    Request(2, 3, depth=6, modules_per_token=2, ffn_steps=5),
    Request(2, 2, reach="skip", mha_steps=3, ffn_steps=2),
    Request(2, 2, init="random"),
    Request(2, 3, mha_steps=4, patch_rank=5, step_rank=3),
]


@pytest.mark.parametrize("request_", REQUESTS, ids=str)
def test_a_line_says_to_convert_what_was_planned(
    request_: Request, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The line is parsed by convert itself, up to the recipe that it would run."""
    monkeypatch.chdir(tmp_path)
    GPT2Config(n_embd=32, n_layer=4, n_head=4, bos_token_id=0, eos_token_id=0).save_pretrained("my model")
    seen = []
    monkeypatch.setattr("momify.pipeline.check", lambda recipe, screen: seen.append(recipe))
    monkeypatch.setattr("momify.conversion.convert", lambda recipe, run, screen: None)
    line = command("my model", request_, layers=4)
    done = CliRunner().invoke(app, [*shlex.split(line)[1:], "--name", "x"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    mom = seen[0].mom
    asked = Request(**{name: getattr(mom, name) for name in vars(request_)})
    check_request(asked, 4)
    assert asked == request_
    assert seen[0].source.model == "my model"


def test_a_recipe(plan: Invoke, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(
        "source: {model: gpt2}\nmom: {mha: 6, ffn: 9, mha_steps: 8}\n"
        "data: {train: x.txt, block_length: 512}\ntrain: {steps: 10, batch_size: 4}\n"
    )
    found = json.loads(plan("r.yaml", "train.batch_size=8", "--json"))
    assert found["command"] == "momify train r.yaml train.batch_size=8"
    assert found["source"]["tokens"] == 512
    alone = json.loads(plan("gpt2", "--mha", 6, "--ffn", 9, "--mha-steps", 8, "--tokens", 512, "--json"))
    assert found["mom"] == alone["mom"]
    assert found["training"]["flops"] == alone["training"]["flops"] * 10 * 8 / (5000 * 64)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["gpt2"], "--budget"),
        (["gpt2", "--mha", "3"], "needs both --mha and --ffn"),
        (["gpt2", "--mha", "13", "--ffn", "3"], "mha is 13"),
        (["gpt2", "--mha", "3", "--ffn", "3", "--tokens", "2000"], "exceeds the 1024 positions"),
        (["gpt2", "--mha", "3", "--ffn", "3", "--device", "abacus"], "--device 'abacus'"),
        (["gpt2", "a.b=1", "--mha", "3", "--ffn", "3"], "'a.b=1' sets a key of a recipe"),
        (["gone.yaml"], "does not exist"),
        (["gpt2", "--budget", "speed<=3"], "not understood"),
        (["gpt2", "--mha", "6", "--ffn", "6", "--budget", "kv<=1"], "--mha says what --budget is to find"),
        (["gpt2", "--top-k", "2", "--budget", "kv<=1"], "--top-k says what --budget is to find"),
        (
            ["r.yaml", "--mha-steps", "7"],
            "--mha-steps does not go with r.yaml, whose mom block says it; give mom.mha_s",
        ),
        (["r.yaml", "--budget", "kv<=1"], "--budget does not go with r.yaml"),
    ],
)
def test_mistakes(arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text("source: {model: gpt2}\nmom: {mha: 6, ffn: 9}\ndata: {train: x.txt}\n")
    done = CliRunner().invoke(app, ["plan", *arguments])
    assert words in str(done.exception)
    assert type(done.exception).__name__ == "MomifyError"
    assert "\n" not in str(done.exception)


def test_a_recipes_line_says_all_that_the_recipe_does(plan: Invoke, tmp_path: Path) -> None:
    """No `momify convert` could: it knows neither these keys nor the training."""
    (tmp_path / "my r.yaml").write_text(
        "source: {model: gpt2}\nmom: {mha: 6, ffn: 9, merge: true, importance: cosine}\ndata: {train: x.txt}\n"
    )
    line = plan("my r.yaml", "data.train=a b.txt", "train.steps=3").splitlines()[-1]
    assert shlex.split(line) == ["momify", "train", "my r.yaml", "data.train=a b.txt", "train.steps=3"]


def test_the_time_is_the_most_it_can_be_and_the_device_has_its_article(plan: Invoke) -> None:
    shown = plan("gpt2", "--mha", 6, "--ffn", 9, "--device", "v100")
    assert " on a v100 at " in shown
    assert "training steps: at most " in shown


def test_the_time_follows_the_speed() -> None:
    given, request = premises("gpt2"), Request(6, 9)
    slow, fast = (make_plan(given, request, training_speed("a100", rate)).training for rate in (10.0, 20.0))
    assert slow.seconds == 2 * fast.seconds == slow.flops / 1e13


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (89, "89 s"), (100, "2 min"), (7200, "2.0 h"), (200_000, "2.3 days")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
