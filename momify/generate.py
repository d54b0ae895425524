"""Text from a causal language model, and how fast it came."""

import time
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from momify.devices import device_for
from momify.errors import MomifyError
from momify.evaluate.batches import check_vocabulary
from momify.measure.memory import weight_bytes

COLDEST = 1e-6  # below, the likeliest token is drawn anyway, and logits over the temperature overflow
ROOM = 2 << 30  # bytes on a GPU beside the weights: caches of all beams


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. temperature 0 (or next to it) or several beams: no drawing."""

    max_new_tokens: int = 100
    temperature: float = 0.8
    top_k: int = 50
    beams: int = 1
    seed: int = 0


@dataclass(frozen=True)
class Generated:
    """Prompt and continuation, how many tokens are new, and how many came a second."""

    text: str
    tokens: int
    speed: float


@torch.no_grad()
def generate_text(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, sampling: Sampling
) -> Generated:
    """Go on from `prompt` (an empty one: from the beginning of a document), on the GPU where there is room.

    Raises MomifyError for a prompt that does not fit the model's positions or vocabulary, and for an empty one where
    the tokenizer has no token that begins a document.
    """
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"] or [_beginning(tokenizer)]
    check_vocabulary([ids], model.config.vocab_size)
    positions = model.config.max_position_embeddings
    if len(ids) >= positions:
        raise MomifyError(f"the prompt has {len(ids)} tokens, the model {positions} positions; shorten it")
    model = model.to(device_for(weight_bytes(model) + ROOM))
    inputs = torch.tensor([ids], device=model.device)  # (1, T)
    draw = sampling.temperature > COLDEST and sampling.beams == 1
    set_seed(sampling.seed)
    start = time.perf_counter()
    out = model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=min(sampling.max_new_tokens, positions - len(ids)),
        do_sample=draw,
        num_beams=sampling.beams,
        pad_token_id=tokenizer.eos_token_id,
        **({"temperature": sampling.temperature, "top_k": sampling.top_k} if draw else {}),
    )
    seconds = time.perf_counter() - start
    new = out.shape[1] - len(ids)
    return Generated(tokenizer.decode(out[0], skip_special_tokens=True), new, new / seconds)


def _beginning(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that stands before a document. Raises MomifyError where there is none."""
    found = [token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token is not None]
    if not found:
        raise MomifyError("the tokenizer has no token that begins a document, so there is nothing to go on from; "
                          "give --prompt")  # fmt: skip
    return found[0]
