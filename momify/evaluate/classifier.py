"""A causal language model as a classifier: its body as it is, and a new head on the last token."""

import torch
from torch import nn
from transformers import GPT2ForSequenceClassification, PreTrainedModel

from momify.model import MomForCausalLM, MomForSequenceClassification


def make_classifier(model: PreTrainedModel, outputs: int, pad: int, seed: int) -> PreTrainedModel:
    """`model`'s own body with a head of `outputs` numbers a sequence; `model` is used up.

    Only the head is new: normal with deviation `initializer_range`, drawn from `seed`, the same for all models of one
    width. A single output is a regression. Both classes look at the last token that is not padding; transformers' GPT-2
    finds it by `pad`, which must not stand in the text, and a MoM by the attention mask.
    """
    config = model.config
    config.update(
        {
            "num_labels": outputs,
            "pad_token_id": pad,
            "problem_type": "regression" if outputs == 1 else "single_label_classification",
            "use_cache": False,
        }
    )
    routed = isinstance(model, MomForCausalLM)
    with torch.device("meta"):  # nothing of this stays but the frame
        made = (MomForSequenceClassification if routed else GPT2ForSequenceClassification)(config)
    body = "model" if routed else "transformer"
    setattr(made, body, getattr(model, body))
    made.score = nn.Linear(config.hidden_size, outputs, bias=False)
    draw = torch.Generator().manual_seed(seed)
    nn.init.normal_(made.score.weight, std=config.initializer_range, generator=draw)
    return made.to(model.dtype)
