"""data/stream.py, hub.py, cache.py: streams become token files, also when they break off; real streaming datasets,
read from local parquet files in the place of the hub."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import datasets
import numpy as np
import pytest
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerFast

from momify.data import hub, stream
from momify.data.blocks import cache_folder, load_tokens
from momify.data.cache import making
from momify.data.documents import read_corpus
from momify.data.stream import Limits, is_held_out
from momify.errors import MomifyError
from momify.recipe_blocks import DataBlock

DOCUMENTS = [f"the cat {i} sat on the mat " * (i % 7) for i in range(3000)]
NAME = "someone/texts"


class Hub:
    """Stands in for the hub: one dataset of three parquet files, which may be made to break off or be unreachable."""

    def __init__(self, folder: Path) -> None:
        self.files = [str(folder / f"{shard}.parquet") for shard in range(3)]
        for shard, path in enumerate(self.files):
            rows = [{"id": i, "body": text} for i, text in enumerate(DOCUMENTS[shard::3])]
            Dataset.from_list(rows).to_parquet(path, batch_size=300)
        self.reachable, self.opened, self.break_after = True, 0, None

    def dataset_info(self, name: str) -> "Hub":
        if not self.reachable or name != NAME:
            raise ConnectionError("no route to the hub")
        return self

    sha = "0123abcd"

    def load_dataset(self, name: str, revision: str, split: str, streaming: bool) -> IterableDataset:
        assert (name, revision, split, streaming) == (NAME, self.sha, "train", True)
        self.opened += 1
        data = datasets.load_dataset("parquet", data_files=self.files, split="train", streaming=True)
        return data if self.break_after is None else Breaking(data, self.break_after)


class Breaking:
    """A stream whose network goes after so many batches."""

    def __init__(self, data: IterableDataset, batches: int) -> None:
        self.data, self.batches = data, batches

    def __getattr__(self, name: str) -> object:
        return getattr(self.data, name)

    def select_columns(self, names: list[str]) -> "Breaking":
        return Breaking(self.data.select_columns(names), self.batches)

    def rename_column(self, old: str, new: str) -> "Breaking":
        return Breaking(self.data.rename_column(old, new), self.batches)

    def iter(self, size: int) -> Iterator[dict]:
        for number, batch in enumerate(self.data.iter(size)):
            if number == self.batches:
                raise ConnectionError("connection reset")
            yield batch


@pytest.fixture
def the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    found = Hub(tmp_path)
    monkeypatch.setattr(hub, "load_dataset", found.load_dataset)
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: found)
    return found


def block(**more: object) -> DataBlock:
    return DataBlock(train=NAME, column="body", block_length=8, **more)


def streamed_texts() -> list[str]:
    return [text for shard in range(3) for text in DOCUMENTS[shard::3] if text]


def test_every_document_goes_whole_into_one_part_in_order(the_hub: Hub, tokenizer: PreTrainedTokenizerFast) -> None:
    data = load_tokens(block(), tokenizer)
    held = {text for text in streamed_texts() if is_held_out(text, 0.01)}
    expected = {"train": [], "valid": []}
    for text in streamed_texts():
        part = expected["valid" if text in held else "train"]
        part.extend([*tokenizer(text)["input_ids"], tokenizer.eos_token_id])
    assert data.train.tolist() == expected["train"]
    assert data.valid.tolist() == expected["valid"]
    assert 5 < len(held) < 80  # a hundredth of 3,000 documents, about


def test_limits_cut_and_what_is_held_out_is_never_trained_on(the_hub: Hub, tokenizer: PreTrainedTokenizerFast) -> None:
    whole = load_tokens(block(), tokenizer)
    cut = load_tokens(block(valid_tokens=40, train_tokens=5000), tokenizer)
    assert cut.train.tolist() == whole.train[:5000].tolist()
    assert cut.valid.tolist() == whole.valid[:40].tolist()
    assert Limits(4_000_000).share == 0.01
    assert Limits(4_000_000, 10**12).share == 0.01
    assert Limits(100, 2000).share == 0.05
    assert Limits(4_000_000, 1000).share == 0.1
    assert Limits(0, 1000).share == 0


def test_a_stream_that_breaks_off_is_told_whatever_it_is_read_for(
    the_hub: Hub, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    (tmp_path / "t.txt").write_text("the cat sat on the mat\n" * 99)
    the_hub.break_after = 2
    told = r"broke off after 4\d\d of them \(connection reset\); start the same again"  # 512 less those that are empty
    with pytest.raises(MomifyError, match=told):  # held-out text
        load_tokens(DataBlock(train=str(tmp_path / "t.txt"), valid=NAME, column="body", block_length=8), tokenizer)
    with pytest.raises(MomifyError, match=told):  # what a tokenizer is learned from
        list(read_corpus(block()).texts())


def test_held_out_text_of_ones_own_leaves_the_stream_whole(
    the_hub: Hub, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    (tmp_path / "v.jsonl").write_text("".join(json.dumps({"body": f"the mat {i}"}) + "\n" for i in range(9)))
    data = load_tokens(block(valid=str(tmp_path / "v.jsonl")), tokenizer)
    assert (data.train == tokenizer.eos_token_id).sum() == len(streamed_texts())
    assert (data.valid == tokenizer.eos_token_id).sum() == 9


def test_broken_stream_goes_on_to_the_same_bytes(
    the_hub: Hub, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "_SAVE_EVERY", 1500)
    monkeypatch.setattr(stream, "BATCH", 64)
    whole = load_tokens(block(), tokenizer)
    folder = cache_folder() / "tokens" / f"{whole.sha256}-2"
    expected = {name: (folder / name).read_bytes() for name in ("train.bin", "valid.bin", "meta.json")}
    monkeypatch.setenv("MOMIFY_CACHE", str(folder.parents[1] / "again"))
    part, come = cache_folder() / "tokens" / f"{whole.sha256}-2.part", []
    for batches in (0, 9, 3, 20, 1):
        the_hub.break_after = batches
        with pytest.raises(MomifyError, match="what is there of the training text is kept") as caught:
            load_tokens(block(), tokenizer)
        come.append(int(str(caught.value).split(" after ")[1].split(" of")[0].replace(",", "")))
        with open(part / "train.bin", "ab") as torn:  # what a kill leaves behind the last note
            torn.write(b"\x01\x02\x03")
    assert come == sorted(come)
    assert come[-1] > 30 * 64 * 0.8  # 33 batches in all, a seventh of the documents is empty
    the_hub.break_after = None
    load_tokens(block(), tokenizer)
    again = cache_folder() / "tokens" / f"{whole.sha256}-2"
    assert {name: (again / name).read_bytes() for name in expected} == expected
    assert sorted(path.name for path in again.iterdir()) == ["meta.json", "train.bin", "valid.bin"]


@pytest.mark.parametrize("tokens", [2000, 100_000])  # within what is held back before it is written, and beyond
def test_a_full_disk_is_told(
    the_hub: Hub, tokenizer: PreTrainedTokenizerFast, files_of_at_most: Callable, tokens: int
) -> None:
    with files_of_at_most(3000), pytest.raises(MomifyError, match=r"cannot write .*train\.bin: File too large"):
        load_tokens(block(train_tokens=tokens), tokenizer)


def test_finished_data_needs_no_network_and_no_second_reading(the_hub: Hub, tokenizer: PreTrainedTokenizerFast) -> None:
    first = load_tokens(block(), tokenizer)
    opened = the_hub.opened
    the_hub.reachable = False
    again = load_tokens(block(), tokenizer)
    assert np.array_equal(first.train, again.train)
    assert the_hub.opened == opened


def test_another_revision_is_other_data(the_hub: Hub, tokenizer: PreTrainedTokenizerFast) -> None:
    first = load_tokens(block(), tokenizer).sha256
    the_hub.sha = "89ef"
    assert load_tokens(block(), tokenizer).sha256 != first


@pytest.mark.parametrize(
    ("column", "words"),
    [("text", "has no column 'text'; set data.column to one of id, body"), ("id", "column 'id' holds int64, not text")],
)
def test_wrong_column_is_named(the_hub: Hub, tokenizer: PreTrainedTokenizerFast, column: str, words: str) -> None:
    with pytest.raises(MomifyError, match=words):
        load_tokens(DataBlock(train=NAME, column=column, block_length=8), tokenizer)


def test_tokenizer_is_learned_from_the_first_documents(the_hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("momify.data.documents.LEARNED_FROM", 50)
    assert list(read_corpus(block()).texts()) == [text for text in DOCUMENTS[0::3] if text][:50]


def test_progress_is_told(the_hub: Hub, tokenizer: PreTrainedTokenizerFast) -> None:
    told = []
    data = load_tokens(block(train_tokens=9000), tokenizer, progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (len(data.train), 9000) == (9000, 9000)
    assert [done for done, _ in told] == sorted(done for done, _ in told)


def test_work_is_removed_after_an_error_or_kept_as_asked(tmp_path: Path) -> None:
    for keep in (False, True):
        folder = tmp_path / str(keep)
        with suppress(ZeroDivisionError), making(folder, keep) as part:
            (part / "a").write_text("half")
            raise ZeroDivisionError
        assert not folder.exists()
        assert (tmp_path / f"{keep}.part" / "a").exists() == keep
        with making(folder, keep) as part:
            assert [path.name for path in part.iterdir()] == (["a"] if keep else [])
        with making(folder, keep) as part:
            assert part is None


def test_second_process_waits_and_finds_the_work_done(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from momify.data.cache import making\n"
        "print('asking', flush=True)\n"
        "with making(Path(sys.argv[1]), False) as part: print(part, flush=True)\n"
    )
    with making(tmp_path / "x", False) as part:
        other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "x")], stdout=subprocess.PIPE, text=True)
        assert other.stdout.readline() == "asking\n"
        (part / "a").write_text("whole")
    assert other.communicate(timeout=60)[0] == "None\n"
    assert (tmp_path / "x" / "a").read_text() == "whole"
