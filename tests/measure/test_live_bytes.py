"""Live bytes against sums by hand, and against what torch's profiler saw the CPU allocator give out."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from momify.measure.live_bytes import LiveBytes


def test_by_hand() -> None:
    x = torch.ones(100)
    with LiveBytes([x]) as meter:
        assert meter.now == 400
        y = x + 1  # 800
        z = y * y  # 1200
        view = z[:50].view(5, 10)  # the same storage
        assert meter.now == 1200
        del y, z
        assert meter.now == 800
        del view
        assert meter.now == 400
        x.add_(1)
    assert (meter.now, meter.peak) == (400, 1200)


def test_a_known_tensor_that_is_freed_counts_until_then() -> None:
    old = torch.ones(100)
    with LiveBytes(iter([old])) as meter:
        new = torch.cat([old, old[:1]])
        assert meter.peak == 804
        del old
        assert meter.now == new.nbytes


def allocated_peak(run: Callable[[], object]) -> int:
    """The most that the CPU allocator had given out above the start, from its own events."""
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = run()
    events = [
        (event.start_ns(), event.nbytes())
        for event in profiler.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]
    del kept
    now = peak = 0
    for _, size in sorted(events):
        now += size
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize("kind", ["dense", "mom"])
def test_the_allocator_agrees(
    kind: str, make_gpt2: Callable[..., nn.Module], make_mom: Callable[..., nn.Module]
) -> None:
    model = make_gpt2() if kind == "dense" else make_mom()
    ids = torch.randint(0, 61, (4, 40))

    def forward() -> object:
        return model(input_ids=ids, use_cache=True, logits_to_keep=1)

    def known() -> list[Tensor]:
        return [*model.parameters(), *model.buffers(), ids]

    with torch.no_grad(), LiveBytes(known()) as meter:
        start = meter.now
        kept = forward()
    del kept
    assert meter.peak - start == pytest.approx(allocated_peak(forward), rel=0.01)


def test_the_meta_device_costs_nothing() -> None:
    with torch.device("meta"):
        layer, x = nn.Linear(10_000, 10_000), torch.ones(1000, 10_000)
    with torch.no_grad(), LiveBytes([*layer.parameters(), x]) as meter:
        start = meter.now
        layer(x)
    assert meter.peak - start == 1000 * 10_000 * 4
