"""Fixtures: a parent model to train from, made once for all tests."""

import pytest

from tests.yuan.runs import make


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    return make(tmp_path_factory.mktemp("parent"))
