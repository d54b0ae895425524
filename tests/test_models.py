"""models.py: which folder a hub name means, the teacher, and that a model folder is written whole."""

import json
import resource
import shutil
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig, GPT2LMHeadModel

from momify.convert.source import open_source
from momify.data.tokenizer import load_tokenizer
from momify.errors import MomifyError
from momify.models import BUILTIN, generation_settings, load_dense, load_teacher, locate, write_model


def saved(model: GPT2LMHeadModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def test_the_teacher_says_what_the_source_says_in_fewer_operators(make_gpt2, tmp_path):
    folder = saved(make_gpt2(activation_function="gelu_new"), tmp_path)
    dense, teacher = load_dense(open_source(folder)), load_teacher(open_source(folder))
    ids = torch.randint(0, 61, (2, 16))
    with torch.no_grad():
        torch.testing.assert_close(teacher(ids).logits, dense(ids).logits, rtol=1e-5, atol=1e-5)
    assert isinstance(teacher.transformer.h[0].mlp.act, torch.nn.GELU)


def test_another_activation_stays_as_it_is(make_gpt2, tmp_path):
    folder = saved(make_gpt2(activation_function="relu"), tmp_path)
    teacher = load_teacher(open_source(folder))
    assert isinstance(teacher.transformer.h[0].mlp.act, torch.nn.ReLU)


HUB_FILES = ("config.json", "model-1.safetensors", "model-2.safetensors", "model.safetensors.index.json", "vocab.json",
             "merges.txt")  # fmt: skip


class Hub:
    """Stands for huggingface_hub: what is cached, what the network gives (None: there is none), what it was asked."""

    def __init__(self, cache: Path, network: Path | None) -> None:
        self.cache, self.network, self.asked = cache, network, 0

    def snapshot_download(self, name: str, local_files_only: bool, **settings: object) -> str:
        if not local_files_only:
            self.asked += 1
            if self.network is None:
                raise OSError("no network")
            return str(self.network)
        if not any(self.cache.iterdir()):
            raise FileNotFoundError
        return str(self.cache)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """Both hold the whole of a model."""
    monkeypatch.chdir(tmp_path)
    for folder in ("cache", "network"):
        (tmp_path / folder).mkdir()
        for name in HUB_FILES:
            (tmp_path / folder / name).touch()
        index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
        (tmp_path / folder / "model.safetensors.index.json").write_text(json.dumps(index))
    made = Hub(tmp_path / "cache", tmp_path / "network")
    monkeypatch.setattr("huggingface_hub.snapshot_download", made.snapshot_download)
    return made


def test_a_hub_name_of_which_all_is_cached_asks_no_network(hub: Hub) -> None:
    assert locate("me/tiny") == hub.cache
    (hub.cache / "merges.txt").rename(hub.cache / "tokenizer.json")
    assert (locate("me/tiny"), hub.asked) == (hub.cache, 0)


@pytest.mark.parametrize("missing", HUB_FILES)
def test_a_hub_name_of_which_a_part_is_cached_asks_the_network(missing: str, hub: Hub) -> None:
    (hub.cache / missing).unlink()
    assert (locate("me/tiny"), hub.asked) == (hub.network, 1)
    hub.network = None
    assert locate("me/tiny") == hub.cache  # it may do: `momify eval` of a MoM needs no merges.txt


def test_a_hub_name_that_nobody_has_is_named(hub: Hub) -> None:
    shutil.rmtree(hub.cache)
    hub.cache.mkdir()
    hub.network = None
    with pytest.raises(MomifyError, match=r"model me/tiny is neither a folder, nor a run, nor to be had from the hub"):
        locate("me/tiny")


@pytest.mark.parametrize("limit", [100, 30_000, 60_000])
def test_a_disk_that_is_full_leaves_the_model_that_lay_there(limit: int, tmp_path: Path, make_gpt2) -> None:
    """Full while the config, the weights, the tokenizer is written: each library has an error of its own for it."""
    model, tokenizer = make_gpt2(n_layer=1, n_embd=8), load_tokenizer(locate(BUILTIN))
    write_model(tmp_path / "model", model, tokenizer, {"trained": {"steps": 1}})
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    assert len(before["config.json"]) > 100
    assert len(before["model.safetensors"]) < 30_000
    allowed = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, allowed[1]))
    try:
        with pytest.raises(MomifyError, match=r"^cannot write .*/model: .*what was there before is intact$") as told:
            write_model(tmp_path / "model", model, tokenizer, {"trained": {"steps": 2}})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, allowed)
    assert "\n" not in str(told.value)
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_how_tokens_are_drawn_is_kept_and_what_the_config_says_is_the_configs(tmp_path: Path, make_gpt2) -> None:
    settings = {"do_sample": True, "top_p": 0.9, "eos_token_id": [5, 7], "use_cache": False, "strange": {"a": 1}}
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    model, tokenizer = make_gpt2(n_layer=1), load_tokenizer(locate(BUILTIN))
    target = tmp_path / "model"
    write_model(target, model, tokenizer, {}, generation_settings(tmp_path))
    for _ in range(2):  # the second time, after a training, what lies there is kept
        found = GenerationConfig.from_pretrained(target)
        assert (found.do_sample, found.top_p, found.eos_token_id) == (True, 0.9, 0)
        assert "strange" not in (target / "generation_config.json").read_text()
        write_model(target, model, tokenizer, {})
    write_model(tmp_path / "plain", model, tokenizer, {})
    assert not GenerationConfig.from_pretrained(tmp_path / "plain").do_sample
