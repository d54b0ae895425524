"""Files made to harm: code in pickles, code by name, paths that lead away, archives that burst."""

import json
import os
import pickle
import resource
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from momify.convert.source import open_source
from momify.data.blocks import load_tokens
from momify.data.tokenizer import load_tokenizer, train_tokenizer
from momify.errors import MomifyError
from momify.model import MomConfig, MomForCausalLM
from momify.models import load_mom, model_type, read_provenance
from momify.recipe import parse_recipe
from momify.recipe_blocks import DataBlock


class Runs:
    """Unpickled, this would run a command."""

    def __init__(self, function: Callable, *arguments: object) -> None:
        self.what = (function, arguments)

    def __reduce__(self) -> tuple:
        return self.what


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    folder = tmp_path / "src"
    sizes = {"vocab_size": 265, "n_positions": 16, "n_embd": 8, "n_layer": 2, "n_head": 2}
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).save_pretrained(folder)
    train_tokenizer(["a cat sat on a mat " * 9], 265).save_pretrained(folder)
    return folder


@pytest.fixture
def mom(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    width = {"vocab_size": 61, "n_positions": 16, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16}
    pool = {"num_mha_modules": 2, "num_ffn_modules": 3, "num_steps": 3, "bos_token_id": 0, "eos_token_id": 0}
    MomForCausalLM(MomConfig(**width, **pool)).save_pretrained(folder)
    return folder


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


PAYLOADS = {
    "os.system": lambda mark: Runs(os.system, f"touch {mark}"),
    "subprocess": lambda mark: Runs(subprocess.call, ["touch", str(mark)]),
    "eval": lambda mark: Runs(eval, f"open({str(mark)!r}, 'w')"),
    "exec": lambda mark: Runs(exec, f"open({str(mark)!r}, 'w')"),
    "open": lambda mark: Runs(open, str(mark), "w"),
    "__import__": lambda mark: Runs(__import__, "antigravity"),
    "torch.load": lambda mark: Runs(torch.load, "/dev/zero"),
    "torch.hub": lambda mark: Runs(torch.hub.load, "x/y", "z"),
    "os.mkfifo": lambda mark: Runs(os.mkdir, str(mark)),
}


@pytest.mark.parametrize("name", PAYLOADS)
@pytest.mark.parametrize("form", ["zip", "old", "bare", "renamed", "shard"])
def test_code_in_a_pickle_does_not_run(dense: Path, tmp_path: Path, name: str, form: str) -> None:
    mark = tmp_path / "it-ran"
    payload = PAYLOADS[name](mark)
    state = {**load_file(dense / "model.safetensors"), "evil": payload}
    (dense / "model.safetensors").unlink()
    path = dense / "pytorch_model.bin"
    if form == "bare":
        path.write_bytes(pickle.dumps(payload))
    elif form == "renamed":  # a pickle under the name of a safe format
        (dense / "model.safetensors").write_bytes(pickle.dumps(payload))
    elif form == "shard":
        path = dense / "pytorch_model-1.bin"
        torch.save(state, path)
        (dense / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"evil": path.name}}))
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(MomifyError):
        open_source(dense)
    assert not mark.exists()


@pytest.mark.parametrize("key", ["auto_map", "custom_pipelines", "architectures", "_name_or_path"])
def test_code_named_by_a_config_is_not_loaded(dense: Path, mom: Path, tmp_path: Path, key: str, case: Callable) -> None:
    mark = tmp_path / "it-ran"
    names = {f"Auto{k}": "evil.Evil" for k in ("Config", "Model", "ModelForCausalLM", "Tokenizer")}
    for folder in (dense, mom):
        (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass Evil: pass\n")
        edit(folder / "config.json", **{key: ["evil.Evil"] if key == "architectures" else names})
        if key == "_name_or_path":
            edit(folder / "config.json", _name_or_path="../../evil")
    open_source(dense)
    load_mom(mom)
    edit(dense / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]})
    with case():
        load_tokenizer(dense)
    assert not mark.exists()


def test_adapter_beside_a_model_is_not_followed(mom: Path) -> None:
    (mom / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "../else", "peft_type": "LORA"}))
    assert load_mom(mom) is not None


def test_yaml_that_names_code_is_refused(tmp_path: Path) -> None:
    mark = tmp_path / "it-ran"
    for tag in ("!!python/object/apply:os.system", "!!python/object/new:os.system", "!!python/name:os.system"):
        with pytest.raises(MomifyError, match="not valid YAML"):
            parse_recipe(f"run: {tag} ['touch {mark}']", "evil.yaml")
    assert not mark.exists()


def test_yaml_that_grows_is_refused_at_once(case: Callable) -> None:
    """Nine lines that stand for a billion values."""
    lines = ["a: &a [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"{b}: &{b} [{', '.join(['*' + a] * 10)}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True)]
    for key in ("run: *i", "data: {train: *i}", "source: {model: *i}", "eval: {seeds: *i, tasks: *i}"):
        with case():
            parse_recipe("\n".join([*lines, key]), "evil.yaml")
    with case():
        parse_recipe("x" * 10_000_000, "evil.yaml")


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "tokenizer.json",
             "tokenizer_config.json", "momify.json"],
)  # fmt: skip
def test_links_out_of_the_folder_are_not_followed(dense: Path, tmp_path: Path, name: str) -> None:
    secret = tmp_path / "secret"
    secret.write_text('{"model_type": "gpt2", "weight_map": {"a": "b"}}')
    if name.startswith(("pytorch", "model.safetensors.index")):
        (dense / "model.safetensors").unlink()
    (dense / name).unlink(missing_ok=True)
    (dense / name).symlink_to(secret)
    readers = (model_type, open_source, load_tokenizer, read_provenance)
    with pytest.raises(MomifyError, match="leads out of the model folder"):
        [read(dense) for read in readers]


