"""Hundreds of broken GLUE and XSUM files: each ends in data that is what the file says, or in one clear error.

Rows start from good ones, so that what is broken is reached; cells take values of every odd kind, bytes are flipped,
cut and put in. The files of results that momify keeps itself are broken too. MOMIFY_FUZZ=8 runs eight times as many.
"""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from momify.evaluate.glue_data import GlueData, read_glue
from momify.evaluate.glue_tasks import GLUE, GlueTask
from momify.evaluate.results import read_results
from momify.evaluate.xsum_data import read_xsum
from momify.evaluation import read_summaries

from ..evaluate.conftest import file_text
from .test_fuzz import fuzz, mutate, scramble, seeds, to_text

ODD_CELLS = [
    "", " ", "\0", '"', "'", "\\", "\r", "\u2028", "\u202e", "\ufeff", "0", "1", "2", "-1", "entailment", "5.0",
    "nan", "inf", "1e308", "1e400", "\u0663", "\uff11", "True", "<|endoftext|>", "x" * 5000, "\x1b[2J", "None", "0x1",
    "1_0", "+1", " 1 ",
]  # fmt: skip
ODD_BYTES = [b"\xff", b"\xed\xa0\x80", b"\x00", b"\n", b"\t", b"\t\t", b"\r\n", b"\xf0\x9f\x92", b'"', b"\xef\xbb\xbf"]


def break_table(text: str, draw: random.Random) -> bytes:
    """A TSV with cells replaced, columns added, dropped, renamed, rows doubled; broken as bytes now and then."""
    rows = [line.split("\t") for line in text.split("\n")]
    for _ in range(draw.randint(1, 3)):
        row, way = draw.choice(rows), draw.random()
        place = draw.randrange(len(row)) if row else 0
        if way < 0.5 and row:
            row[place] = draw.choice(ODD_CELLS)
        elif way < 0.65:
            row.insert(place, draw.choice(ODD_CELLS))
        elif way < 0.8 and row:
            del row[place]
        elif way < 0.9:
            rows.insert(draw.randrange(len(rows) + 1), list(draw.choice(rows)))
        else:
            draw.shuffle(rows[0])
    data = draw.choice(["\n", "\n", "\n", "\r\n", "\r"]).join("\t".join(row) for row in rows).encode("utf-8")
    if draw.random() < 0.2:
        at = draw.randrange(len(data) + 1)
        data = data[:at] + draw.choice(ODD_BYTES) + data[at:]
    return scramble(data, draw) if draw.random() < 0.2 else data


def check_glue(spec: GlueTask, data: GlueData) -> None:
    """What was read is usable: texts of the right number, labels within their range."""
    for split in (data.train, *data.dev.values()):
        assert split.examples
        for example in split.examples:
            assert len(example.texts) == len(spec.texts)
            assert all(isinstance(text, str) and "\n" not in text and "\t" not in text for text in example.texts)
            highest = 5 if spec.classes is None else spec.outputs - 1
            assert 0 <= example.label <= highest
            assert spec.classes is None or isinstance(example.label, int)
    text = "".join(text for example in data.train.examples for text in example.texts)
    text.encode("utf-8")
    assert len(data.sha256) == 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("tasks")
    for spec in GLUE.values():
        (place / spec.folder).mkdir()
        for name in ("train", *(name for _, name in spec.dev)):
            (place / spec.folder / f"{name}.tsv").write_text(file_text(spec.name, range(5)), encoding="utf-8")
    return place


@fuzz(600)
@given(seed=seeds, name=st.sampled_from(sorted(GLUE)))
def test_tables_of_glue(folder: Path, case: Callable, seed: int, name: str) -> None:
    draw, spec = random.Random(seed), GLUE[name]
    path = folder / spec.folder / draw.choice(["train.tsv", *(f"{dev}.tsv" for _, dev in spec.dev)])
    whole = path.read_text(encoding="utf-8")
    try:
        path.write_bytes(break_table(whole, draw))
        with case():
            check_glue(spec, read_glue(spec, folder, draw.choice([None, 1, 3, 99])))
    finally:
        path.write_text(whole, encoding="utf-8")


@fuzz(120)
@given(data=st.binary(max_size=120), name=st.sampled_from(sorted(GLUE)))
def test_any_bytes_as_a_table(folder: Path, case: Callable, data: bytes, name: str) -> None:
    spec = GLUE[name]
    path = folder / spec.folder / "train.tsv"
    whole = path.read_bytes()
    try:
        path.write_bytes(data)
        with case():
            check_glue(spec, read_glue(spec, folder))
    finally:
        path.write_bytes(whole)


