"""Fixtures: the inputs of training runs, made once for all tests."""

import pytest

from tests.yuan.runs import make_training_inputs


@pytest.fixture(scope="session")
def training_inputs(tmp_path_factory):
    return make_training_inputs(tmp_path_factory.mktemp("parent"))