@pytest.mark.parametrize(
    "shard", ["../src/model.safetensors", "/dev/zero.safetensors", "a/../../x.safetensors", "\0.safetensors"]
)
def test_shards_out_of_a_mom_are_not_followed(mom: Path, shard: str) -> None:
    (mom / "model.safetensors").rename(mom / "one.safetensors")
    (mom / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.wte.weight": shard}}))
    with pytest.raises(MomifyError, match="leads out of the model folder"):
        load_mom(mom)


@pytest.mark.parametrize("key", ["tokenizer_file", "vocab_file", "merges_file", "name_or_path"])
def test_a_tokenizer_reads_its_own_files_only(dense: Path, tmp_path: Path, key: str, case: Callable) -> None:
    """A tokenizer_config.json that names another vocabulary gets the one that lies in the folder, or is refused."""
    other = tmp_path / "other"
    train_tokenizer(["zebra quagga okapi " * 9], 265).save_pretrained(other)
    here = load_tokenizer(dense).get_vocab()
    for path in (str(other / "tokenizer.json"), "../other/tokenizer.json"):
        edit(dense / "tokenizer_config.json", **{key: path})
        with case():
            assert load_tokenizer(dense).get_vocab() == here


def test_archive_that_bursts_is_refused(dense: Path) -> None:
    (dense / "model.safetensors").unlink()
    path = dense / "pytorch_model.bin"
    torch.save({"wte.weight": torch.zeros(3_000_000)}, path)
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    assert path.stat().st_size < 100_000
    with pytest.raises(MomifyError, match="unpacks to more than it weighs"):
        open_source(dense)


def test_tensor_larger_than_its_data_is_refused(dense: Path) -> None:
    """Strides of 0 make eight gigabytes of four bytes; the config agrees, so that only the data can tell."""
    state = load_file(dense / "model.safetensors")
    (dense / "model.safetensors").unlink()
    state["transformer.wte.weight"] = torch.zeros(1).expand(2**28, 8)
    torch.save(state, dense / "pytorch_model.bin")
    edit(dense / "config.json", vocab_size=2**28)
    with pytest.raises(MomifyError, match="claims more values than the file holds"):
        open_source(dense)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_steps": 10**9}, {"num_mha_modules": 10**9, "mha_reach": None, "mha_homes": None}, {"vocab_size": 10**15},
        {"hidden_size": 2**27, "intermediate_size": 2**28}, {"n_positions": 2**28}, {"router_hidden": 2**28},
        {"patch_rank": 2**28}, {"step_rank": "2"}, {"patch_rank": -1}, {"patch_rank": 8, "step_rank": 8},
        {"num_steps": 60_000, "num_ffn_modules": 60_000, "ffn_reach": None, "ffn_homes": None},
    ],
)  # fmt: skip
def test_absurd_sizes_of_a_mom_cost_nothing(mom: Path, changes: dict) -> None:
    edit(mom / "config.json", **changes)
    before, since = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(MomifyError):
        load_mom(mom)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10
    assert time.monotonic() - since < 5


def test_header_that_claims_much_is_refused_before_memory_is_taken(dense: Path) -> None:
    save_file({"wte.weight": torch.zeros(2)}, dense / "model.safetensors")
    data = bytearray((dense / "model.safetensors").read_bytes())
    data[:8] = (2**40).to_bytes(8, "little")
    (dense / "model.safetensors").write_bytes(data)
    with pytest.raises(MomifyError, match="truncated or damaged"):
        open_source(dense)


def test_thousand_documents_of_every_kind(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty ones, a line of a million characters, bytes that are no UTF-8, control characters."""
    monkeypatch.setenv("MOMIFY_CACHE", str(tmp_path / "cache"))
    kinds = [b"a plain line", b"", b" \t ", b"\xff\xfe\x80 bad bytes", b"\x00\x01\x1b[31m", "üñ\u2028\u202e".encode(),
             b"word " * 3000, b"\xf0\x9f\x92\xa9 <script>alert(1)</script>"]  # fmt: skip
    documents = [kinds[i % len(kinds)] + b" %d" % i if kinds[i % len(kinds)].strip() else b"" for i in range(999)]
    documents.append(b"x" * 1_000_000)
    path = tmp_path / "a.txt"
    path.write_bytes(b"\n<|endoftext|>\n".join(documents))
    data = load_tokens(DataBlock(train=[str(path)], block_length=16), load_tokenizer(dense))
    ends = sum(int((part == 0).sum()) for part in (data.train, data.valid))
    assert ends == sum(bool(document.strip()) for document in documents)
    assert len(data.valid) > 0
    assert int(max(data.train.max(), data.valid.max())) < 265


def test_module_code_is_never_imported_from_a_model_folder(mom: Path, tmp_path: Path) -> None:
    """Files named like Python modules beside the weights: loading from inside that folder imports none of them."""
    mark = tmp_path / "it-ran"
    for name in ("torch.py", "json.py", "momify.py", "modeling.py"):
        (mom / name).write_text(f"open({str(mark)!r}, 'w')\n")
    code = "import sys; sys.path.pop(0); from momify.models import load_mom; load_mom('.')"
    done = subprocess.run([sys.executable, "-c", code], cwd=mom, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not mark.exists()
