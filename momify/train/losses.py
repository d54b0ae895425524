"""What is minimised, as pure functions of tensors. V vocabulary, n = B*T tokens, M modules."""

import torch
import torch.nn.functional as F
from torch import Tensor


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy in nats of predicting labels (B, T) one ahead from logits (B, T, V); -100 is not scored."""
    kept = logits[:, :-1].float().flatten(0, 1)  # (B*(T-1), V)
    return F.cross_entropy(kept, labels[:, 1:].flatten())


def distillation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean Kullback-Leibler divergence KL(teacher || student) in nats a position, both logits (B, T, V)."""
    log_p = student.float().log_softmax(-1).flatten(0, 1)
    log_t = teacher.float().log_softmax(-1).flatten(0, 1)
    return F.kl_div(log_p, log_t, log_target=True, reduction="batchmean")


def balance_loss(logits: Tensor, modules: Tensor) -> Tensor:
    """The switch-transformer balance term of one routed half-step: C * sum_i f_i P_i, 1 when uniform.

    logits (n, M + 1), -inf where a choice is out of reach; modules (n, K) the choices made. f_i is the share of
    tokens whose first choice is i, P_i its mean probability, C how many choices are in reach. As in the paper's code.
    """
    probability = logits.softmax(-1).mean(0)  # (M + 1,)
    first = F.one_hot(modules[:, 0], logits.shape[-1]).to(probability.dtype).mean(0)
    reachable = torch.isfinite(logits).any(0).sum()
    return reachable * (first * probability).sum()
