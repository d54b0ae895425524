"""What only a GPU makes wrong, told without one where that can be: where work is done, and how often the host waits."""

import weakref
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from momify.devices import device_for
from momify.measure.memory import measure_loads
from momify.model import MomConfig, MomForCausalLM, triton_dispatch
from momify.model.dispatch import BACKENDS, routed
from momify.model.plan import make_plan
from momify.model.pool import StackedLinear
from momify.recipe_blocks import TrainBlock
from momify.train import fit
from momify.train.guards import StepGuard

SHAPE = {
    "vocab_size": 61, "n_positions": 48, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64,
    "num_mha_modules": 2, "num_ffn_modules": 2, "num_steps": 2, "mha_homes": [0, 1], "ffn_homes": [0, 1],
    "mha_reach": [[0, 2], [1]], "ffn_reach": [[0, 2], [1, 2]], "patch_rank": 2, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip


def test_what_a_training_left_behind_is_given_back_before_room_is_asked_for(monkeypatch) -> None:
    class Trainer:
        def __init__(self) -> None:
            self.myself = self

    left, free = weakref.ref(Trainer()), [10]
    assert left() is not None

    def empty_cache() -> None:
        free[0] = 10 if left() else 1000  # the cache holds nothing that is still referred to

    monkeypatch.setattr("momify.devices.best_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "empty_cache", empty_cache)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free[0], 2000))
    assert device_for(1000).type == "cuda"


def test_what_routers_are_told_is_measured_where_the_model_will_be(monkeypatch) -> None:
    places = []
    monkeypatch.setattr(fit, "device_for", lambda needed: torch.device("meta"))
    monkeypatch.setattr(fit, "loss_metrics", lambda model, tokens, seed: places.append(model.device) or {})
    data = SimpleNamespace(block_length=16, spread_blocks=lambda count: torch.zeros(count, 16, dtype=torch.int64))
    settings, place = TrainBlock(supervise=0.1), SimpleNamespace(seed=0)
    fit.routing_aids(fit.Course(MomForCausalLM(MomConfig(**SHAPE)), object(), data, settings, place))
    assert places == [torch.device("meta")]


class Waits(TorchDispatchMode):
    """Counts the numbers that the host asks the device for."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
        return func(*args, **(kwargs or {}))


def test_a_step_is_judged_in_one_wait() -> None:
    parameters = [(str(number), nn.Parameter(torch.ones(3))) for number in range(20)]
    for _, parameter in parameters:
        parameter.grad = torch.ones(3)
    guard = StepGuard()
    guard.note(torch.tensor(1.0), None)
    with Waits() as waits:
        assert not guard.unfit(1, parameters)
    assert waits.count == 1


def test_kernels_are_launched_on_the_device_of_their_tensors(monkeypatch) -> None:
    pytest.importorskip("triton")
    current, launched = [], []

    @contextmanager
    def device_of(tensor: Tensor):
        current.append(tensor.device)
        yield
        current.pop()

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: launched.append(list(current))

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    for name in ("rows_kernel", "weights_kernel"):
        monkeypatch.setattr(triton_dispatch, name, Kernel())
    layer, picks = StackedLinear(2, 16, 16), torch.tensor([[0], [1], [0], [2]])
    nn.init.normal_(layer.weight), nn.init.zeros_(layer.bias)
    plan = make_plan(picks, None, 2, wait=False)
    routed(torch.randn(4, 16, requires_grad=True), plan, [layer()], None, BACKENDS["triton"]).sum().backward()
    assert launched == [[torch.device("cpu")]] * 3  # forward, and the gradients of rows and of weights


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no two CUDA devices")
@torch.no_grad()
def test_a_model_runs_on_a_gpu_that_is_not_the_current_one() -> None:
    model, ids = MomForCausalLM(MomConfig(**SHAPE)).eval(), torch.randint(1, 61, (2, 40))
    logits = [model.to(f"cuda:{number}")(ids.to(f"cuda:{number}")).logits.cpu() for number in (0, 1)]
    assert torch.allclose(*logits, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_first_load_that_is_measured_holds_no_workspace() -> None:
    model, ids = MomForCausalLM(MomConfig(**SHAPE)).eval().cuda(), torch.randint(1, 61, (2, 40), device="cuda")
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    first, again = (measure_loads(model, ids)[0].activations.measured for _ in range(2))
    assert first == again
