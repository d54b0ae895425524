"""Thousands of broken and hostile files: each ends in success or in one clear error (design section 9).

Mutations start from real files, so that they reach deep: values of other types, absurd numbers, missing and extra keys,
flipped, cut and inserted bytes. `pytest -m slow` runs many times as many.
"""

import copy
import json
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from transformers import GPT2LMHeadModel

from momify.convert.source import open_source
from momify.data.documents import read_corpus
from momify.data.tokenizer import load_tokenizer, train_tokenizer
from momify.evaluate.results import read_results
from momify.model import MomConfig, MomForCausalLM
from momify.models import load_mom, model_type, read_provenance
from momify.recipe import parse_recipe
from momify.recipe_blocks import DataBlock
from momify.train.checkpoints import Seal, fault, newest_whole, read_seal, rotate, seal
from momify.train.guards import read_rollback

MORE = int(os.environ.get("MOMIFY_FUZZ", "1"))  # set by the slow test


def fuzz(cases: int) -> Callable:
    """`cases` examples, the same each time, no shrinking: what fails is shown as it is."""
    return settings(
        max_examples=cases * MORE,
        deadline=None,
        derandomize=MORE == 1,
        database=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )


ABSURD = [
    0, -1, 1, 2, 10**9, 2**31, 2**63, 10**40, -(10**18), 0.0, -0.5, 1e308, float("inf"), float("nan"), True, False,
    None, "", "x", "\0", "../../etc/passwd", "a\nb", "\u202e", "9" * 200, [], [[]], [0] * 50, [[0, 1]], {}, {"a": 1},
    ["a", None], {"": {}}, "gelu", "gpt2", "mom", "nan", [2**70], [[10**9]], "/dev/zero", "<script>",
]  # fmt: skip
seeds = st.integers(0, 2**48)


def mutate(tree: Any, draw: random.Random) -> Any:
    """A copy of a JSON tree with one to four places changed: replaced, removed, doubled, renamed."""
    tree = copy.deepcopy(tree)
    for _ in range(draw.randint(1, 4)):
        place = tree
        while isinstance(place, dict | list) and place:
            keys = list(place) if isinstance(place, dict) else range(len(place))
            key = draw.choice(list(keys))
            inner = place[key]
            if not (isinstance(inner, dict | list) and inner) or draw.random() < 0.4:
                change(place, key, draw)
                break
            place = inner
    return tree


def change(place: Any, key: Any, draw: random.Random) -> None:
    way = draw.random()
    if way < 0.7:
        value = draw.choice(ABSURD)
        if isinstance(place[key], int) and draw.random() < 0.3:
            value = place[key] + draw.choice([-1, 1, 1000, 10**6])
        place[key] = copy.deepcopy(value)
    elif way < 0.85:
        del place[key]
    elif isinstance(place, dict):
        place[draw.choice(["", "auto_map", "n_ctx", "dtype", "x" * 300, "\n"])] = place.pop(key)
    else:
        place.insert(key, copy.deepcopy(draw.choice([place[key], *ABSURD])))


def scramble(data: bytes, draw: random.Random) -> bytes:
    """Flip, cut, insert or repeat bytes."""
    out = bytearray(data)
    for _ in range(draw.randint(1, 5)):
        at, way = draw.randrange(len(out) + 1), draw.random()
        if way < 0.4 and out:
            out[at % len(out)] ^= 1 << draw.randrange(8)
        elif way < 0.55:
            del out[at:]
        elif way < 0.8:
            out[at:at] = draw.randbytes(draw.randint(1, 40))
        else:
            del out[at : at + draw.randint(1, 60)]
    return bytes(out)


def to_text(tree: Any, draw: random.Random) -> bytes:
    """JSON of a tree, broken as bytes now and then."""
    data = json.dumps(tree).encode()
    return scramble(data, draw) if draw.random() < 0.15 else data


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense") / "src"
    from transformers import GPT2Config

    sizes = {"vocab_size": 61, "n_positions": 16, "n_embd": 8, "n_layer": 2, "n_head": 2}
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def mom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mom") / "model"
    width = {"vocab_size": 61, "n_positions": 16, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16}
    pool = {"num_mha_modules": 2, "num_ffn_modules": 3, "num_steps": 3, "bos_token_id": 0, "eos_token_id": 0}
    MomForCausalLM(MomConfig(**width, **pool)).save_pretrained(folder)
    return folder


@fuzz(800)
@given(seed=seeds)
def test_config_of_a_gpt2(dense: Path, case: Callable, seed: int) -> None:
    draw, path = random.Random(seed), dense / "config.json"
    whole = path.read_bytes()
    try:
        path.write_bytes(to_text(mutate(json.loads(whole), draw), draw))
        with case():
            model_type(dense)
        with case():
            open_source(dense)
    finally:
        path.write_bytes(whole)


