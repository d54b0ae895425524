"""Which weights do not learn: those that no gradient can reach, and the embeddings under `train.freeze_embeddings`."""

from transformers import PreTrainedModel

from momify.model import MomConfig
from momify.recipe_blocks import TrainBlock

_EMBEDDINGS = ("wte.weight", "wpe.weight", "lm_head.weight")


def freeze(model: PreTrainedModel, settings: TrainBlock) -> None:
    """Take `requires_grad` from all that does not learn under these settings: no gradient, no optimizer state."""
    for name, parameter in model.named_parameters():
        if _is_idle(name, model, settings) or (settings.freeze_embeddings and is_embedding(name)):
            parameter.requires_grad_(False)


def is_embedding(name: str) -> bool:
    """Whether the parameter is the embedding of tokens or positions, or the head, dense or MoM."""
    return name.endswith(_EMBEDDINGS)


def _is_idle(name: str, model: PreTrainedModel, settings: TrainBlock) -> bool:
    """Whether no gradient can reach it: several processes, which wait for all gradients, then need not look for it."""
    config = model.config
    if not isinstance(config, MomConfig):
        return False
    taught = config.router_explore or settings.balance or settings.supervise or config.modules_per_token > 1
    idle = tuple(f"model.{kind}." for kind in ("mha", "ffn") if not config.running(kind))
    return ("_router." in name and not taught) or name.startswith(idle)
