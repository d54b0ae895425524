"""Tiny contestants, and GLUE files written on the spot."""

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from momify.data.tokenizer import train_tokenizer
from momify.evaluate.contestant import Contestant
from momify.evaluate.glue_tasks import GLUE
from momify.model import MomConfig, MomForCausalLM

Write = Callable[..., Path]
HEADERS = {
    "sst2": ("sentence", "label"),
    "mrpc": ("Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"),
    "stsb": (
        "index",
        "genre",
        "filename",
        "year",
        "old_index",
        "source1",
        "source2",
        "sentence1",
        "sentence2",
        "score",
    ),
    "qqp": ("id", "qid1", "qid2", "question1", "question2", "is_duplicate"),
    "mnli": ("index", "promptID", "genre", "sentence1", "sentence2", "label1", "gold_label"),
    "qnli": ("index", "question", "sentence", "label"),
    "rte": ("index", "sentence1", "sentence2", "label"),
    "wnli": ("index", "sentence1", "sentence2", "label"),
}
WORDS = ["red", "blue", "green", "cat", "dog", "hat", "mat", "sun", "sat", "ran", "the", "a", "big", "small"]


def sentence(place: int, mark: str = "") -> str:
    words = [WORDS[(place * 7 + i * i) % len(WORDS)] for i in range(3 + place % 4)]
    return " ".join([str(place), *words, mark]).strip()


def row(task: str, place: int) -> str:
    """A row whose label can be learned: it follows from the word at its end."""
    spec = GLUE[task]
    label = place % spec.outputs if spec.classes else place % 6
    shown = spec.classes[label] if spec.classes else f"{label:.3f}"
    mark = ["good", "bad", "so", "odd", "new", "old"][label]
    cells = {
        **dict.fromkeys(spec.header or HEADERS.get(task, ()), f"x{place}"),
        **{name: sentence(place + 3 * i, mark) for i, name in enumerate(spec.texts)},
        spec.label: shown,
    }
    return "\t".join(cells[name] for name in spec.header or HEADERS[task])


def file_text(task: str, places: Iterable[int]) -> str:
    header = [] if GLUE[task].header else ["\t".join(HEADERS[task])]
    return "\n".join([*header, *(row(task, place) for place in places)]) + "\n"


@pytest.fixture
def write_glue(tmp_path: Path) -> Write:
    """Writes DATA/glue/TASK/*.tsv for some tasks and gives DATA."""

    def write(*tasks: str, train: int = 24, dev: int = 12) -> Path:
        for task in tasks:
            spec = GLUE[task]
            folder = tmp_path / "data" / "glue" / spec.folder
            folder.mkdir(parents=True)
            (folder / "train.tsv").write_text(file_text(task, range(train)), encoding="utf-8")
            for offset, (_, name) in enumerate(spec.dev):
                text = file_text(task, range(100 + offset, 100 + offset + dev))
                (folder / f"{name}.tsv").write_text(text, encoding="utf-8")
        return tmp_path / "data"

    return write


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """270 entries: bytes and a few pairs."""
    return train_tokenizer(["the cat sat on the mat, the hat and the rat\n" * 20], 270)


def tiny_mom() -> MomForCausalLM:
    """A MoM whose steps choose, with routers that tell tokens apart."""
    torch.manual_seed(1)
    model = MomForCausalLM(
        MomConfig(
            vocab_size=270, n_positions=64, hidden_size=32, num_attention_heads=4, intermediate_size=64,
            num_mha_modules=2, num_ffn_modules=3, num_steps=3, bos_token_id=0, eos_token_id=0,
            mha_homes=[0, 2, 1], ffn_homes=[0, 1, 2],
            mha_reach=[[0], [2], [0, 1, 2]], ffn_reach=[[0], [0, 1, 2, 3], [2]],
        )
    ).eval()  # fmt: skip
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "router" in name:
                parameter.normal_(std=0.5)
            elif parameter.ndim > 1 and "wte" not in name and "wpe" not in name:
                parameter.normal_(std=0.15)
    return model


@pytest.fixture
def dense(make_gpt2: Callable[..., GPT2LMHeadModel], tokenizer: PreTrainedTokenizerFast) -> Contestant:
    def load() -> GPT2LMHeadModel:
        torch.manual_seed(0)
        return make_gpt2(vocab_size=270, n_positions=64, n_layer=2)

    return Contestant("source", "1" * 64, load, tokenizer)


@pytest.fixture
def mom(tokenizer: PreTrainedTokenizerFast) -> Contestant:
    return Contestant("mom", "2" * 64, tiny_mom, tokenizer)