@fuzz(800)
@given(seed=seeds)
def test_config_and_saved_routing_of_a_mom(mom: Path, case: Callable, seed: int) -> None:
    """Homes and reaches are what a converted model's routing is saved as."""
    draw, path = random.Random(seed), mom / "config.json"
    whole = path.read_bytes()
    tree = json.loads(whole)
    part = draw.choice(
        [tree, {k: v for k, v in tree.items() if k.endswith(("homes", "reach")) or k.startswith("num_")}]
    )
    try:
        path.write_bytes(to_text({**tree, **mutate(part, draw)}, draw))
        with case():
            load_mom(mom)
    finally:
        path.write_bytes(whole)


def broken_header(data: bytes, draw: random.Random) -> bytes:
    """A safetensors file whose header was changed as JSON, or as bytes, or whose length field lies."""
    size = struct.unpack("<Q", data[:8])[0]
    header, body = data[8 : 8 + size], data[8 + size :]
    as_json = draw.random() < 0.75
    header = json.dumps(mutate(json.loads(header), draw)).encode() if as_json else scramble(header, draw)
    length = len(header) if draw.random() < 0.9 else draw.choice([0, 1, 2**31, 2**62, 2**64 - 1, len(header) - 1])
    return struct.pack("<Q", length) + header + body


@fuzz(600)
@given(seed=seeds, which=st.booleans())
def test_headers_of_weights(dense: Path, mom: Path, case: Callable, seed: int, which: bool) -> None:
    folder, read = (dense, open_source) if which else (mom, load_mom)
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    try:
        path.write_bytes(broken_header(whole, random.Random(seed)))
        with case():
            read(folder)
    finally:
        path.write_bytes(whole)


@fuzz(250)
@given(seed=seeds)
def test_bytes_of_weights(dense: Path, case: Callable, seed: int) -> None:
    path = dense / "model.safetensors"
    whole = path.read_bytes()
    try:
        path.write_bytes(scramble(whole, random.Random(seed)))
        with case():
            open_source(dense)
    finally:
        path.write_bytes(whole)


@fuzz(250)
@given(seed=seeds, old=st.booleans())
def test_bytes_of_a_pickle(dense: Path, case: Callable, seed: int, old: bool) -> None:
    folder = dense.parent / f"bin-{old}"
    whole = folder / "whole"
    if not folder.exists():
        folder.mkdir()
        (folder / "config.json").write_bytes((dense / "config.json").read_bytes())
        state = GPT2LMHeadModel.from_pretrained(dense).state_dict()
        torch.save(state, whole, _use_new_zipfile_serialization=not old)
    (folder / "pytorch_model.bin").write_bytes(scramble(whole.read_bytes(), random.Random(seed)))
    with case():
        open_source(folder)


RECIPE = yaml.safe_load("""
run: {name: a, seed: 0, dir: null}
source: {model: gpt2, revision: null, scratch: null}
mom: {mha: 8, ffn: 12, depth: 12, modules_per_token: 1, mha_steps: 8, ffn_steps: 12, init: home, reach: all}
data: {train: [a.txt, b.txt], valid: null, valid_tokens: 4000, block_length: 64, column: text}
train: {steps: 5, batch_size: 4, micro_batch: 2, learning_rate: 1.0e-3, warmup: 0.1, precision: bf16, keep: 3}
eval: {tasks: [ppl], data_dir: null, baseline: true, seeds: [0], limit: null}
""")
SNIPPETS = [
    "&a [*a]", "&a {a: *a}", "!!python/object/apply:os.system ['touch /tmp/it-ran']", "!!bool perhaps", "!!int ''",
    "!!timestamp x", "!!float y", "0x" + "f" * 9000, "1:" * 3000 + "1", "9" * 5000, "<<: 3", "{[1]: 2}", "? [a]\n: b",
    "- - - -", "\t",
    "%YAML 9.9\n---\na: b", "'\\ud800'", '"\\ud800"', "!!set {a, b}", "!!binary a", "2001-99-99", "~: ~",
    "[" * 3000, "{a: " * 500, "1e999999", "\x00", "\ufeff", "!!omap [a: 1]", "!!pairs 3", "!!null x", "!!str [a]",
]  # fmt: skip


@fuzz(300)
@given(seed=seeds)
def test_recipes(case: Callable, seed: int) -> None:
    draw = random.Random(seed)
    text = yaml.safe_dump(mutate(RECIPE, draw), allow_unicode=True)
    if draw.random() < 0.3:
        lines = text.splitlines()
        at = draw.randrange(len(lines))
        lines[at] = lines[at].split(":")[0] + ": " + draw.choice(SNIPPETS)
        text = "\n".join(lines)
    elif draw.random() < 0.2:
        text = scramble(text.encode(), draw).decode("utf-8", "replace")
    override = f"train.{draw.choice(['steps', 'x', ''])}={draw.choice([*SNIPPETS, '3'])}"
    with case():
        parse_recipe(text, "fuzzed", [override] if draw.random() < 0.3 else None)


