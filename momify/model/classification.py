"""A MoM that classifies a sequence from its last token (GLUE)."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import can_return_tuple

from .config import MomConfig
from .modeling import MomModel, MomPreTrainedModel
from .outputs import CACHE, MomClassifierOutput


class MomForSequenceClassification(MomPreTrainedModel):
    """MoM with a linear head on the last token that is not padding, as GPT2ForSequenceClassification has."""

    def __init__(self, config: MomConfig) -> None:
        super().__init__(config)
        self.model = MomModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> MomClassifierOutput:
        """Logits (B, labels), and the loss for labels: (B,) classes, (B,) numbers, or (B, labels) several.

        Keywords of MomModel (`output_router_logits`, ...) are passed on. Raises ValueError where a batch of
        several rows gives no way to tell padding, and as MomModel.
        """
        body = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **{**kwargs, "return_dict": True},
        )
        x = body.last_hidden_state  # (B, T, D)
        last = self._last_tokens(input_ids, attention_mask, inputs_embeds)
        logits = self.score(x[torch.arange(x.shape[0], device=x.device), last])  # (B, labels)
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, logits=logits, config=self.config)
        return MomClassifierOutput(
            loss=loss,
            logits=logits,
            **{CACHE: getattr(body, CACHE)},
            hidden_states=body.hidden_states,
            attentions=body.attentions,
            router_logits=body.router_logits,
            routing=body.routing,
        )

    def _last_tokens(
        self, input_ids: Tensor | None, attention_mask: Tensor | None, embeds: Tensor | None
    ) -> Tensor | int:
        """Index (B,) of each row's last token that is not padding, by the mask or else by pad_token_id."""
        pad = self.config.pad_token_id
        if attention_mask is not None:
            real = attention_mask != 0
        elif input_ids is not None and pad is not None:
            real = input_ids != pad
        elif len(input_ids if embeds is None else embeds) == 1:
            return -1
        elif input_ids is None:
            raise ValueError("inputs_embeds of several rows do not show what is padding; give attention_mask")
        else:
            raise ValueError("pad_token_id is None for a batch of several rows; set it, or give attention_mask")
        return (real * torch.arange(real.shape[1], device=real.device)).argmax(dim=1)
