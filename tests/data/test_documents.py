"""data/documents.py: files of every kind in, documents out, mistakes named."""

import json
import logging
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pytest
from datasets import Dataset
from pyarrow import parquet

from momify.data import documents
from momify.data.documents import LINES_WITHOUT_SEPARATOR, read_corpus
from momify.errors import MomifyError
from momify.recipe_blocks import DataBlock


def texts(*names: object, **more: object) -> list[str]:
    return read_corpus(DataBlock(train=[str(name) for name in names], **more)).train["text"]


def test_txt_is_split_at_separator_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\ntwo\n<|endoftext|>\n\n<|endoftext|>\n three <|endoftext|> here\n")
    assert list(texts(path)) == ["one\ntwo\n", " three <|endoftext|> here\n"]


def test_txt_without_separators_is_cut_by_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    lines = [f"line {i}\n" for i in range(2 * LINES_WITHOUT_SEPARATOR + 5)]
    path.write_text("".join(lines))
    found = list(texts(path))
    assert len(found) == 3
    assert "".join(found) == "".join(lines)


@pytest.mark.parametrize(
    ("text", "ends"),
    [
        ("x" * 250, [100, 200, 250]),  # one line
        (("y" * 39 + "\n") * 7, [120, 240, 280]),  # at an end of a line
        ("a\n<|endoftext|>\n" + ("z" * 59 + "\n") * 3, [2, 122, 182]),
    ],
)
def test_very_long_txt_documents_are_cut(
    tmp_path: Path, text: str, ends: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.txt"
    path.write_text(text)
    assert len(texts(path)) == 1 + text.count("<|")  # nothing is cut by default; what is cached then is not used below
    monkeypatch.setattr(documents, "MOST_CHARACTERS", 100)
    whole = text.replace("<|endoftext|>\n", "")
    assert list(texts(path)) == [whole[start:end] for start, end in pairwise([0, *ends])]


def test_bytes_that_are_not_utf8_are_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"caf\xe9 ol\xc3\xa9\n")
    assert list(texts(path)) == ["caf\ufffd olé\n"]


def test_jsonl_parquet_and_columns(tmp_path: Path) -> None:
    rows = [{"body": "a", "n": 1}, {"body": "b", "n": 2}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        assert list(texts(tmp_path / name, column="body")) == ["a", "b"]
        with pytest.raises(MomifyError, match=r"no column 'text'; set data.column to one of body, n"):
            texts(tmp_path / name)
        with pytest.raises(MomifyError, match="int64, not text"):
            texts(tmp_path / name, column="n")


def test_changed_file_is_read_again_and_hashes_differ(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old\n")
    first = read_corpus(DataBlock(train=[str(path)]))
    path.write_text("new\n")
    second = read_corpus(DataBlock(train=[str(path)]))
    assert (list(first.train["text"]), list(second.train["text"])) == (["old\n"], ["new\n"])
    assert first.sha256 != second.sha256


def test_valid_files_are_part_of_the_hash(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.txt").write_text(f"{name}\n")
    one = read_corpus(DataBlock(train=str(tmp_path / "a.txt"), valid=str(tmp_path / "b.txt")))
    two = read_corpus(DataBlock(train=str(tmp_path / "a.txt"), valid=str(tmp_path / "c.txt")))
    assert list(one.valid["text"]) == ["b\n"]
    assert one.sha256 != two.sha256


@pytest.mark.parametrize(
    ("content", "name", "words"),
    [
        (None, "no.txt", "does not exist"),
        (b"", "empty.txt", "no documents"),
        (b"\n \n", "blank.txt", "no documents"),
        (b"", "empty.jsonl", "no documents"),
        (b"{not json", "bad.jsonl", "cannot be read"),
        (b"PAR1 nothing", "bad.parquet", "cannot be read"),
        (b"x", "a.csv", "one kind"),
        (None, "x" * 300 + ".txt", "does not exist"),
    ],
)
def test_mistakes_name_the_file(
    tmp_path: Path, content: bytes | None, name: str, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    datasets_logger = logging.getLogger("datasets")
    level = datasets_logger.level
    datasets_logger.addHandler(caplog.handler)  # it hands nothing to the root's
    try:
        with pytest.raises(MomifyError, match=words) as caught:
            texts(tmp_path / name)
    finally:
        datasets_logger.removeHandler(caplog.handler)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not caplog.records, "the line of the readers underneath would stand beside momify's"
    assert datasets_logger.level == level


@pytest.mark.parametrize("name", ["latin.jsonl", "latin.parquet"])
def test_text_that_is_not_utf_8_is_refused_before_a_row_is_read(tmp_path: Path, name: str) -> None:
    values = [b"good", "caf\u00e9".encode("latin-1")]
    if name.endswith("jsonl"):
        (tmp_path / name).write_bytes(b"".join(b'{"text": "%s"}\n' % value for value in values))
    else:
        parquet.write_table(pa.table({"text": pa.array(values).view(pa.string())}), tmp_path / name)
    with pytest.raises(MomifyError, match=r"column 'text' is not UTF-8 .*index 1") as caught:
        texts(tmp_path / name)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_name_is_no_pattern(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "a [b]*"
    folder.mkdir()
    (folder / "c[12].jsonl").write_text('{"text": "right"}\n')
    (folder / "c1.jsonl").write_text('{"text": "wrong"}\n')
    monkeypatch.chdir(folder)
    for name in (folder / "c[12].jsonl", "c[12].jsonl"):
        assert list(texts(name)) == ["right"]


def test_the_builtin_text_as_held_out_text_is_what_it_holds_out() -> None:
    corpus = read_corpus(DataBlock(train=["builtin:demo"], valid=["builtin:demo"]))
    assert not set(corpus.valid["text"]) & set(corpus.train["text"])
    assert list(corpus.valid["text"]) == list(read_corpus(DataBlock(train=["builtin:demo"])).valid["text"])


def test_mixed_kinds_and_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a\n")
    (tmp_path / "b.jsonl").write_text('{"text": "b"}\n')
    (tmp_path / "c.txt").mkdir()
    with pytest.raises(MomifyError, match="one kind"):
        texts(tmp_path / "a.txt", tmp_path / "b.jsonl")
    with pytest.raises(MomifyError, match="is not a file"):
        texts(tmp_path / "c.txt")


def test_an_empty_list_is_told_as_one() -> None:
    with pytest.raises(MomifyError, match=r"data\.train is an empty list"):
        texts()


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="no file at hand that gives an input/output error")
def test_a_file_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").symlink_to("/proc/self/mem")
    with pytest.raises(MomifyError, match=r"a\.txt cannot be read: Input/output error; check its rights"):
        texts(tmp_path / "a.txt")


def test_a_full_disk_under_the_cache_is_no_unreadable_text(tmp_path: Path, files_of_at_most: Callable) -> None:
    path = tmp_path / "a.txt"
    path.write_text("a cat sat on a mat\n" * 20_000)
    told = r"cannot write .*/datasets: File too large; free space or set HF_DATASETS_CACHE"
    with files_of_at_most(100_000), pytest.raises(MomifyError, match=told):
        texts(path)


@pytest.mark.parametrize("name", ["nobody/nothing-of-this-name", "x" * 300])
def test_hub_name_without_network_says_what_to_do(name: str) -> None:
    with pytest.raises(MomifyError, match="neither a file here nor a dataset"):
        texts(name)
