"""A report of two real tiny models, and parts to build others from."""

import copy
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2LMHeadModel

from momify.convert.source import open_source
from momify.evaluate.perplexity import Perplexity
from momify.measure.cost import parameters
from momify.measure.latency import Timing, measure_latency
from momify.measure.macs import count_macs
from momify.measure.memory import measure_memory
from momify.measure.routing import collect
from momify.model import MomConfig, MomForCausalLM
from momify.pipeline import whole_mom
from momify.report.data import Looks, Measured, Quality, Text
from momify.report.make import Pair
from momify.report.provenance import Origin, collect_provenance

Parts = dict[str, Any]


TRAINING = {
    "steps": 4, "splice": 1, "tokens": 512, "tokens_per_second": 99.5,
    "curves": {
        "loss": [[2, 3.0], [4, 2.75]], "next_token_loss": [[2, 3.1], [4, 2.9]],
        "distillation_loss": [[2, 0.5], [4, 0.25]], "hidden_loss": [[2, 0.2], [4, 0.1]],
        "held_out_loss": [[2, 2.7], [4, 2.6]], "router_entropy": [],
    },
}  # fmt: skip


def spread(mean: float, deviation: float | None = None) -> dict[str, Any]:
    return {"mean": mean, "deviation": deviation, "values": [mean]}


TASKS = [
    {
        "task": "rte", "main": "accuracy", "shown": ["accuracy"], "higher_is_better": True, "limited": True,
        "seeds": [0, 1], "covers": None,
        "models": {
            "source": {"metrics": {"accuracy": spread(61.5, 1.25)}, "sha256": "a", "protocol": "dev set: 277 examples",
                       "notes": [], "seconds": 2.0},
            "mom": {"metrics": {"accuracy": spread(60.0, 0.5)}, "sha256": "b", "protocol": "dev set: 277 examples",
                    "notes": ["all predictions are equal"], "seconds": 2.0},
        },
        "differences": {"mom": {"accuracy": {"difference": -1.5, "standard_error": 0.95,
                                             "verdict": "within the spread"}}},
        "baselines": [{"name": "majority", "how": "always the commonest", "metrics": {"accuracy": 52.7}}],
    },
    {
        "task": "glue", "main": "average", "shown": ["average"], "higher_is_better": True, "limited": False,
        "seeds": [0, 1], "covers": ["rte", "cola"],
        "models": {"source": {"metrics": {"average": spread(40.0)}, "sha256": "a", "protocol": "", "notes": [],
                              "seconds": 0.0},
                   "mom": {"metrics": {"average": None}, "sha256": "b", "protocol": "", "notes": [], "seconds": 0.0}},
        "differences": {"mom": {}},
        "baselines": [],
    },
]  # fmt: skip


@pytest.fixture
def rte() -> dict[str, Any]:
    """What `momify eval` kept of one task, to be changed."""
    return copy.deepcopy(TASKS[0])


TEXT = Text(("text.txt",), held_out=True, own=True)


def scored(
    perplexity: float, loss: float = 2.5, divergence: float | None = None, agreement: float | None = None
) -> Perplexity:
    protocol = "block 16, stride 16, 160 tokens, float32, first token of a window unscored"
    return Perplexity(loss, perplexity, 1.25, 160, 150, 10, protocol, divergence=divergence, agreement=agreement)


def tiny_mom() -> MomForCausalLM:
    """Half of the attention modules of `tiny_gpt2`, attention in 2 of 4 steps, some steps routed; patches, a delta."""
    model = MomForCausalLM(
        MomConfig(
            vocab_size=61, n_positions=48, hidden_size=32, num_attention_heads=4, intermediate_size=128,
            num_mha_modules=2, num_ffn_modules=3, num_steps=4, bos_token_id=0, eos_token_id=0,
            mha_homes=[0, 2, 1, 2], mha_reach=[[0], [2], [0, 1, 2], [2]],
            ffn_homes=[0, 1, 2, 0], ffn_reach=[[0], [0, 1, 2, 3], [2], [0, 3]], patch_rank=2, step_rank=3,
        )
    ).eval()  # fmt: skip
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "router" in name:
                parameter.normal_(std=0.5)
    return model


