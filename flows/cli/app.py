"""Root of the command line: `cotrain NOUN ...`."""

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import typer
from typer.core import TyperGroup

from flows.cli.lazy_command import LazyCommand
from flows.cli.output import EXIT_USAGE, explain_errors, fail
from infra.telemetry import NO_TELEMETRY_VARIABLES
from yuan.data.text import find_unstorable, make_printable

# Each command's name, its module and function or group there, and the first paragraph of its help; in the order shown.
COMMANDS = (
    ("up", "stack:up", "Start the embedded stack and wait until every service is ready. Idempotent."),
    ("down", "stack:down", "Stop the embedded stack; its data is kept."),
    ("status", "stack:status", "Show the state of every service, the registration that runs, and the faults found."),
    ("logs", "stack:logs", "Print the end of a service's log."),
    (
        "doctor",
        "stack:doctor",
        "Check this machine and the stack, as users experience it, and print each fault with its fix.",
    ),
    (
        "cleanup",
        "cleanup:cleanup",
        "Remove files that the retention policy keeps no longer, as every round does at its end.",
    ),
    (
        "rotate",
        "stack:rotate",
        "Replace the stack's secrets by new ones; a running stack is restarted, and a running round resumes.",
    ),
    (
        "submit",
        "contribute:submit",
        "Report a response. Once accepted, it becomes a test case for every later model.",
    ),
    (
        "plan",
        "plan:plan",
        "Plan a model on a pool: parallel sizes, and layers, recomputation, memory and time of each pipeline stage.",
    ),
    (
        "calibrate",
        "calibrate:calibrate",
        "Measure a layer, the head, links and complete steps on this machine, and write a pool file with these rates.",
    ),
    (
        "train",
        "train:train",
        "Train a run to completion, from its last checkpoint if there is one. Ctrl-C stops it; rerun to resume.",
    ),
    (
        "evaluate",
        "evaluate:evaluate",
        "Evaluate a version on every case that it has no result for, and show its pass rates.",
    ),
    (
        "generate",
        "model:generate",
        "Generate a completion of one prompt. A model folder needs no running stack.",
    ),
    (
        "serve",
        "serve:serve",
        "Run the internal model server in the foreground, at the URL from the settings.",
    ),
    (
        "export",
        "model:export",
        "Write a model in a format that other tools read. A model folder needs no running stack.",
    ),
    (
        "import",
        "model:import_",
        "Convert published weights, safetensors or pickles, to a model folder; no code in them is executed.",
    ),
    (
        "register",
        "register:register",
        "Register weights as a version: convert, upload, smoke test, existing cases. Rerun to continue after a kill.",
    ),
    (
        "promote",
        "promote:promote",
        "Make a version the champion if it passes the gate, with the rules of a round; rerun to continue after a kill.",
    ),
    (
        "demo",
        "demo:demo",
        "Train a base model, report its wrong answers, train a better model, notify the reporter.",
    ),
    ("dataset", "contribute:dataset", "Contribute datasets."),
    ("withdraw", "withdraw:withdraw", "Remove a report or a dataset from training, tests and notices."),
    ("round", "rounds:round_", "Start, show and cancel training rounds."),
    ("recipe", "recipes:recipe", "Show the recipes by which rounds train."),
    ("pool", "pool:pool", "Show and change the devices that runs are scheduled on."),
)


class CommandGroup(TyperGroup):
    """Hold the commands of the table, none of which is imported before it is used."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        for name, place, help in COMMANDS:
            self.add_command(LazyCommand(name, place, help))

    def make_context(self, *arguments: Any, **options: Any) -> Any:
        """Parse the name of a command; `invoke` parses its arguments."""
        with explain_errors():
            return super().make_context(*arguments, **options)

    def invoke(self, ctx: Any) -> Any:
        """Parse and run a command; an error that the user can fix becomes one line, wherever it is raised."""
        with explain_errors():
            return super().invoke(ctx)


app = typer.Typer(cls=CommandGroup, no_args_is_help=True, add_completion=False, pretty_exceptions_show_locals=False)


@app.callback()
def prepare_environment() -> None:
    """The Yuan co-training platform: collect reports, train a better model, notify the reporters."""
    os.environ.update(NO_TELEMETRY_VARIABLES)  # before a command's module imports MLflow


def main() -> None:
    if fault := find_undecoded(sys.argv[1:], os.environ):
        sys.exit(fail(fault, EXIT_USAGE).exit_code)
    app(prog_name="cotrain")


def find_undecoded(arguments: Sequence[str], environment: Mapping[str, str]) -> str | None:
    """Describe the first argument or COTRAIN_ variable that is not UTF-8, which cannot be sent, stored or printed.

    >>> find_undecoded(["withdraw", "--reason", os.fsdecode(b"\\xff")], {})
    'argument 3, after --reason, must be text in UTF-8, got \\\\xff; write or rename it with a program that uses UTF-8'
    """
    texts = {f"variable {name}": value for name, value in environment.items() if name.startswith("COTRAIN_")}
    for number, text in enumerate(arguments):
        option = f", after {arguments[number - 1]}," if number and arguments[number - 1].startswith("-") else ""
        texts[f"argument {number + 1}{option}"] = text

    for place, text in texts.items():
        if find_unstorable(text):
            printable = make_printable(os.fsencode(text).decode(errors="backslashreplace"))
            return f"{place} must be text in UTF-8, got {printable}; write or rename it with a program that uses UTF-8"
    return None


if __name__ == "__main__":
    main()
