"""Where points and ticks stand, worked out by hand."""

import pytest

from momify.report.charts import line_chart, round_numbers


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 100, [0, 20, 40, 60, 80, 100]),
        (0, 7, [0, 2, 4, 6]),
        (2.61, 3.09, [2.7, 2.8, 2.9, 3.0]),
        (0.012, 0.018, [0.012, 0.014, 0.016, 0.018]),
        (-3, 3, [-2, 0, 2]),
    ],
)
def test_round_numbers(low: float, high: float, ticks: list[float]) -> None:
    assert round_numbers(low, high) == pytest.approx(ticks)


def test_points_fill_the_box() -> None:
    chart = line_chart({"a": [[0, 0.0], [50, 10.0]], "b": [[100, 5.0]], "none": []}, ("level", 5.0))
    assert [line.name for line in chart.lines] == ["a", "b"]
    air = 0.6  # 6% of 10, below and above
    low, high = 100 - 100 * air / 11.2, 100 * air / 11.2
    assert chart.lines[0].points == f"0.00,{low:.2f} 50.00,{high:.2f}"
    assert chart.lines[1].points == "100.00,50.00"
    assert chart.level.place == 50
    assert [tick.label for tick in chart.across] == ["0", "20", "40", "60", "80", "100"]
    assert all(0 <= tick.place <= 100 for tick in chart.up)


@pytest.mark.parametrize("value", [0.0, 2.5, -1.0])
def test_a_flat_curve_and_a_single_point(value: float) -> None:
    for points in ([[0, value]], [[1, value], [2, value]]):
        chart = line_chart({"a": points})
        assert "nan" not in chart.lines[0].points
        assert chart.up


def test_no_points() -> None:
    assert line_chart({"a": []}) is None
