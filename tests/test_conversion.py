"""conversion.py on a GPU: what the processor makes of the same source, and the processor where the GPU is no good."""

import io
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from transformers import GenerationConfig

import momify.conversion
from momify.conversion import convert
from momify.devices import best_device, device_for
from momify.export.gpt2 import export_gpt2
from momify.export.mom import export_mom
from momify.model import MomForCausalLM
from momify.models import load_mom
from momify.recipe import parse_recipe
from momify.runs import opened_run
from momify.screen import Screen

WAYS = {
    "block influence": "importance: cosine",
    "magnitude": "importance: magnitude",
    "greedy": "importance: greedy, refit_ridge: 1.0e-2",
    "trial": "importance: trial, trial_tokens: 2048",
    "layerdrop": "importance: layerdrop, layerdrop_tokens: 2048",
    "fitted": "importance: fitted, patch_rank: 4",
    "shared": "importance: cosine, mha_steps: 4, ffn_steps: 4, step_rank: 3",
    "random": "init: random, importance: cosine",
}


def converted(way: str, name: str) -> MomForCausalLM:
    """The MoM that `way` makes of the workplace's source."""
    way = way if "ffn: " in way else f"ffn: 3, {way}"
    text = (
        f"run: {{name: {name}}}\nsource: {{model: src}}\nmom: {{mha: 2, {way}}}\n"
        "data: {train: text.txt, block_length: 32}\ntrain: {precision: fp32, learning_rate: 1.0e-3}\n"
    )
    recipe = parse_recipe(text, name)
    with opened_run(recipe, resume=False) as run:
        convert(recipe, run, Screen(Console(file=io.StringIO()), quiet=True))
        return load_mom(run.model)


@torch.no_grad()
def logits(model: MomForCausalLM) -> torch.Tensor:
    """(4, 32, V) of the same tokens each time."""
    ids = torch.randint(0, 512, (4, 32), generator=torch.Generator().manual_seed(3))
    return model(input_ids=ids, use_cache=False).logits


@pytest.fixture
def on_both(there: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[MomForCausalLM]]:
    """What a way makes on the GPU and on the processor, nothing kept in between."""

    def run(way: str) -> list[MomForCausalLM]:
        found = []
        for place in ("cuda", "cpu"):
            monkeypatch.setattr(momify.conversion, "device_for", lambda needed, place=place: torch.device(place))
            monkeypatch.setenv("MOMIFY_CACHE", str(there / place))
            monkeypatch.setattr(momify.conversion, "TRIED_WEIGHTS", 1_000_000)
            found.append(converted(way, place))
        return found

    return run


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_gpu_makes_what_the_processor_makes(way, on_both) -> None:
    gpu, processor = on_both(way)
    assert gpu.config.to_dict() == processor.config.to_dict()
    assert all(parameter.is_cpu for parameter in gpu.parameters())
    assert (logits(gpu) - logits(processor)).norm() < 1e-3 * logits(processor).norm()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_fits_routers_as_the_processor_does(on_both) -> None:
    """A token whose scores are next to the threshold may go the other way, so not to the last digit."""
    gpu, processor = on_both("importance: cosine, ffn: 4, patch_rank: 4, budget: 0.8")
    assert gpu.config.router_threshold == pytest.approx(processor.config.router_threshold, abs=0.05)
    assert (logits(gpu) - logits(processor)).norm() < 0.1 * logits(processor).norm()


@pytest.mark.parametrize("type_", ["cuda", "mps"])
def test_a_device_without_room_or_float64_is_left_alone(type_, there, monkeypatch) -> None:
    said = io.StringIO()
    monkeypatch.setattr(momify.devices, "best_device", lambda: torch.device(type_))
    monkeypatch.setattr(momify.conversion, "best_device", lambda: torch.device(type_))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1000, 2000))
    recipe = parse_recipe((there / "tiny.yaml").read_text(), "tiny")
    with opened_run(recipe, resume=False) as run:
        convert(recipe, run, Screen(Console(file=said, width=200)))
        assert load_mom(run.model).config.num_mha_modules == 2
    assert f"converting on the processor: {type_} has too little memory free, or no float64" in said.getvalue()


def test_a_gpu_with_room_is_taken(monkeypatch) -> None:
    monkeypatch.setattr(momify.devices, "best_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1000, 2000))
    assert device_for(1000).type == "cuda"
    assert device_for(1001).type == "cpu"


@pytest.mark.parametrize("there_is", [True, False])
def test_the_best_device_is_the_accelerator(there_is, monkeypatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: there_is)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("xpu"))
    assert best_device().type == ("xpu" if there_is else "cpu")


@pytest.mark.parametrize(("way", "copies"), [("cosine", 2), ("trial", 6), ("layerdrop", 6), (None, 2)])
def test_room_is_asked_for_what_a_conversion_holds(way, copies, monkeypatch) -> None:
    """TRIED_WEIGHTS is 0 in tests, so that nothing said is no trial."""
    asked = []
    monkeypatch.setattr(momify.conversion, "device_for", lambda needed: asked.append(needed) or torch.device("cpu"))
    network = SimpleNamespace(num_weights=1000, layers=SimpleNamespace(num_weights=900))
    momify.conversion.conversion_device(network, way, Screen(Console(file=io.StringIO())))
    assert asked == [4 * copies * 1000 + momify.conversion.WORKING_BYTES]


def test_a_conversion_and_exports_keep_how_the_source_draws_tokens(there) -> None:
    Path("src/generation_config.json").write_text('{"do_sample": true, "top_p": 0.9}')
    converted("importance: cosine, reach: home", "drawn")
    export_mom(Path("runs/drawn/model"), Path("mom"))
    export_gpt2(Path("runs/drawn/model"), Path("gpt2"))
    for folder in ("runs/drawn/model", "mom", "gpt2"):
        found = GenerationConfig.from_pretrained(folder)
        assert (found.do_sample, found.top_p, found.eos_token_id) == (True, 0.9, 0), folder
