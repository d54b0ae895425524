"""Fixtures for the whole suite: tiny models, fixed seeds, no network."""

import json
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read once, at import of huggingface_hub
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read at import of torch: two workers of two threads slow each other

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from momify.cli import main
from momify.data.tokenizer import train_tokenizer
from momify.demo.corpus import documents
from momify.measure.latency import Timing

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_configure(config: pytest.Config) -> None:
    """Hide a GPU from all tests but those for one (-m gpu): the others compare with the processor's numbers."""
    if "gpu" not in config.option.markexpr.replace("not gpu", ""):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # read when CUDA is first asked for


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_trials_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Block influence is the default, as for a large source: trials take seconds, and have tests of their own."""
    monkeypatch.setattr("momify.conversion.TRIED_WEIGHTS", 0)


@pytest.fixture(autouse=True)
def _short_conversions(monkeypatch: pytest.MonkeyPatch) -> None:
    """A conversion through the command judges and fits on little text; tests of convert/ say how much they want."""
    monkeypatch.setattr("momify.conversion.JUDGED_TOKENS", 2048)
    monkeypatch.setattr("momify.conversion.most_tokens", lambda width: 4096)


@pytest.fixture(autouse=True)
def _short_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    """A report counts on two blocks and times one round: counters take a second a block, and have their own tests."""
    monkeypatch.setattr("momify.report.make.INPUTS", 2)
    monkeypatch.setattr("momify.report.make.Timing", partial(Timing, rounds=1, warmup=0))


def tiny_gpt2(**changes: object) -> GPT2LMHeadModel:
    """A random GPT-2 (4 layers, width 32, 61 tokens) with parameters large enough to tell layers apart."""
    settings: dict = {
        "vocab_size": 61, "n_positions": 48, "n_embd": 32, "n_layer": 4, "n_head": 4,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip
    model = GPT2LMHeadModel(GPT2Config(**{**settings, **changes}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
            elif "ln_" in name:
                parameter.normal_(mean=1.0, std=0.2)
            elif "wte" not in name and "wpe" not in name:
                parameter.normal_(std=0.15)
    return model.eval()


@pytest.fixture
def make_gpt2() -> Callable[..., GPT2LMHeadModel]:
    """`tiny_gpt2`, for tests that vary the config."""
    return tiny_gpt2


@pytest.fixture
def shared_data() -> Path:
    """The folder of real data beside the checkout; a test that needs it skips where it is absent."""
    if not (SHARED / "data").is_dir():
        pytest.skip("needs ../shared/data, which is not here")
    return SHARED / "data"


TINY_RECIPE = """
run: {name: tiny}
source: {model: src}
mom: {mha: 2, ffn: 3, calibration_blocks: 4, reach: all, importance: cosine, refit_tokens: 4096}
data: {train: text.txt, block_length: 32, valid_tokens: 256}
train: {steps: 6, batch_size: 4, precision: fp32, learning_rate: 1.0e-2, save_every: 3, log_every: 2, explore: 0.2}
"""


class Done(NamedTuple):
    """What a command left: exit code and both streams."""

    code: int
    out: str
    err: str


Momify = Callable[..., Done]

FORKING = """
import json, os, sys, traceback
exec(sys.argv[1])
for line in sys.stdin:
    task = json.loads(line)
    if "wait" in task:
        pid, status = os.waitpid(task["wait"], os.WNOHANG)
        print(json.dumps(os.waitstatus_to_exitcode(status) if pid else None), flush=True)
        continue
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # what is asked for there is for the parent
        for number, name in enumerate(("out.txt", "err.txt"), start=1):
            os.dup2(os.open(os.path.join(task["folder"], name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.chdir(task["folder"])
        sys.argv[1:], code = task["arguments"], 0
        try:
            exec(task["script"], {"__name__": "__main__"})
        except SystemExit as stop:
            code = stop.code or 0
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    print(child, flush=True)
"""


COMMANDS = "import momify.cli, momify.pipeline, momify.sweep.command, momify.train.fit, transformers.trainer"


class Forked(NamedTuple):
    """A process that a `Forking` started, to be treated as a Popen; out.txt and err.txt have its streams."""

    python: "Forking"
    pid: int
    ended: list[int]  # its exit code, once it is known

    def poll(self) -> int | None:
        if not self.ended and (code := self.python.ask(wait=self.pid)) is not None:
            self.ended.append(code)
        return self.ended[0] if self.ended else None

    def wait(self, timeout: float = 240) -> int:
        end = time.monotonic() + timeout
        while self.poll() is None:
            assert time.monotonic() < end, f"process {self.pid} goes on for more than {timeout} s"
            time.sleep(0.005)
        return self.ended[0]

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Forking:
    """A Python that has run `first` and goes on with each script in a fork of its own: imports take seconds."""

    def __init__(self, first: str, threads: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", FORKING, first], env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def ask(self, **task: object) -> int | None:
        print(json.dumps(task), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def start(self, script: str, folder: Path, *arguments: object) -> Forked:
        """`script` standing in `folder`, its exit code that of SystemExit."""
        return Forked(self, self.ask(script=script, folder=str(folder), arguments=[str(a) for a in arguments]), [])

    def run(self, script: str, folder: Path, *arguments: object) -> Done:
        """As `start`, waiting for the end."""
        code = self.start(script, folder, *arguments).wait()
        return Done(code, (folder / "out.txt").read_text(), (folder / "err.txt").read_text())


@pytest.fixture(scope="session")
def forking() -> Iterator[Callable[..., Forking]]:
    """Gives the `Forking` that starts with these imports, those of momify's commands, one for all tests."""
    made: dict[tuple[str, int], Forking] = {}

    def get(first: str = COMMANDS, threads: int = 1) -> Forking:
        if (first, threads) not in made:
            made[first, threads] = Forking(first, threads)
        return made[first, threads]

    yield get
    for one in made.values():
        one.process.stdin.close()
        one.process.wait()


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny source, a text and a recipe."""
    folder = tmp_path_factory.mktemp("work")
    texts = [document.text for document in documents()[:60]]
    torch.manual_seed(0)
    tokenizer = train_tokenizer(texts, 512)
    config = GPT2Config(vocab_size=512, n_positions=64, n_embd=32, n_layer=4, n_head=4, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(folder / "src")
    tokenizer.save_pretrained(folder / "src")
    (folder / "text.txt").write_text("\n<|endoftext|>\n".join(text[:600] for text in texts))
    (folder / "tiny.yaml").write_text(TINY_RECIPE)
    return folder


@pytest.fixture
def momify(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Momify:
    """Calls `momify ARGUMENTS` in this process."""

    def call(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["momify", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        capfd.readouterr()
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        streams = capfd.readouterr()
        return Done(code, streams.out, streams.err)

    return call


@pytest.fixture
def there(workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh copy of the workplace to stand in."""
    shutil.copytree(workplace, tmp_path / "w", symlinks=True)
    monkeypatch.chdir(tmp_path / "w")
    monkeypatch.setenv("MOMIFY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "w"
