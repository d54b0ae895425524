"""Not a test: momify's command line with real sharding on the CPU, where accelerate would quietly copy instead."""

from accelerate.state import PartialState
from accelerate.utils import DistributedType
from transformers import TrainingArguments

from momify.cli import main

_made = TrainingArguments.__post_init__


def shard(arguments: TrainingArguments) -> None:
    _made(arguments)
    assert arguments.device.type == "cpu"
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


TrainingArguments.__post_init__ = shard
main()