@fuzz(150)
@given(
    rows=st.lists(
        st.tuples(st.text(st.characters(exclude_characters="\t\n\r", codec="utf-8")), st.booleans()), min_size=1
    )
)
def test_whatever_a_sentence_holds_it_comes_back(folder: Path, rows: list[tuple[str, bool]]) -> None:
    path = folder / "SST-2" / "train.tsv"
    whole = path.read_bytes()
    try:
        text = "sentence\tlabel\n" + "".join(f"{sentence}\t{int(label)}\n" for sentence, label in rows)
        path.write_bytes(text.encode("utf-8"))
        found = read_glue(GLUE["sst2"], folder).train.examples
        assert [(example.texts[0], bool(example.label)) for example in found] == rows
    finally:
        path.write_bytes(whole)


PAIR = {"document": "One. Two three.", "summary": "Two", "id": "1", "more": {"a": [1]}}


def check_xsum(place: Path) -> None:
    data = read_xsum(place)
    for pair in (*data.train.examples, *data.scored.examples):
        assert pair.document.strip()
        assert pair.summary.strip()
    assert len(data.sha256) == 64


@pytest.fixture
def xsum(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.getbasetemp() / "xsum-files"
    place.mkdir(exist_ok=True)
    (place / "test.jsonl").write_text(json.dumps(PAIR) + "\n")
    for kind in ("jsonl", "csv", "parquet"):
        (place / f"train.{kind}").unlink(missing_ok=True)
    return place


@fuzz(300)
@given(seed=seeds)
def test_xsum_as_jsonl(xsum: Path, case: Callable, seed: int) -> None:
    draw = random.Random(seed)
    lines = [to_text(mutate(PAIR, draw) if draw.random() < 0.5 else PAIR, draw) for _ in range(3)]
    (xsum / "train.jsonl").write_bytes(draw.choice([b"\n", b"\n\n", b"\r\n", b"\r"]).join(lines))
    with case():
        check_xsum(xsum)


@fuzz(200)
@given(seed=seeds)
def test_xsum_as_csv(xsum: Path, case: Callable, seed: int) -> None:
    draw = random.Random(seed)
    good = b'id,document,summary\n1,"One, ""two"".\nThree.",Two\n2,Four five,Five\n'
    (xsum / "train.jsonl").unlink(missing_ok=True)
    (xsum / "train.csv").write_bytes(scramble(good, draw))
    with case():
        check_xsum(xsum)


def columns(draw: random.Random) -> dict[str, list[Any]]:
    """Columns of a parquet file, of odd names and kinds."""
    kinds: list[list[Any]] = [
        ["a b", "c"],
        ["", "x"],
        [None, "x"],
        [1, 2],
        [[1], [2]],
        [{"a": 1}, {"a": 2}],
        [b"\xff", b"a"],
    ]
    names = ["document", "summary", draw.choice(["id", "", "Document", "\0", "x" * 500])]
    return {name: draw.choice(kinds) if draw.random() < 0.4 else kinds[0] for name in names if draw.random() < 0.9}


@fuzz(80)
@given(seed=seeds)
def test_xsum_as_parquet(xsum: Path, case: Callable, seed: int) -> None:
    draw = random.Random(seed)
    for kind in ("jsonl", "csv"):
        (xsum / f"train.{kind}").unlink(missing_ok=True)
    pq.write_table(pa.table(columns(draw)), xsum / "train.parquet")
    if draw.random() < 0.6:
        (xsum / "train.parquet").write_bytes(scramble((xsum / "train.parquet").read_bytes(), draw))
    with case():
        check_xsum(xsum)


SCORE = {"metrics": {"accuracy": 53.1, "f1": None}, "protocol": "dev", "note": "", "seconds": 1.5}
ENTRIES = {
    "task": "rte",
    "entries": [{"role": "mom", "seed": 0, "key": {"sha256": "0", "epochs": 3}, "score": SCORE}] * 2,
}
SPREAD = {"mean": 53.1, "deviation": 0.5, "values": [53.1]}
SUMMARIES = {"tasks": [{
    "task": "rte", "main": "accuracy", "shown": ["accuracy"], "higher_is_better": True, "limited": False, "seeds": [0],
    "covers": None, "baselines": [{"name": "majority", "how": "always", "metrics": {"accuracy": 50.0}}],
    "models": {role: {"metrics": {"accuracy": SPREAD}, "sha256": "0", "protocol": "dev", "notes": ["x"], "seconds": 1.0}
               for role in ("source", "mom")},
    "differences": {"mom": {"accuracy": {"difference": 1.0, "standard_error": None, "verdict": "one seed"}}},
}]}  # fmt: skip


@fuzz(200)
@given(seed=seeds)
def test_results_that_momify_keeps(tmp_path_factory: pytest.TempPathFactory, case: Callable, seed: int) -> None:
    draw, path = random.Random(seed), tmp_path_factory.getbasetemp() / "kept-scores.json"
    for tree, read in ((ENTRIES, read_results), (SUMMARIES, read_summaries)):
        path.write_bytes(to_text(mutate(tree, draw), draw))
        with case():
            read(path)
