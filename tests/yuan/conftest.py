"""A model to train on from, made once."""

import pytest

from tests.yuan.runs import make


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    return make(tmp_path_factory.mktemp("parent"))
