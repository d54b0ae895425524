"""The model: config, pool, routers, dispatch, transformers classes. An export carries exactly these files."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from .classification import MomForSequenceClassification
from .config import MomConfig
from .dispatch import routed
from .layout import HalfStep, half_steps
from .low_rank import FfnDelta, LowRank, MhaDelta
from .modeling import MomForCausalLM, MomModel, MomPreTrainedModel
from .outputs import MomCausalLMOutput, MomClassifierOutput, MomModelOutput, RoutingRecord
from .plan import Plan, make_plan, static_plan
from .pool import FfnPool, MhaPool, Stack, StackedLinear
from .router import Choice, Router, choose

__all__ = [
    "Choice",
    "FfnDelta",
    "FfnPool",
    "HalfStep",
    "LowRank",
    "MhaDelta",
    "MhaPool",
    "MomCausalLMOutput",
    "MomClassifierOutput",
    "MomConfig",
    "MomForCausalLM",
    "MomForSequenceClassification",
    "MomModel",
    "MomModelOutput",
    "MomPreTrainedModel",
    "Plan",
    "Router",
    "RoutingRecord",
    "Stack",
    "StackedLinear",
    "choose",
    "half_steps",
    "make_plan",
    "routed",
    "static_plan",
]

AutoConfig.register("mom", MomConfig, exist_ok=True)
AutoModel.register(MomConfig, MomModel, exist_ok=True)
AutoModelForCausalLM.register(MomConfig, MomForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(MomConfig, MomForSequenceClassification, exist_ok=True)
