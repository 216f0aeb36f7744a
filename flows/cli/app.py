"""The command line's root: `cotrain NOUN ...`."""

import typer

from flows.cli import contribute, demo, model, plan, pool, register, rounds, stack, withdraw

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    help="The Yuan co-training platform: reports in, a better model out, the reporter told.",
)
stack.add_to(app)
contribute.add_to(app)
withdraw.add_to(app)
rounds.add_to(app)
plan.add_to(app)
pool.add_to(app)
model.add_to(app)
register.add_to(app)
demo.add_to(app)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
