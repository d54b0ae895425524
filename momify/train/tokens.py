"""How many tokens a training has seen. The Trainer counts them as they come, for all processes and across restarts.

Steps are no measure of them: the last batch of a pass over the text holds what is left, as does every batch where there
are fewer blocks than a batch takes.
"""

from pathlib import Path
from typing import Any, NamedTuple

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from momify.data.blocks import TokenData
from momify.files import read_json
from momify.processes import count
from momify.recipe_blocks import TrainBlock


def tokens_seen(checkpoints: Path, data: TokenData, settings: TrainBlock) -> int:
    """Tokens that all processes together have seen in a finished training, by its last checkpoint."""
    path = checkpoints / f"checkpoint-{settings.steps}" / TRAINER_STATE_NAME
    counted = read_json(path).get("num_input_tokens_seen") if path.is_file() else None
    return counted or reckoned_tokens(settings.steps, data, settings)


def reckoned_tokens(steps: int, data: TokenData, settings: TrainBlock) -> int:
    """Tokens of so many steps, before they are taken or where a version of momify did not count them."""
    a_pass = _a_pass(data, settings)
    passes, rest = divmod(steps, a_pass.steps)
    return passes * a_pass.tokens + rest * a_pass.most_a_step


def fewest_steps(tokens: int, data: TokenData, settings: TrainBlock) -> int:
    """Steps that see so many tokens, or as few more as can be: the inverse of `reckoned_tokens`."""
    a_pass = _a_pass(data, settings)
    passes, rest = divmod(tokens, a_pass.tokens)
    return passes * a_pass.steps + -(-rest // a_pass.most_a_step)


class _Pass(NamedTuple):
    """What one pass over the text consists of."""

    steps: int
    tokens: int
    most_a_step: int


def _a_pass(data: TokenData, settings: TrainBlock) -> _Pass:
    blocks, a_step = len(data.train_blocks), settings.batch_size * count()
    steps = -(-blocks // a_step)
    # several processes are given full batches always, the last of a pass with blocks of its beginning
    blocks = steps * a_step if count() > 1 else blocks
    return _Pass(steps, blocks * data.block_length, a_step * data.block_length)


class UncountedSteps(TrainerCallback):
    """Reckons the tokens behind a checkpoint of an older version, so that counting goes on from there."""

    def __init__(self, data: TokenData, settings: TrainBlock) -> None:
        self._data, self._settings = data, settings

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        if not state.num_input_tokens_seen:
            state.num_input_tokens_seen = reckoned_tokens(state.global_step, self._data, self._settings)
