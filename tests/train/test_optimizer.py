"""train/optimizer.py against torch's own AdamW and Muon, and against the singular value decomposition."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from momify.model import MomConfig, MomForCausalLM
from momify.train.optimizer import Muon, Rates, orthogonalise, parameter_groups, set_embeddings_apart


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.integers(2, 20), st.integers(2, 20), st.integers(0, 10**6))
def test_orthogonalise_evens_out_singular_values(modules: int, rows: int, columns: int, seed: int) -> None:
    torch.manual_seed(seed)
    u, _, v = torch.linalg.svd(torch.randn(modules, rows, columns).double(), full_matrices=False)
    values = torch.linspace(1, 2, u.shape[-1]).double()
    matrices = (u * values) @ v
    found = orthogonalise(matrices * 37.0).double()
    assert torch.linalg.svdvals(found).min() > 0.6
    assert torch.linalg.svdvals(found).max() < 1.3
    polar = u @ v
    cosine = (found * polar).sum((1, 2)) / (found.norm(dim=(1, 2)) * polar.norm(dim=(1, 2)))
    assert cosine.min() > 0.97


def test_one_matrix_moves_as_with_torchs_muon() -> None:
    torch.manual_seed(0)
    ours = nn.Parameter(torch.randn(24, 36))
    theirs = nn.Parameter(ours.detach().clone())
    one = Muon([{"params": [ours], "weight_decay": 0.1, "muon": True}], lr=0.01)
    other = torch.optim.Muon([theirs], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        ours.grad = torch.randn(24, 36)
        theirs.grad = ours.grad.clone()
        one.step()
        other.step()
    assert torch.allclose(ours, theirs, atol=2e-3)  # theirs iterates in bfloat16
    assert torch.dist(ours, theirs) < 0.02 * torch.dist(ours, torch.randn(24, 36))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.integers(2, 20), st.integers(2, 20), st.integers(0, 10**6))
def test_evened_moves_as_the_papers_algorithm(modules: int, rows: int, columns: int, seed: int) -> None:
    """NorMuon's algorithm 1 in float64, matrix by matrix and unit by unit; the polar factor is Muon's own."""
    torch.manual_seed(seed)
    start, rate, decay, beta = torch.randn(modules, rows, columns), 0.01, 0.1, 0.9
    stack = nn.Parameter(start.clone())
    group = {"params": [stack], "weight_decay": decay, "muon": True}
    optimizer = Muon([group], lr=rate, evened=True, betas=(0.9, beta))
    expected, momentum = start.double(), torch.zeros(modules, rows, columns)
    seconds = torch.zeros(modules, columns, dtype=torch.float64)
    for step in (1, 2, 3):
        grad = torch.randn(modules, rows, columns) * torch.rand(columns)  # units of different sizes
        momentum = 0.95 * momentum + 0.05 * grad
        stack.grad = grad
        optimizer.step()
        polar = orthogonalise(0.05 * grad + 0.95 * momentum).double()
        for module in range(modules):
            update = torch.empty(rows, columns, dtype=torch.float64)
            for unit in range(columns):
                column = polar[module, :, unit]
                seconds[module, unit] = beta * seconds[module, unit] + (1 - beta) * column.pow(2).mean()
                update[:, unit] = column / ((seconds[module, unit] / (1 - beta**step)).sqrt() + 1e-8)
            size = 0.2 * rate * (rows * columns) ** 0.5 / update.norm()
            expected[module] = (1 - rate * decay) * expected[module] - size * update
    torch.testing.assert_close(stack.double(), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("evened", [False, True])
def test_stack_equals_its_matrices_one_by_one(evened: bool) -> None:
    torch.manual_seed(0)
    stack = nn.Parameter(torch.randn(3, 8, 12))
    singles = [nn.Parameter(part.clone()) for part in stack.detach()]
    optimizers = [
        Muon([{"params": p, "weight_decay": 0.0, "muon": True}], lr=0.1, evened=evened) for p in ([stack], singles)
    ]
    stack.grad = torch.randn(3, 8, 12)
    for parameter, grad in zip(singles, stack.grad, strict=True):
        parameter.grad = grad.clone()
    for optimizer in optimizers:
        optimizer.step()
    assert torch.allclose(stack, torch.stack(list(singles)), atol=1e-6)


@pytest.mark.parametrize("evened", [False, True])
def test_a_module_that_no_token_took_decays_and_moves_no_further(evened: bool) -> None:
    """Orthogonalised, the momentum of its last gradient would move it at full size for hundreds of steps."""
    torch.manual_seed(0)
    stack = nn.Parameter(torch.randn(2, 4, 6))
    alone = nn.Parameter(stack.detach()[:1].clone())
    both, one = (
        Muon([{"params": [p], "weight_decay": 0.1, "muon": True}], lr=0.01, evened=evened) for p in (stack, alone)
    )
    for step in range(6):
        stack.grad = torch.randn(2, 4, 6)
        if step:
            stack.grad[1] = 0.0
        alone.grad = stack.grad[:1].clone()
        both.step()
        one.step()
        if not step:
            last = stack.detach()[1].clone()
    torch.testing.assert_close(stack[1], last * (1 - 0.001) ** 5)
    torch.testing.assert_close(stack[:1], alone)  # the other learns as if it were alone


def test_without_matrices_it_is_adamw() -> None:
    torch.manual_seed(0)
    models = [nn.Linear(5, 4) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    ours = Muon([{"params": models[0].parameters(), "weight_decay": 0.1}], lr=0.01, betas=(0.9, 0.95))
    theirs = torch.optim.AdamW(models[1].parameters(), lr=0.01, weight_decay=0.1, betas=(0.9, 0.95))
    for _ in range(4):
        x = torch.randn(7, 5)
        for model, optimizer in zip(models, (ours, theirs), strict=True):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    assert torch.equal(models[0].weight, models[1].weight)


@pytest.mark.parametrize("evened", [False, True])
def test_state_survives_saving(evened: bool) -> None:
    def fresh() -> tuple[nn.Parameter, nn.Parameter, Muon]:
        torch.manual_seed(0)
        matrix, vector = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(6))
        groups = [{"params": [matrix], "weight_decay": 0.1, "muon": True}, {"params": [vector], "weight_decay": 0.0}]
        return matrix, vector, Muon(groups, lr=0.01, evened=evened)

    def steps(parts: tuple[nn.Parameter, nn.Parameter, Muon], seeds: range) -> None:
        for seed in seeds:
            torch.manual_seed(seed)
            parts[0].grad, parts[1].grad = torch.randn(4, 6), torch.randn(6)
            parts[2].step()

    whole, first, second = fresh(), fresh(), fresh()
    steps(whole, range(6))
    steps(first, range(3))
    with torch.no_grad():
        second[0].copy_(first[0])
        second[1].copy_(first[1])
    second[2].load_state_dict(copy.deepcopy(first[2].state_dict()))
    steps(second, range(3, 6))
    assert torch.equal(whole[0], second[0])
    assert torch.equal(whole[1], second[1])


def test_groups_hold_every_parameter_once_at_its_rate() -> None:
    config = MomConfig(vocab_size=31, n_positions=8, hidden_size=16, num_attention_heads=2, intermediate_size=32,
                       num_mha_modules=2, num_ffn_modules=2, num_steps=3, patch_rank=2, step_rank=2,
                       ffn_homes=[0, 0, 1], ffn_reach=[[0], [0], [0, 1, 2]], mha_homes=[1, 1, 2],
                       mha_reach=[[1], [1], [2]])  # fmt: skip
    model = MomForCausalLM(config)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    small = [name for name in names.values() if "patch" in name or "delta" in name]
    assert len(small) == 2 * 3 + 4 * 3
    decayed = [name for name in names.values() if "bias" not in name and "ln" not in name]
    groups = parameter_groups(model, decayed, 0.1, Rates(0.01, 2.0, 0.5))
    held = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(held) == sorted(names)
    by_rate: dict[float, set[str]] = {}
    for group in groups:
        by_rate.setdefault(group["lr"], set()).update(names[id(parameter)] for parameter in group["params"])
    pool = {f"model.{part}.weight" for part in ("mha.qkv", "mha.out", "ffn.up", "ffn.down")}
    embeddings = {"model.wte.weight", "model.wpe.weight"}  # the head is tied
    assert by_rate == {0.02: pool, 0.005: embeddings, 0.01: set(names.values()) - pool - embeddings}
    assert groups[0]["lr"] == 0.01, "the rate that the Trainer logs"
    assert [group.get("muon", False) for group in groups] == [group["lr"] == 0.02 for group in groups]
    decays = {names[id(p)] for group in groups if group["weight_decay"] for p in group["params"]}
    assert decays == set(decayed)


def test_a_head_of_its_own_learns_at_the_embeddings_rate() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=31, n_positions=8, n_embd=16, n_layer=1, n_head=2,
                                       tie_word_embeddings=False))  # fmt: skip
    groups = parameter_groups(model, [], 0.1, Rates(1.0, 2.0, 0.5))
    slow = {id(parameter) for group in groups if group["lr"] == 0.5 for parameter in group["params"]}
    body = model.transformer
    assert slow == {id(module.weight) for module in (model.lm_head, body.wte, body.wpe)}


def test_embeddings_set_apart_learn_at_a_rate_of_their_own_and_all_else_as_before() -> None:
    config = GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    plain, apart = (GPT2LMHeadModel(config) for _ in range(2))
    apart.load_state_dict(plain.state_dict())
    start = copy.deepcopy(plain.state_dict())
    optimizers = []
    for model in (plain, apart):
        kinds = [[p for p in model.parameters() if (p.ndim > 1) == decays] for decays in (True, False)]
        groups = [{"params": kinds[0], "weight_decay": 0.1}, {"params": kinds[1], "weight_decay": 0.0}]
        optimizers.append(torch.optim.AdamW(groups, lr=0.01))
    set_embeddings_apart(optimizers[1], apart, 0.5)
    assert [(group["lr"], group["weight_decay"]) for group in optimizers[1].param_groups] == [
        (0.01, 0.1), (0.01, 0.0), (0.005, 0.1)
    ]  # fmt: skip
    ids = torch.arange(8)[None]
    for model, optimizer in zip((plain, apart), optimizers, strict=True):
        model.eval()(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    for (name, ours), theirs in zip(apart.named_parameters(), plain.parameters(), strict=True):
        if "wte" in name or "wpe" in name:
            torch.testing.assert_close(ours - start[name], 0.5 * (theirs - start[name]), rtol=1e-3, atol=1e-6)
        else:
            assert torch.equal(ours, theirs)