@fuzz(300)
@given(seed=seeds)
def test_files_that_momify_keeps(tmp_path_factory: pytest.TempPathFactory, case: Callable, seed: int) -> None:
    """momify.json, eval/ppl.json, a checkpoint's manifest and rollback.json."""
    draw = random.Random(seed)
    folder = tmp_path_factory.getbasetemp() / "kept"
    folder.mkdir(exist_ok=True)
    provenance = {"source": {"model": "a", "sha256": "0"}, "recipe": RECIPE, "versions": {"torch": "2"},
                  "plan": {"homes": [1, 2]}, "trained": {"steps": 3, "tokens": 9}}  # fmt: skip
    score = {"metrics": {"perplexity": 2.7, "bits_per_byte": None}, "protocol": "b", "note": "", "seconds": 1.5}
    entry = {"role": "mom", "seed": None, "key": {"sha256": "0", "limit": None}, "score": score}
    kept = {"task": "ppl", "entries": [entry, {**entry, "seed": 3}]}
    for name, tree, read in (
        ("momify.json", provenance, lambda path: read_provenance(path.parent)),
        ("ppl.json", kept, read_results),
        ("rollback.json", {"times": 1, "lr_factor": 0.3}, lambda path: read_rollback(path.parent)),
    ):
        (folder / name).write_bytes(to_text(mutate(tree, draw), draw))
        with case():
            read(folder / name)


@fuzz(150)
@given(seed=seeds)
def test_manifest_of_a_checkpoint(tmp_path_factory: pytest.TempPathFactory, case: Callable, seed: int) -> None:
    draw = random.Random(seed)
    root = tmp_path_factory.getbasetemp() / "checkpoints"
    folder = root / "checkpoint-3"
    if not root.exists():
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"1234")
        seal(folder, Seal(3, 1.0))
        (root / "manifest.whole").write_bytes((folder / "manifest.json").read_bytes())
    whole = json.loads((root / "manifest.whole").read_text())
    (folder / "manifest.json").write_bytes(to_text(mutate(whole, draw), draw))
    said: list[str] = []
    with case():
        found = newest_whole(root, said.append)
        rotate(root, 1)
        assert (found is None) == (fault(folder) is not None or not read_seal(folder).sound)
    assert all("\n" not in line for line in said)


def texts(draw: random.Random) -> bytes:
    """Bytes of a text file: any encoding, very long lines, separators, NULs."""
    pieces = [
        b"a line\n", b"\n", b"\xff\xfe\x00", b"\x00", "ü\u2028x\u0085".encode(), b"<|endoftext|>\n", b"\r\n", b"\r",
        b"x" * 100_000, " \t".encode("utf-16"), b"\xf0\x9f\x92", b"\xed\xa0\x80", b"{", b'{"text": "a"}\n',
    ]  # fmt: skip
    return b"".join(draw.choices(pieces, k=draw.randint(0, 30)))


@fuzz(60)
@given(seed=seeds)
def test_text_files(tmp_path_factory: pytest.TempPathFactory, case: Callable, seed: int) -> None:
    folder = tmp_path_factory.mktemp("text")
    (folder / "a.txt").write_bytes(texts(random.Random(seed)))
    with case():
        rows = read_corpus(DataBlock(train=[str(folder / "a.txt")])).train["text"]
        assert all(isinstance(row, str) and row.strip() for row in rows)


@fuzz(60)
@given(seed=seeds)
def test_jsonl_files(tmp_path_factory: pytest.TempPathFactory, case: Callable, seed: int) -> None:
    draw = random.Random(seed)
    folder = tmp_path_factory.mktemp("jsonl")
    rows = [
        mutate({"text": "a b c", "n": {"m": [1]}}, draw) if draw.random() < 0.5 else {"text": "x"} for _ in range(4)
    ]
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (folder / "a.jsonl").write_bytes(scramble(data, draw) if draw.random() < 0.4 else data)
    with case():
        list(read_corpus(DataBlock(train=[str(folder / "a.jsonl")])).train["text"])


@fuzz(60)
@given(seed=seeds)
def test_tokenizer_files(tmp_path_factory: pytest.TempPathFactory, case: Callable, seed: int) -> None:
    draw = random.Random(seed)
    folder = tmp_path_factory.getbasetemp() / "tokenizer"
    if not folder.exists():
        train_tokenizer(["a cat sat on a mat " * 9], 265).save_pretrained(folder)
    name = draw.choice(["tokenizer.json", "tokenizer_config.json"])
    whole = (folder / name).read_bytes()
    try:
        (folder / name).write_bytes(to_text(mutate(json.loads(whole), draw), draw))
        with case():
            load_tokenizer(folder)
    finally:
        (folder / name).write_bytes(whole)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_twenty_times_as_many() -> None:
    """Other draws each time: run in a process of its own, as the number is read when the file is imported."""
    import subprocess
    import sys

    command = [sys.executable, "-m", "pytest", __file__, "-k", "not twenty", "-p", "no:cacheprovider"]
    done = subprocess.run(command, env={**os.environ, "MOMIFY_FUZZ": "20"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:]
