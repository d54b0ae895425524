"""GLUE files: each layout is read as published, and what is wrong is named with its file and line."""

from pathlib import Path

import pytest
from datasets import Dataset

from momify.errors import MomifyError
from momify.evaluate.glue_data import Example, missing_file, read_glue
from momify.evaluate.glue_tasks import GLUE

from .conftest import Write, file_text


@pytest.mark.parametrize("name", GLUE)
def test_each_task_is_read_in_its_own_layout(name: str, write_glue: Write) -> None:
    data = read_glue(GLUE[name], write_glue(name))
    assert len(data.train.examples) == 24
    assert list(data.dev) == (["_m", "_mm"] if name == "mnli" else [""])
    spec = GLUE[name]
    for place, example in enumerate(data.train.examples):
        assert len(example.texts) == len(spec.texts)
        assert example.label == (place % spec.outputs if spec.classes else place % 6)
        assert all(" " in text and "\t" not in text for text in example.texts)


def test_quotes_carriage_returns_marks_and_odd_separators_are_text(tmp_path: Path) -> None:
    folder = tmp_path / "SST-2"
    folder.mkdir()
    rows = 'sentence\tlabel\r\n" an open quote\t1\r\n\'tis "fine\u2028here\u0085\x0b\t0\r\n'
    for name in ("train", "dev"):
        (folder / f"{name}.tsv").write_bytes(b"\xef\xbb\xbf" + rows.encode())
    found = read_glue(GLUE["sst2"], tmp_path).train.examples
    assert found == (Example(('" an open quote',), 1), Example(("'tis \"fine\u2028here\u0085\x0b",), 0))


def test_a_limit_draws_the_same_examples_in_order_and_is_marked(write_glue: Write) -> None:
    folder = write_glue("rte", train=50, dev=30)
    whole, some = read_glue(GLUE["rte"], folder), read_glue(GLUE["rte"], folder, limit=10)
    assert not whole.limited
    assert some.limited
    assert (len(some.train.examples), len(some.dev[""].examples)) == (10, 10)
    places = [whole.train.examples.index(example) for example in some.train.examples]
    assert places == sorted(places)
    assert places != list(range(10))
    assert read_glue(GLUE["rte"], folder, limit=10).sha256 == some.sha256 != whole.sha256
    train_only = read_glue(GLUE["rte"], folder, limit=10, train_limit=40)
    assert (len(train_only.train.examples), len(train_only.dev[""].examples)) == (40, 10)


def broken(text: str, tmp_path: Path, name: str = "rte") -> str:
    """The error for a training file of this text."""
    folder = tmp_path / GLUE[name].folder
    folder.mkdir(exist_ok=True)
    (folder / "train.tsv").write_bytes(text.encode("utf-8", "surrogateescape"))
    (folder / "dev.tsv").write_text(file_text(name, range(3)))
    with pytest.raises(MomifyError) as caught:
        read_glue(GLUE[name], tmp_path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_errors_name_file_and_line(tmp_path: Path) -> None:
    head = "index\tsentence1\tsentence2\tlabel\n"
    said = broken(head + "0\ta\tb\tentailment\n1\ta\tb\tperhaps\n", tmp_path)
    assert "RTE/train.tsv line 3: label is 'perhaps'" in said
    assert "entailment, not_entailment" in said
    assert "train.tsv line 2 has 3 columns instead of 4" in broken(head + "0\ta\tb\n", tmp_path)
    assert "line 2 has 5 columns" in broken(head + "0\ta\tb\tentailment\tx\n", tmp_path)
    said = broken("index\tsentence1\tsentence2\n0\ta\tb\n", tmp_path)
    assert "train.tsv has no column 'label' in its first line; it has: index, sentence1, sentence2" in said
    assert "holds no examples" in broken(head, tmp_path)
    assert "has no column" in broken("", tmp_path)
    assert "line 2 is not UTF-8" in broken(head + "0\ta\udcff\tb\tentailment\n", tmp_path)
    assert "line 2 has 1 columns" in broken(head + "\n0\ta\tb\tentailment\n", tmp_path)


@pytest.mark.parametrize("number", ["x", "nan", "inf", "-1", "5.01", "", "1e400"])
def test_a_similarity_is_a_number_from_0_to_5(number: str, tmp_path: Path) -> None:
    good = file_text("stsb", range(3))
    said = broken(good.replace("1.000", number), tmp_path, "stsb")
    assert "STS-B/train.tsv line 3: score is" in said
    assert "not a number from 0 to 5" in said


def test_qqp_passes_over_the_short_rows_it_is_known_for(write_glue: Write) -> None:
    folder = write_glue("qqp")
    path = folder / "glue" / "QQP" / "train.tsv"
    path.write_text(path.read_text() + "9\t1\t2\tcut off\n")
    assert len(read_glue(GLUE["qqp"], folder).train.examples) == 24


def test_a_missing_file_is_named(write_glue: Write) -> None:
    folder = write_glue("rte")
    (folder / "glue" / "RTE" / "dev.tsv").unlink()
    assert missing_file(GLUE["rte"], folder) == folder / "glue" / "RTE" / "dev.tsv"
    with pytest.raises(
        MomifyError, match=r"rte: .*glue/RTE/dev\.tsv does not exist; --data-dir must hold RTE/dev\.tsv"
    ):
        read_glue(GLUE["rte"], folder)


def test_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(name: str, configuration: str, split: str) -> Dataset:
        asked.append((name, configuration, split))
        return Dataset.from_dict({"premise": ["a b", "c"], "hypothesis": ["d", "e"], "label": [2, 0]})

    monkeypatch.setattr("datasets.load_dataset", load)
    data = read_glue(GLUE["mnli"], None)
    assert data.train.examples == (Example(("a b", "d"), 2), Example(("c", "e"), 0))
    assert [split for *_, split in asked] == ["train", "validation_matched", "validation_mismatched"]
    monkeypatch.setattr("datasets.load_dataset", lambda *a, **k: Dataset.from_dict(
        {"sentence1": ["a"], "sentence2": ["b"], "label": [-1]}))  # fmt: skip
    with pytest.raises(MomifyError, match=r"rte train, row 1: label is '-1', which is no label of rte"):
        read_glue(GLUE["rte"], None)


def test_without_a_network_one_line_says_what_to_give(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*arguments: object, **keywords: object) -> Dataset:
        raise ConnectionError("Couldn't reach\nthe hub")

    monkeypatch.setattr("datasets.load_dataset", load)
    with pytest.raises(
        MomifyError, match=r"^the hub did not give nyu-mll/glue rte train \(Couldn't reach the hub\); give"
    ):
        read_glue(GLUE["rte"], None)


def test_the_real_files_have_the_published_sizes(shared_data: Path) -> None:
    sizes = {"cola": (8551, 1043), "sst2": (67349, 872), "mrpc": (3668, 408), "rte": (2490, 277), "stsb": (5749, 1500),
             "wnli": (635, 71)}  # fmt: skip
    for name, (train, dev) in sizes.items():
        data = read_glue(GLUE[name], shared_data)
        assert (len(data.train.examples), len(data.dev[""].examples)) == (train, dev)
