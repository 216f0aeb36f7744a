"""`cotrain train | evaluate | generate | serve | export | import`: work with models."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli.output import EXIT_USAGE, JsonOption, explain_errors, fail, show, show_progress

if TYPE_CHECKING:
    from flows.context import Context


def add_commands(app: typer.Typer) -> None:
    for command in (train, evaluate, generate, serve, export):
        app.command()(command)
    app.command(name="import")(import_)


def train(
    run: Annotated[Path, typer.Argument(help="run.json of a run folder", exists=True)], as_json: JsonOption = False
) -> None:
    """Train a run to completion, from its last checkpoint if there is one. Ctrl-C stops it; rerun to resume."""
    import os
    import time

    from flows.supervisor.exit_reason import ExitReason, classify
    from infra.confinement import build_confined_environment
    from infra.launchers.job import Job
    from infra.launchers.local import LocalLauncher
    from yuan.train.run_folder import RunFolder

    with explain_errors():
        folder = RunFolder((run if run.is_dir() else run.parent).resolve())
        plan, since = folder.check_inputs().plan, time.time()
        job = Job(
            name=f"train-{os.getpid()}",
            module="yuan.train.run",
            folder=folder.path,
            num_processes=plan.num_ranks,
            processes_per_node=plan.num_ranks,
            environment=build_confined_environment(folder.path, OMP_NUM_THREADS=os.environ.get("OMP_NUM_THREADS", "1")),
        )
        with LocalLauncher().run(job) as running, show_progress() as advance:
            while (ending := running.wait(0.5)) is None:
                advance(folder.read_status(), since)
        run_ending = classify(folder, ending, since)
        if run_ending.reason != ExitReason.FINISHED:
            log_file = folder.path / "train.log"
            raise fail(f"training ended, {run_ending.reason}: {run_ending.message}; the log is {log_file}")
        status = folder.read_status()
        show(status.to_json() if status else {}, f"trained: {folder.export}", as_json)


def open_installation() -> "Context":
    """Connect to the installation; turn off the MLflow client's telemetry before the client is imported."""
    import os

    from infra.settings import NO_TELEMETRY_VARIABLES

    os.environ.update(NO_TELEMETRY_VARIABLES)
    from flows.context import open_context
    from infra.settings import Settings

    return open_context(Settings)


def evaluate(version: Annotated[str, typer.Argument(help="7, v7 or an alias")], as_json: JsonOption = False) -> None:
    """Evaluate a version on every case that it has no result for, and show its pass rates."""
    from feedback.gate import compute_pass_rates

    with explain_errors():
        context = open_installation()
        from flows.round.evaluate import evaluate_version

        number = resolve_version(context, version)
        evaluate_version(context, number)
        with context.sessions() as session:
            pass_rates = {name: rate.to_json() for name, rate in compute_pass_rates(session, number).items()}
    lines = [
        f"{name:28} {r['rate']:.3f}  [{r['interval'][0]:.3f}, {r['interval'][1]:.3f}]  of {r['total']}"
        for name, r in pass_rates.items()
    ]
    show({"version": number, "suites": pass_rates}, "\n".join([f"v{number}", *lines]), as_json)


def generate(
    version: Annotated[str, typer.Argument(help="7, v7, an alias, or a model folder")],
    prompt: Annotated[str, typer.Option(help="prompt text; default: standard input")] = "",
    max_tokens: Annotated[int, typer.Option(min=1)] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: greedy decoding")] = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="sample from the k likeliest tokens; 0: all")] = 0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="keep tokens up to this total probability")] = 1.0,
    repetition_penalty: Annotated[float, typer.Option(help="above 1 avoids tokens that occurred before")] = 1.0,
    stop: Annotated[list[str] | None, typer.Option(help="stop before this text; may be repeated")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    as_json: JsonOption = False,
) -> None:
    """Generate a completion of one prompt. A model folder needs no running stack."""
    with explain_errors():
        folder = _fetch_model_folder(version)
        from yuan.generate.answers import generate as answer
        from yuan.generate.sampling import Sampling
        from yuan.model.weights import load, load_tokenizer

        text = prompt or sys.stdin.read().strip()
        sampling = Sampling(
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            stop=tuple(stop or ()),
            seed=seed,
        )
        completion = answer(load(folder), load_tokenizer(folder), [text], sampling)[0]
        show({"text": completion.text, "finish_reason": completion.finish_reason}, completion.text, as_json)


def export(
    version: Annotated[str, typer.Argument(help="7, v7, an alias, or a model folder")],
    out: Annotated[Path, typer.Option(help="folder to write; must be empty or new")],
    format: Annotated[str, typer.Option(help="hf: the published Hugging Face layout")] = "hf",
    dtype: Annotated[str | None, typer.Option(help="bf16 or fp32; default: as stored")] = None,
    as_json: JsonOption = False,
) -> None:
    """Write a model in a format that other tools read. A model folder needs no running stack."""
    with explain_errors():
        _require_hf_format(format)
        from yuan.model.convert import export_hf

        manifest = export_hf(_fetch_model_folder(version), out, dtype=dtype)
        show(
            {"out": str(out), **manifest}, f"wrote {len(manifest['files'])} files and their manifest to {out}", as_json
        )


def import_(
    folder: Annotated[Path, typer.Argument(help="folder with config.json and weights", exists=True, file_okay=False)],
    out: Annotated[Path, typer.Option(help="folder to write; must be empty or new")],
    format: Annotated[str, typer.Option(help="hf: the published Hugging Face layout")] = "hf",
    dtype: Annotated[str | None, typer.Option(help="bf16 or fp32; default: as stored")] = None,
    as_json: JsonOption = False,
) -> None:
    """Convert published weights, safetensors or pickles, to a model folder; no code in them is executed."""
    with explain_errors():
        _require_hf_format(format)
        from yuan.model.convert import import_hf

        manifest = import_hf(folder, out, dtype=dtype)
        text = f"wrote {out}; next: cotrain generate {out} --prompt ..."
        show({"out": str(out), **manifest}, text, as_json)


def _require_hf_format(format: str) -> None:
    if format != "hf":
        raise fail(f"unknown format {format!r}; use hf, the only one", EXIT_USAGE)


def _fetch_model_folder(version: str) -> Path:
    """Return a model folder unchanged, or fetch a version from the registry."""
    folder = Path(version)
    if folder.is_dir():
        return folder
    if len(folder.parts) > 1:
        raise ValueError(f"there is no folder {folder}; give a model folder, a version as 7 or v7, or an alias")
    context = open_installation()
    from flows.round.versions import require_registered

    number = resolve_version(context, version)
    require_registered(context, number)
    return context.tracker.download(number, context.settings.home / "generate" / f"v{number}")


def serve(alias: Annotated[str, typer.Option(help="registry alias whose version is served")] = "champion") -> None:
    """Run the internal model server in the foreground, at the URL from the settings."""
    from infra.settings import ModelServerSettings, load_settings

    with explain_errors():
        load_settings(ModelServerSettings)
    sys.argv = ["serve", alias]
    from yuan.serve.run import main

    main()


def resolve_version(context: "Context", version: str) -> int:
    """Resolve 7, v7 or an alias to a version number.

    Raises:
        ValueError: if there is no such alias; the message lists the existing aliases.
    """
    if version.removeprefix("v").isdigit():
        return int(version.removeprefix("v"))
    aliases = context.tracker.read_aliases()
    if version not in aliases:
        raise ValueError(f"{version!r} is neither a version nor one of the aliases {json.dumps(aliases)}")
    return aliases[version]
