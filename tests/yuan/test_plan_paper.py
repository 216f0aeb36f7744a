"""Compare the computed tables 5 and 6 and figure 3 with those published in the paper."""

import pytest

from yuan.plan.paper import (
    FIG_3_SPLIT,
    TABLE_6,
    YUAN_102B_SHORT_PARAMETERS,
    build_fig_3_costs,
    compute_fig_3_memory,
    compute_table_5,
    compute_table_6,
)
from yuan.plan.solver import solve


def test_table_5_is_reproduced_to_a_hundredth_of_a_percent():
    assert sum(compute_table_5()) == pytest.approx(45.192, rel=1e-4)
    assert compute_table_5() == pytest.approx([36.666, 2.826, 2.643, 2.602, 0.455], abs=1.1e-3)


@pytest.mark.parametrize("row", TABLE_6)
def test_table_6_is_reproduced_with_the_parameter_count_of_each_row(row):
    assert compute_table_6(*row) == pytest.approx(TABLE_6[row], rel=5e-4)


def test_table_6_with_one_parameter_count_is_off_by_at_most_0_28_percent():
    errors = [
        abs(computed / published - 1)
        for row, cells in TABLE_6.items()
        for computed, published in zip(compute_table_6(*row, parameters=YUAN_102B_SHORT_PARAMETERS), cells, strict=True)
    ]
    assert max(errors) == pytest.approx(0.0028, abs=5e-5)


def test_memory_of_the_even_and_the_published_split_of_fig_3():
    even, printed = (
        compute_fig_3_memory((3,) * 8, build_fig_3_costs()),
        compute_fig_3_memory(FIG_3_SPLIT, build_fig_3_costs()),
    )
    assert max(even) == pytest.approx(77.9, abs=0.05)
    assert max(printed) == pytest.approx(68.0, abs=0.05) and printed.index(max(printed)) == 4


@pytest.mark.parametrize(
    ("blockwise", "layers", "gigabytes"),
    [(False, (2, 3, 3, 3, 3, 4, 4, 2), 64.6), (True, (2, 3, 3, 3, 3, 3, 4, 3), 61.2)],
)
def test_split_with_minimum_peak_memory_of_fig_3(blockwise, layers, gigabytes):
    layout = solve(build_fig_3_costs(blockwise=blockwise), "memory")
    assert layout is not None and layout.layers == layers
    assert layout.peak_bytes / 1e9 == pytest.approx(gigabytes, abs=0.05)


def test_recomputation_lowers_the_peak_memory_of_fig_3():
    without_recompute, with_recompute = (
        solve(build_fig_3_costs(recompute=recompute), "memory") for recompute in (False, True)
    )
    assert without_recompute is not None and with_recompute is not None
    assert with_recompute.peak_bytes < without_recompute.peak_bytes and max(with_recompute.recompute_layers) > 0
