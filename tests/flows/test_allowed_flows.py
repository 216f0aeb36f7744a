"""Test the allowed flows: their parameters, schemas and validation errors."""

import json
import os

import jsonschema
import pytest

from feedback.contracts import RoundParameters
from flows.allowed_flows import ALLOWED_FLOWS, RoundForm, is_schema_of_flow, parse_form
from flows.recipe_files import find_misnamed_recipes, find_recipe_files


def test_unknown_flow_is_refused_with_the_list_of_allowed_flows():
    with pytest.raises(
        ValueError, match=r"only the flows cotrain-round, cotrain-reproduce, .* are run here, got 'mine'"
    ):
        parse_form("mine", {})


@pytest.mark.parametrize(
    ("parameters", "named"),
    [
        ({"nonsense": 1}, "nonsense: is unknown; use one of recipe, max_steps, learning_rate"),
        ({"max_steps": 0}, "max_steps"),
        ({"learning_rate": float("inf")}, "learning_rate"),
        ({"weights": {"base": -1}}, "weights.base"),
        ({"round_id": "latest"}, "round_id"),
        ({"seed": {"$ref": {"block_document_id": "x"}}}, "seed"),
        ({f"unknown-{n}": n for n in range(100)}, "and 95 more"),
    ],
)
def test_wrong_parameters_are_refused_in_one_line_that_names_them(parameters, named):
    with pytest.raises(ValueError, match="parameters of cotrain-round are not valid") as refusal:
        parse_form("cotrain-round", parameters)
    assert named in str(refusal.value) and "\n" not in str(refusal.value) and len(str(refusal.value)) < 1000


@pytest.mark.parametrize("limit", [0, 10_001, True, "5", 1.5])
def test_the_number_of_reports_to_reproduce_is_a_bounded_integer(limit):
    with pytest.raises(ValueError, match="limit"):
        parse_form("cotrain-reproduce", {"limit": limit})


def test_run_form_has_the_same_fields_as_the_portal():
    fields = ALLOWED_FLOWS["cotrain-round"].build_schema()["properties"]
    properties = RoundParameters.model_json_schema(ref_template="#/definitions/{model}")["properties"]
    assert {name: fields[name] | properties[name] for name in properties} == {name: fields[name] for name in properties}
    assert set(fields) - set(properties) == {"round_id"}


def test_schemas_accept_the_defaults_and_reject_unknown_parameters():
    for flow in ALLOWED_FLOWS.values():
        validator = jsonschema.Draft202012Validator(flow.build_schema())
        assert validator.is_valid(flow.form().model_dump())
        assert not validator.is_valid({"unknown": 1})


def test_only_the_recipes_to_choose_from_may_differ_in_the_schema_of_a_flow():
    round_flow = ALLOWED_FLOWS["cotrain-round"]
    for names in ([], ["demo"], ["demo", "of-our-own"]):
        assert is_schema_of_flow(round_flow.build_schema(names))
    for names in ([1], ["x" * 61], ["Mine"], ["a b"], ["bad\udcff"], [{"$ref": "#"}]):
        assert not is_schema_of_flow(round_flow.build_schema(names))
    assert not is_schema_of_flow({**round_flow.build_schema(["demo"]), "pattern": "^(a+)+$"})
    for schema in (None, [], {}, {"properties": {"recipe": {"anyOf": []}}}):
        assert not is_schema_of_flow(schema)


def test_files_with_names_of_any_kind_never_spoil_the_form_of_a_round(tmp_path):
    """One such file once stopped every flow, since Prefect's gate or its client refused the whole list."""
    (tmp_path / "recipes").mkdir()
    for name in (b"a" * 61, b"bad\xff", b"Mine2", b"My Recipe", b"-x", b"", "加".encode(), b"mine"):
        (tmp_path / "recipes" / os.fsdecode(name + b".toml")).write_text("")
    names = [file.name for file in find_recipe_files(tmp_path)]
    assert "mine" in names and set(names) == {"mine"} | {file.name for file in find_recipe_files(tmp_path / "none")}
    schema = ALLOWED_FLOWS["cotrain-round"].build_schema(names)
    assert is_schema_of_flow(schema) and json.dumps(schema, ensure_ascii=False).encode()
    misnamed = find_misnamed_recipes(tmp_path)
    assert len(misnamed) == 7 and all(reason.endswith("rename the file") for reason in misnamed.values())


def test_run_form_describes_every_value_of_a_recipe_that_a_round_may_replace():
    validator = jsonschema.Draft202012Validator(ALLOWED_FLOWS["cotrain-round"].build_schema())
    for overrides, is_valid in (
        ({"schedule": {"learning_rate": 1e-5}, "length": {"epochs": 3}}, True),
        ({"schedule": {"learning_rate": 2}}, False),
        ({"schedule": {"rate": 1e-5}}, False),
        ({"model": {"preset": "2b"}}, False),
    ):
        assert validator.is_valid({"overrides": overrides}) == is_valid
        if is_valid:
            assert parse_form("cotrain-round", {"overrides": overrides}).overrides == overrides
        else:
            with pytest.raises(ValueError, match=r"overrides\."):
                parse_form("cotrain-round", {"overrides": overrides})


def test_a_request_keeps_every_parameter_of_its_form():
    form = RoundForm(max_steps=7, seed=3, weights={"base": 2.0}, priority=-5)
    assert form.round_parameters() == RoundParameters(max_steps=7, seed=3, weights={"base": 2.0}, priority=-5)
