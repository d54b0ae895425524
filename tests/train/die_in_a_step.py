"""Not a test: momify's command line, one process of which fails in the third step as DIE says."""

import os
import signal
import time

import torch

from momify.cli import main
from momify.train.trainer import MomTrainer

_loss = MomTrainer.compute_loss


def compute_loss(trainer: MomTrainer, *args: object, **more: object) -> torch.Tensor:
    if os.environ["RANK"] == "1" and trainer.state.global_step == 2:
        if os.environ["DIE"] == "raise":
            raise ArithmeticError("the second process is unwell")
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)
    return _loss(trainer, *args, **more)


MomTrainer.compute_loss = compute_loss
main()