@pytest.fixture(scope="module")
def _measured() -> Parts:
    return {}


@pytest.fixture
def parts(make_gpt2: Callable[..., GPT2LMHeadModel], _measured: Parts) -> Parts:
    """Arguments of build_report, measured once a module."""
    if not _measured:
        models = {"source": make_gpt2(), "mom": tiny_mom()}
        inputs = [torch.randint(0, 61, (1, 12)) for _ in range(3)]
        batches = [inputs[0], torch.cat(inputs)]
        for side, model in models.items():
            counts = count_macs(model, inputs, counted=2)
            _measured[side] = Measured(side, parameters(model.config), measure_memory(model, batches), counts)
        _measured["quality"] = Quality(
            TEXT, scored(12.0), scored(15.0, 2.6, 0.31, 78.25), scored(12.6, 2.5, 0.2024, 83.14)
        )
        origin = Origin("gpt2-tiny", "ab" * 32, 0, {"run": {"name": "x"}}, "momify run x.yaml")
        _measured["provenance"] = collect_provenance(origin)
        latency = tuple(measure_latency(models, batch[:, :8], Timing(4, 2, 0)) for batch in batches)
        _measured["looks"] = Looks(latency, collect(models["mom"], inputs), TRAINING, TASKS)
    return dict(_measured)


@pytest.fixture
def pair(make_gpt2: Callable[..., GPT2LMHeadModel], tmp_path: Path) -> Pair:
    """Two tiny models side by side."""
    source = make_gpt2()
    source.save_pretrained(tmp_path / "source")
    return Pair("source", source, whole_mom(open_source(tmp_path / "source")), "mom", tiny_mom())


@pytest.fixture
def with_speed(parts: Parts) -> Callable[[float, float], Parts]:
    """The parts with the MoM this many times as fast as the source at prefill and decode."""

    def change(prefill: float, decode: float) -> Parts:
        looks = parts["looks"]
        first = looks.latency[0]
        source = first.speeds["source"]
        mom = replace(
            source,
            prefill=replace(source.prefill, median=source.prefill.median * prefill),
            decode=replace(source.decode, median=source.decode.median * decode),
        )
        latency = replace(first, speeds={"source": source, "mom": mom})
        return {**parts, "looks": replace(looks, latency=(latency, replace(latency, batch=3)))}

    return change


FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-component-update",
    "--disable-background-networking", "--disable-sync",
]  # fmt: skip


def find_chromium() -> str:
    """The program. Skips the test where there is none."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    pytest.skip("no Chromium here: install one, for instance apt-get install chromium")


@dataclass
class Visit:
    """An open page, with all that it asked for and complained about."""

    page: object
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def check_quiet(self, path: Path) -> None:
        """The page asked for itself only, and no error came up."""
        assert [url for url in self.requests if not url.startswith("data:")] == [path.as_uri()]
        assert self.complaints == []


@contextmanager
def open_page(
    browser: object, path: Path, size: tuple[int, int] = (1200, 900), scheme: str = "light"
) -> Iterator[Visit]:
    """Open `path` in a window of `size`, cut off from any network, light or dark."""
    context = browser.new_context(
        viewport={"width": size[0], "height": size[1]}, color_scheme=scheme, offline=True, reduced_motion="reduce"
    )
    context.set_default_timeout(10_000)
    page = context.new_page()
    seen = Visit(page)
    page.on("request", lambda request: seen.requests.append(request.url))
    page.on("pageerror", lambda error: seen.complaints.append(str(error)))
    page.on("dialog", lambda dialog: (seen.complaints.append(dialog.message), dialog.dismiss()))
    page.on("console", lambda line: seen.complaints.append(line.text))
    page.goto(path.as_uri())
    yield seen
    context.close()


@pytest.fixture(scope="session")
def _browser() -> Iterator[Any]:
    """A headless Chromium to look at pages with; tests that need one skip where it is missing."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs the Python package playwright")
    program = find_chromium()
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=program, args=FLAGS)
        yield started
        started.close()


@pytest.fixture
def visit(_browser: Any) -> Callable[..., AbstractContextManager[Visit]]:
    """`open_page` in a headless Chromium: give a path, and a size and scheme if they matter."""
    return partial(open_page, _browser)
