"""Check that each undocumented DeepSpeed name that is used is listed, and that it exists."""

import ast
import importlib
import inspect
import re
from pathlib import Path

import deepspeed
import pytest

from yuan.train import zero
from yuan.train.zero import engine

SOURCES = [Path(file) for file in Path(zero.__file__).parent.glob("*.py")]


def list_names():
    """Return location and name of each entry of the list in the package's docstring."""
    place, entries = None, []
    for row in inspect.getdoc(zero).splitlines():
        if re.fullmatch(r"deepspeed[\w.]+", row):
            place = row
        elif match := re.fullmatch(r" {4}(\w+)  .+", row):
            entries.append((place, match[1]))
    return entries


def read_source(place):
    """Return the source of a module, or of a class with its base classes in DeepSpeed."""
    try:
        return inspect.getsource(importlib.import_module(place))
    except ModuleNotFoundError:
        module, _, name = place.rpartition(".")
        classes = getattr(importlib.import_module(module), name).__mro__
        return "".join(inspect.getsource(cls) for cls in classes if cls.__module__.startswith("deepspeed"))


def is_defined_in(name, tree):
    """Return True if the module itself defines a private name."""
    defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    stored = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self"
    }
    return name in defined | stored


@pytest.mark.parametrize(("place", "name"), list_names())
def test_each_listed_name_exists_in_deepspeed(place, name):
    assert re.search(rf"\b{name}\b", read_source(place)), f"{place} has no {name} any more; see {zero.__name__}"


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: file.name)
def test_each_private_name_that_is_used_is_listed(file):
    tree = ast.parse(file.read_text())
    private = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and re.match("_[^_]", node.attr) and not is_defined_in(node.attr, tree)
    }
    assert private <= {name for _, name in list_names()}


def test_list_has_more_than_25_names():
    assert len(list_names()) > 25


def test_another_version_of_deepspeed_is_refused(monkeypatch):
    monkeypatch.setattr(deepspeed, "__version__", "0.20.0")
    with pytest.raises(ValueError, match=r"0\.19\.8, got 0\.20\.0; .*pip install deepspeed==0\.19\.8"):
        engine.check_deepspeed()


def test_pinned_version_equals_the_required_version():
    pins = (Path(__file__).parents[2] / "constraints.txt").read_text()
    assert f"deepspeed=={engine.DEEPSPEED_VERSION}\n" in pins
    engine.check_deepspeed()
