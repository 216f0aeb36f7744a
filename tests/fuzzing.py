"""Strategies of hostile values, shared by the fuzz tests.

A test that `each_size` decorates runs 100 cases in `make test` and 10,000 in `make test-long`.
"""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

NUM_QUICK_CASES = 100
NUM_LONG_CASES = 10_000
ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=40)
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), ANY_TEXT)
JSON_VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(ANY_TEXT, inner, max_size=4)
)

# The form of a checker, with hostile values.
CHECKER_VALUES = st.one_of(
    JSON_VALUES,
    st.fixed_dictionaries(
        {"type": st.sampled_from(["exact", "numeric", "choice", "contains", "?"])},
        optional={"value": SCALARS, "tolerance": SCALARS, "values": st.lists(SCALARS, max_size=3)},
    ),
)

each_size = pytest.mark.parametrize(
    "num_cases", [NUM_QUICK_CASES, pytest.param(NUM_LONG_CASES, marks=pytest.mark.slow)]
)


def fuzz(num_cases, strategy, check):
    """Call `check` with values of a strategy."""
    suppressed = (HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.large_base_example)
    run = settings(max_examples=num_cases, deadline=None, suppress_health_check=suppressed)(given(strategy)(check))
    run()


def check_printable(message):
    assert message.isprintable() and len(message) < 2000, message
