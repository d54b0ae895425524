"""A byte-level BPE of its own for a model trained from scratch, and loading one that exists."""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from momify.errors import MomifyError
from momify.files import inside

END_OF_TEXT = "<|endoftext|>"


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `vocabulary` entries, as GPT-2's, learned from `texts`.

    Raises MomifyError when the texts are too few for that many entries, or fewer than the 257 bytes need.
    """
    if vocabulary < 257:
        raise MomifyError(f"vocabulary {vocabulary} is too small; 256 bytes and the end of text need 257")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocabulary:
        raise MomifyError(f"the text gives {tokenizer.get_vocab_size()} tokens, not {vocabulary}; ask for fewer")
    # clean_up_tokenization_spaces would eat the space of "x = [ ]" when decoding: bytes must come back as they were.
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(name: str | Path, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub model; nothing from it is executed.

    Raises MomifyError where there is none: transformers would give an empty one without a word.
    """
    _refuse_links_out(Path(name))
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(name), revision=revision, trust_remote_code=False)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a damaged tokenizer.json raises nearly anything, and a panic is no Exception
        reason = " ".join(str(error).split())[:150]
        raise MomifyError(f"no tokenizer could be read from {name}: {reason}") from None
    if len(tokenizer) < 2:
        raise MomifyError(f"{name} holds no tokenizer files; copy tokenizer.json (or vocab.json and merges.txt) there")
    return tokenizer


def _refuse_links_out(folder: Path) -> None:
    """Raise MomifyError where a file of a tokenizer lies, by a link, outside its folder (a hub cache's blobs may)."""
    if folder.is_dir():
        for path in folder.iterdir():
            if path.is_symlink() and path.suffix in (".json", ".txt", ".jinja", ".model"):
                inside(folder, path.name)


def check_same_tokens(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    """Raise MomifyError, naming one, where two tokenizers give a token different ids."""
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours == theirs:
        return
    token = min((t for t in ours.keys() | theirs.keys() if ours.get(t) != theirs.get(t)), key=str)
    raise MomifyError(
        f"the model's tokenizer and its source's differ: token {token!r} has id {ours.get(token)} and "
        f"{theirs.get(token)}; convert from the source that it is to learn from"
    )
