"""data/blocks.py: every token once, held-out documents whole, the cache keyed by content."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from momify.data import stream
from momify.data.blocks import (
    NOT_SCORED,
    SplicedBlocks,
    TokenBlocks,
    TokenData,
    cache_folder,
    load_tokens,
    split_by_document,
)
from momify.errors import MomifyError
from momify.recipe_blocks import DataBlock


def write(path: Path, count: int) -> Path:
    path.write_text("\n<|endoftext|>\n".join(f"the cat {i} sat on the mat" for i in range(count)))
    return path


def test_tokens_are_the_tokenizers_with_an_end_behind_each_document(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = write(tmp_path / "a.txt", 30)
    data = load_tokens(DataBlock(train=[str(path)], block_length=8), tokenizer)
    documents = [f"the cat {i} sat on the mat\n" for i in range(29)] + ["the cat 29 sat on the mat"]
    expected = Counter(tuple(tokenizer(text)["input_ids"]) for text in documents)
    found: Counter = Counter()
    for flat in (data.train, data.valid):
        for row in np.split(flat, np.flatnonzero(flat == tokenizer.eos_token_id) + 1)[:-1]:
            found[tuple(row[:-1].tolist())] += 1
    assert found == expected  # each document whole, in one of the two parts, once


def test_blocks_are_consecutive_and_drop_the_rest() -> None:
    blocks = TokenBlocks(np.arange(23, dtype=np.uint16), 5)
    assert len(blocks) == 4
    rows = torch.cat([blocks[i]["input_ids"] for i in range(4)])
    assert rows.tolist() == list(range(20))
    assert blocks[2]["labels"].dtype == torch.int64
    with pytest.raises(IndexError):
        blocks[4]


@settings(max_examples=50, deadline=None)
@given(length=st.integers(2, 12), count=st.integers(1, 30), rest=st.integers(0, 11), pieces=st.integers(1, 15))
def test_spliced_blocks_hold_every_token_once_where_it_was(length: int, count: int, rest: int, pieces: int) -> None:
    """Against the text cut by hand: no place of a block loses or gains a token, pieces are whole and from far apart."""
    tokens = np.arange(length * count + min(rest, length - 1), dtype=np.int32)
    spliced = SplicedBlocks(tokens, length, pieces)
    assert len(spliced) == count
    rows = torch.stack([spliced[index]["input_ids"] for index in range(count)])
    assert torch.equal(rows.sort(dim=0).values, torch.arange(length * count).view(count, length))
    places = max(1, min(pieces, length // 2))  # of two tokens or more
    for index in range(count):
        labels = spliced[index]["labels"]
        ends = [piece * length // places for piece in range(places + 1)]
        origins = [(rows[index, start:end] // length).unique().tolist() for start, end in pairwise(ends)]
        assert all(len(origin) == 1 for origin in origins)  # a piece is of one block
        assert origins[0] == [index]
        assert len({origin[0] for origin in origins}) == min(places, count)  # as many places as there can be
        assert spliced[index]["block"].tolist() == [origin[0] for origin in origins]
        kept = torch.ones(length, dtype=torch.bool)
        kept[ends[1:-1]] = False
        assert torch.equal(labels[kept], rows[index][kept])
        assert (labels[~kept] == NOT_SCORED).all()


def test_one_piece_is_the_text_as_it_stands() -> None:
    data = TokenData(np.arange(40, dtype=np.uint16), np.arange(8, dtype=np.uint16), 8, "0")
    assert torch.equal(data.spliced_blocks(1)[3]["labels"], data.train_blocks[3]["input_ids"])
    assert not torch.equal(data.spliced_blocks(2)[3]["input_ids"], data.train_blocks[3]["input_ids"])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=st.lists(st.integers(0, 60), min_size=1, max_size=40), wanted=st.integers(1, 400))
def test_split_is_by_document_and_bounded(lengths: list[int], wanted: int) -> None:
    rows = [f"{i} " + "x" * n for i, n in enumerate(lengths)]
    documents = Dataset.from_dict({"text": rows})
    train, valid = split_by_document(documents, wanted, len)
    assert sorted([*train["text"], *valid["text"]]) == sorted(rows)
    held = list(valid["text"])
    assert len(held) >= (len(rows) > 1)
    assert list(train["text"]) == [row for row in rows if row not in held]  # order kept
    if len(held) > 1:  # never more than one document beyond what was asked, and at most a tenth
        assert sum(map(len, held)) <= 0.1 * sum(map(len, rows))
        assert sum(map(len, held)) - max(map(len, held)) < wanted


def test_split_does_not_depend_on_the_order_of_documents() -> None:
    rows = [f"{i} some words" for i in range(200)]
    one = split_by_document(Dataset.from_dict({"text": rows}), 50, len)[1]["text"]
    other = split_by_document(Dataset.from_dict({"text": rows[::-1]}), 50, len)[1]["text"]
    assert sorted(one) == sorted(other)


def test_cache_is_used_and_follows_the_content(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write(tmp_path / "a.txt", 30)
    block = DataBlock(train=[str(path)], block_length=8)
    first = load_tokens(block, tokenizer)
    folder = cache_folder() / "tokens" / f"{first.sha256}-2"
    stamp = (folder / "train.bin").stat().st_mtime_ns
    longer = load_tokens(block.model_copy(update={"block_length": 16}), tokenizer)
    assert longer.sha256 == first.sha256  # the block length is not part of what is cached
    assert (folder / "train.bin").stat().st_mtime_ns == stamp
    write(path, 31)
    assert load_tokens(block, tokenizer).sha256 != first.sha256


def test_files_in_another_order_are_other_tokens(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """The order decides which text `train_tokens` cuts off."""
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(f"the {name} sat on the mat " * 20)
    for names in ("ab", "ba", "ab"):
        paths = [str(tmp_path / f"{name}.txt") for name in names]
        block = DataBlock(train=paths, valid=[str(tmp_path / "c.txt")], train_tokens=40, block_length=8)
        expected = tokenizer(Path(paths[0]).read_text())["input_ids"][:40]
        assert load_tokens(block, tokenizer).train.tolist() == expected


def test_empty_documents_add_no_tokens(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [""] * stream.BATCH + ["the cat"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    (tmp_path / "v.jsonl").write_text('{"text": "the mat"}\n')
    block = DataBlock(train=[str(tmp_path / "a.jsonl")], valid=[str(tmp_path / "v.jsonl")], block_length=2)
    expected = [*tokenizer("the cat")["input_ids"], tokenizer.eos_token_id]
    assert load_tokens(block, tokenizer).train.tolist() == expected


def test_few_characters_are_tokenised_at_once_to_the_same_tokens(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = [3, 700, 90, 5, 40, 499, 1, 501, 2, 2]
    rows = [{"text": ("the cat sat on the mat " * 40)[:length]} for length in lengths * 3]
    for name in ("a.jsonl", "v.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    block = DataBlock(train=[str(tmp_path / "a.jsonl")], valid=[str(tmp_path / "v.jsonl")], block_length=8)
    whole = load_tokens(block, tokenizer)
    groups, call = [], type(tokenizer).__call__

    def watched(self: PreTrainedTokenizerFast, texts: list[str], **how: object) -> object:
        groups.append(list(map(len, texts)))
        return call(self, texts, **how)

    monkeypatch.setattr(type(tokenizer), "__call__", watched)
    monkeypatch.setattr(stream, "_TOKENISED_AT_ONCE", 500)
    monkeypatch.setenv("MOMIFY_CACHE", str(tmp_path / "again"))
    again = load_tokens(block, tokenizer)
    assert all(sum(group) <= 500 or len(group) == 1 for group in groups)
    assert list(chain.from_iterable(groups)) == lengths * 6
    assert len(groups) < len(lengths) * 6
    assert (again.train.tolist(), again.valid.tolist()) == (whole.train.tolist(), whole.valid.tolist())


def test_highest_token_is_noted(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    block = DataBlock(train=[str(write(tmp_path / "a.txt", 30))], block_length=8)
    data = load_tokens(block, tokenizer)
    assert data.noted == data.highest == max(*data.train.tolist(), *data.valid.tolist())
    assert TokenData(np.array([1, 7]), np.zeros(0, int), 2, "0").highest == 7


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:10])


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        ("train.bin", cut, r"train\.bin is not as long as written"),
        ("valid.bin", Path.unlink, r"No such file .*valid\.bin"),
        ("meta.json", Path.unlink, r"No such file .*meta\.json"),
        ("meta.json", cut, "Expecting|Unterminated"),
        ("meta.json", lambda path: path.write_text('{"dtype": "uint16"}'), "train"),
    ],
)
def test_damaged_cache_is_named_and_made_again(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, name: str, damage: Callable[[Path], object], words: str
) -> None:
    block = DataBlock(train=[str(write(tmp_path / "a.txt", 30))], block_length=8)
    data = load_tokens(block, tokenizer)
    folder, before = cache_folder() / "tokens" / f"{data.sha256}-2", data.train.tolist()
    damage(folder / name)
    with pytest.raises(MomifyError, match=words) as caught:
        load_tokens(block, tokenizer)
    assert f"cached tokens {folder}: " in str(caught.value)
    assert str(caught.value).endswith("; remove that folder, it is made again")
    shutil.rmtree(folder)
    assert load_tokens(block, tokenizer).train.tolist() == before


def test_too_little_text_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write(tmp_path / "a.txt", 3)
    with pytest.raises(MomifyError, match="less than one block of 1024"):
        load_tokens(DataBlock(train=[str(path)]), tokenizer)


def test_text_of_one_document_says_how_to_hold_some_out(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "a.txt"
    path.write_text("a cat sat on a mat\n" * 99)
    with pytest.raises(MomifyError, match=r"a\.txt leaves nothing to be held out; set data\.valid, or"):
        load_tokens(DataBlock(train=[str(path)], block_length=8), tokenizer)


def test_valid_file_and_its_limit(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    train, valid = write(tmp_path / "a.txt", 30), write(tmp_path / "b.txt", 20)
    block = DataBlock(train=[str(train)], valid=[str(valid)], valid_tokens=50, block_length=8)
    data = load_tokens(block, tokenizer)
    assert len(data.valid) == 50
    assert tokenizer.decode(data.valid[:3]) in valid.read_text()
    assert data.valid_tensor(7).tolist() == data.valid[:7].tolist()


def test_spread_blocks_cover_the_text(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    data = load_tokens(DataBlock(train=[str(write(tmp_path / "a.txt", 80))], block_length=8), tokenizer)
    blocks = data.spread_blocks(4)
    assert blocks.shape == (4, 8)
    count = len(data.train_blocks)
    for row, index in zip(blocks, (0, count // 4, count // 2, 3 * count // 4), strict=True):
        assert row.tolist() == data.train[index * 8 : index * 8 + 8].tolist()
    assert len(data.spread_blocks(10**6)) == count
