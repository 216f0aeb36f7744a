"""Values of a recipe that a round replaces, and the schema of the form in which they are given."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, GetJsonSchemaHandler, create_model
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

from yuan.recipe import (
    BatchSection,
    CheckpointSection,
    DataSection,
    EvaluationSection,
    GuardSection,
    LengthSection,
    MixtureSection,
    OptimizerSection,
    Recipe,
    ScheduleSection,
    Section,
    ValidationSection,
    validate_recipe,
)

# Values that a round may replace: none that says which model and tokenizer are read.
OVERRIDABLE_SECTIONS: dict[str, type[Section]] = {
    "data": DataSection,
    "mixture": MixtureSection,
    "batch": BatchSection,
    "length": LengthSection,
    "schedule": ScheduleSection,
    "optimizer": OptimizerSection,
    "validation": ValidationSection,
    "evaluation": EvaluationSection,
    "checkpoints": CheckpointSection,
    "guard": GuardSection,
}
LENGTH_UNITS = ("steps", "tokens", "epochs")


def _make_override_model() -> type[BaseModel]:
    """Make the type of a round's replacements: the sections of a recipe, with no value required."""
    config = ConfigDict(extra="forbid", strict=True)
    sections: dict[str, Any] = {}
    for name, section in OVERRIDABLE_SECTIONS.items():
        fields: dict[str, Any] = {}
        for key, field in section.model_fields.items():
            annotation: Any = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
            fields[key] = (annotation | None, Field(default=None, description=field.description))
        model = create_model(f"{section.__name__}Overrides", __config__=config, **fields)
        sections[name] = (model | None, Field(default=None, description=section.__doc__))
    return create_model("RecipeOverrides", __config__=config, **sections)


_OVERRIDE_MODEL = _make_override_model()


class OverrideRule:
    """Validate an annotated `dict[str, dict[str, Any]]`: values by section and key that replace those of a recipe.

    The JSON schema has a form of every section, from which a user interface shows each value with its rule.

    Attributes:
        form: the type of the values, in which errors look up the names of fields.
    """

    form = _OVERRIDE_MODEL

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        model = handler.generate_schema(_OVERRIDE_MODEL)
        return core_schema.no_info_after_validator_function(
            lambda value: value.model_dump(exclude_none=True),
            model,
            serialization=core_schema.plain_serializer_function_ser_schema(lambda value: value),
        )

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return handler(_OVERRIDE_MODEL.__pydantic_core_schema__)


RecipeOverrides = Annotated[dict[str, dict[str, Any]], OverrideRule()]


def override_recipe(recipe: Recipe, name: str, overrides: Mapping[str, Mapping[str, Any]]) -> Recipe:
    """Replace values of a recipe, given by section and key.

    A length replaces the recipe's, whatever its unit; replaced values lose their source.

    Raises:
        ValueError: if the result contradicts itself.
    """
    tables: dict[str, Any] = recipe.to_json()
    replaced = {f"{section}.{key}" for section, values in overrides.items() for key in values}
    for section, values in overrides.items():
        table = tables.get(section, {})
        if section == "length" and any(unit in values for unit in LENGTH_UNITS):
            table = {key: value for key, value in table.items() if key not in LENGTH_UNITS}
            replaced.update(f"length.{unit}" for unit in LENGTH_UNITS)
        tables[section] = {**table, **values}
    tables["sources"] = {place: source for place, source in recipe.sources.items() if place not in replaced}
    return validate_recipe(tables, name)
