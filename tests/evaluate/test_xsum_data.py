"""XSUM's files: three kinds give the same pairs, and what is wrong is named with its file and line."""

import csv
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from momify.errors import MomifyError
from momify.evaluate.xsum_data import Pair, read_xsum

ROWS = [
    {"id": str(i), "document": f'He said: "no, {i}".\nThen\u2028he, left; 50% of\tit.', "summary": f"Sum, {i}"}
    for i in range(6)
]


def write(folder: Path, name: str, rows: list[dict], kind: str = "jsonl") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    elif kind == "csv":
        with open(path, "w", encoding="utf-8", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("below", ["xsum", "."])
def test_each_kind_of_file_gives_the_pairs(kind: str, below: str, tmp_path: Path) -> None:
    write(tmp_path / below, "train", ROWS[:4], kind)
    write(tmp_path / below, "test", ROWS[4:], kind)
    data = read_xsum(tmp_path)
    assert data.train.examples == tuple(Pair(row["document"], row["summary"]) for row in ROWS[:4])
    assert (len(data.scored.examples), data.split, data.limited) == (2, "test", False)


def test_without_a_test_split_validation_is_scored_and_said(tmp_path: Path) -> None:
    write(tmp_path, "train", ROWS)
    write(tmp_path, "validation", ROWS[:3])
    assert read_xsum(tmp_path).split == "validation"


def test_limits(tmp_path: Path) -> None:
    write(tmp_path, "train", ROWS)
    write(tmp_path, "test", ROWS)
    some = read_xsum(tmp_path, limit=3, train_limit=5)
    assert (len(some.train.examples), len(some.scored.examples), some.limited) == (5, 3, True)
    assert read_xsum(tmp_path, limit=3).sha256 == read_xsum(tmp_path, limit=3).sha256 != some.sha256


def broken(tmp_path: Path, text: str, kind: str = "jsonl") -> str:
    (tmp_path / f"train.{kind}").write_bytes(text.encode("utf-8", "surrogateescape"))
    write(tmp_path, "test", ROWS)
    with pytest.raises(MomifyError) as caught:
        read_xsum(tmp_path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_errors_name_file_and_line(tmp_path: Path) -> None:
    good = json.dumps(ROWS[0]) + "\n"
    assert "train.jsonl line 2 is not JSON" in broken(tmp_path, good + "{\n")
    assert "train.jsonl line 2 holds a list" in broken(tmp_path, good + "[1]\n")
    said = broken(tmp_path, good + '{"document": "a", "sum": "b"}\n')
    assert "train.jsonl line 2 has no column 'summary'; it has: document, sum" in said
    assert "line 1: summary is a int" in broken(tmp_path, '{"document": "a", "summary": 3}\n')
    assert "line 2: document is empty" in broken(tmp_path, good + '{"document": " ", "summary": "b"}\n')
    assert "line 1 is not UTF-8" in broken(tmp_path, '{"document": "\udcff"}\n')
    assert "holds no pairs" in broken(tmp_path, "\n\n")
    (tmp_path / "train.jsonl").unlink()
    assert "train.csv line 2 has no column 'summary'" in broken(tmp_path, "document,id\na,b\n", "csv")
    assert "train.csv line 2: summary is missing" in broken(tmp_path, "document,summary\na\n", "csv")
    said = broken(tmp_path, "document,summary\na,b\nc,d, and more\n", "csv")
    assert said.endswith('train.csv line 3 has 3 columns instead of 2; quote texts by "')
    assert "is not CSV" in broken(tmp_path, 'document,summary\n"a"b,c\n', "csv")
    (tmp_path / "train.csv").unlink()
    assert "train.parquet is not a parquet file" in broken(tmp_path, "PAR1 no", "parquet")


def test_long_cells_are_read_and_the_process_keeps_its_limit(tmp_path: Path) -> None:
    limit, long = csv.field_size_limit(), {"document": "a " * 100_000, "summary": "b"}
    write(tmp_path, "train", [long], "csv")
    write(tmp_path, "test", [long], "csv")
    assert read_xsum(tmp_path).train.examples == (Pair(long["document"], "b"),)
    assert csv.field_size_limit() == limit


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(MomifyError, match=r"xsum: .*/train\.jsonl does not exist, nor as csv or parquet"):
        read_xsum(tmp_path)
    write(tmp_path / "xsum", "train", ROWS)
    with pytest.raises(MomifyError, match=r"xsum: .*/xsum/test\.jsonl does not exist"):
        read_xsum(tmp_path)


def test_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {"document": ["a", " "], "summary": ["b", "c"], "id": ["1", "2"]}
    monkeypatch.setattr("datasets.load_dataset", lambda *a, **k: Dataset.from_dict(rows))
    assert read_xsum(None).train.examples == (Pair("a", "b"),)
    rows["document"] = ["", ""]
    with pytest.raises(MomifyError, match="holds no pairs"):
        read_xsum(None)


def test_the_real_files(shared_data: Path) -> None:
    data = read_xsum(shared_data)
    assert (len(data.train.examples), len(data.scored.examples)) == (1002, 1924)
