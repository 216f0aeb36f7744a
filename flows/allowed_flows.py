"""The flows that a worker may run, and the parameters of each.

A flow run only names its flow; module, function and parameter types come from here, never from Prefect's server, since
everybody who has its password can write there.
"""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from feedback.contracts import RECIPE_NAME_RULE, RoundParameters
from yuan.data.rule_text import describe_rule

if TYPE_CHECKING:
    from prefect import Flow

WORK_POOL_NAME = "cotrain"  # of the one work pool at Prefect
ROUND_FLOW = "cotrain-round"
REPRODUCE_FLOW = "cotrain-reproduce"
CHECK_DATASETS_FLOW = "cotrain-check-datasets"
CLEAN_UP_FLOW = "cotrain-clean-up"

MAX_SHOWN_PARAMETER_ERRORS = 5


class RoundForm(RoundParameters):
    """Hold the parameters of a run of `cotrain-round`: those of a new round, or the id of one to continue."""

    round_id: str | None = Field(
        default=None,
        pattern=r"^[0-9a-f]{32}$",
        description="leave empty to request a new round; the dispatcher fills it in",
    )

    def round_parameters(self) -> RoundParameters:
        return RoundParameters(**self.model_dump(exclude={"round_id"}))


class ReproduceForm(BaseModel):
    """Hold the parameters of a run of `cotrain-reproduce`."""

    model_config = ConfigDict(extra="forbid")

    limit: Annotated[int, Field(strict=True)] = Field(
        default=500, ge=1, le=10_000, description="reports to reproduce at most"
    )


class CheckDatasetsForm(BaseModel):
    """Hold the parameters of a run of `cotrain-check-datasets`, which has none: it checks all that wait."""

    model_config = ConfigDict(extra="forbid")


class CleanUpForm(BaseModel):
    """Hold the parameters of a run of `cotrain-clean-up`, which has none: the retention policy decides."""

    model_config = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class AllowedFlow:
    """Define where a flow's function is, and the parameters that it takes.

    Attributes:
        module, function: the function's module and name; it takes one argument, `form`.
        form: the type of the argument.
    """

    module: str
    function: str
    form: type[BaseModel]

    def load(self) -> "Flow[..., Any]":
        flow: Flow[..., Any] = getattr(importlib.import_module(self.module), self.function)
        return flow

    def build_schema(self, recipe_names: Sequence[str] = ()) -> dict[str, Any]:
        """Build the JSON schema by which Prefect validates parameters and from which its UI builds the Run form.

        Args:
            recipe_names: the recipes from which the form lets one choose; none: any name.
        """
        schema = self.form.model_json_schema(ref_template="#/definitions/{model}")
        if recipe_names and "recipe" in schema.get("properties", {}):
            schema["properties"]["recipe"]["anyOf"][0]["enum"] = list(recipe_names)
        for position, field in enumerate(schema.get("properties", {}).values()):
            field["position"] = position
        definitions = schema.pop("$defs", {})  # Prefect looks for them below another name
        return {**schema, "definitions": definitions, "title": "Parameters"}


ALLOWED_FLOWS: Mapping[str, AllowedFlow] = {
    ROUND_FLOW: AllowedFlow("flows.round.flow", "cotrain_round", RoundForm),
    REPRODUCE_FLOW: AllowedFlow("flows.round.flow", "cotrain_reproduce", ReproduceForm),
    CHECK_DATASETS_FLOW: AllowedFlow("flows.check_datasets", "cotrain_check_datasets", CheckDatasetsForm),
    CLEAN_UP_FLOW: AllowedFlow("flows.round.flow", "cotrain_clean_up", CleanUpForm),
}


def is_schema_of_flow(schema: Any) -> bool:
    """Return True if a JSON schema is that of an allowed flow, with any recipes to choose from."""
    try:
        names = schema["properties"]["recipe"]["anyOf"][0].get("enum", [])
    except (KeyError, IndexError, TypeError, AttributeError):
        names = []
    if not isinstance(names, list) or not all(
        isinstance(name, str) and RECIPE_NAME_RULE.is_met_by(name) for name in names
    ):
        return False
    return schema in [flow.build_schema(names) for flow in ALLOWED_FLOWS.values()]


def make_attempt_run_name(round_number: int, attempt: int) -> str:
    """Return the name of the flow run of an attempt at a round.

    >>> make_attempt_run_name(3, attempt=1)
    'round-3-attempt-1'
    """
    return f"round-{round_number}-attempt-{attempt}"


def find_flow(name: str) -> AllowedFlow:
    """Look up a flow by its name.

    Raises:
        ValueError: if no flow of that name is allowed.
    """
    if name not in ALLOWED_FLOWS:
        raise ValueError(
            f"only the flows {', '.join(ALLOWED_FLOWS)} are run here, got {name[:100]!r}; "
            "start one of their deployments, or add the flow to flows/allowed_flows.py"
        )
    return ALLOWED_FLOWS[name]


def parse_form(name: str, parameters: Mapping[str, Any]) -> BaseModel:
    """Validate a run's parameters.

    Raises:
        ValueError: in one line, naming every wrong or unknown parameter.
    """
    form = find_flow(name).form
    try:
        return form.model_validate(parameters)
    except ValidationError as error:
        faults = [
            f"{'.'.join(map(str, e['loc']))[:80] or 'together'}: {describe_rule(e, form)}" for e in error.errors()
        ]
        num_hidden = len(faults) - MAX_SHOWN_PARAMETER_ERRORS
        hidden_hint = f"; and {num_hidden} more" if num_hidden > 0 else ""
        raise ValueError(
            f"parameters of {name} are not valid: {'; '.join(faults[:MAX_SHOWN_PARAMETER_ERRORS])}{hidden_hint}; "
            "see the Run form of its deployment"
        ) from None
