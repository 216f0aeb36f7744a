"""Root of the command line: `cotrain NOUN ...`."""

import os
import sys
from collections.abc import Mapping, Sequence

import typer

from flows.cli import contribute, demo, model, plan, pool, register, rounds, stack, withdraw
from flows.cli.output import EXIT_USAGE, fail
from yuan.data.text import find_unstorable, make_printable

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    help="The Yuan co-training platform: collect reports, train a better model, notify the reporters.",
)
stack.add_commands(app)
contribute.add_commands(app)
withdraw.add_commands(app)
rounds.add_commands(app)
plan.add_commands(app)
pool.add_commands(app)
model.add_commands(app)
register.add_commands(app)
demo.add_commands(app)


def main() -> None:
    if fault := find_undecoded(sys.argv[1:], os.environ):
        sys.exit(fail(fault, EXIT_USAGE).exit_code)
    app()


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
