"""`cotrain register`: register weights as a version, or restore one that was deleted from the registry."""

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from feedback.contracts import ProvenanceText
from flows.cli.output import (
    PROGRESS_INTERVAL_S,
    JsonOption,
    escape_control_codes,
    make_option_check,
    read_version_option,
    show,
)
from flows.context import Context, open_operator_context
from flows.registration import (
    RegistrationRequest,
    RegistrationResult,
    RegistrationStep,
    find_recorded_versions,
    register_weights,
)
from flows.registration_record import describe_progress
from flows.round.versions import restore_version
from infra.machine import measure_available_memory_gib
from yuan.config import Precision

check_provenance_option = make_option_check(ProvenanceText)


def register(
    folder: Annotated[
        Path,
        typer.Argument(help="published layout, model folder, or a lost version's copy", exists=True, file_okay=False),
    ],
    version: Annotated[
        str,
        typer.Option(help="7 or v7: restore this version; default: the one of the run or the manifest, else a new one"),
    ] = "",
    champion: Annotated[
        bool, typer.Option("--champion", help="make it the champion, if there is none yet and its smoke test passes")
    ] = False,
    source: Annotated[
        str | None, typer.Option(help="where the weights come from, one line", callback=check_provenance_option)
    ] = None,
    licence: Annotated[
        str | None, typer.Option(help="licence of the weights, one line", callback=check_provenance_option)
    ] = None,
    dtype: Annotated[Precision, typer.Option(help="of the version; other weights are rounded to it")] = "bf16",
    as_json: JsonOption = False,
) -> None:
    """Register weights as a version: convert, upload, smoke test, existing cases. Rerun to continue after a kill.

    A version that was deleted from the registry is restored from a copy of its files, and keeps its number here; MLflow
    assigns its own new number, with the tag `cotrain.version`.
    """
    number = read_version_option("--version", version) if version else None
    context = open_operator_context()
    if number is not None or find_recorded_versions(context, folder):
        if champion or source is not None or licence is not None:
            raise ValueError(
                f"{folder} is restored as the version that it was, which keeps its provenance; leave out --champion, "
                "--source and --licence"
            )
        return _restore(context, folder, number, as_json)

    request = RegistrationRequest(
        folder=folder,
        dtype=dtype,
        is_champion=champion,
        source=source,
        licence=licence,
        memory_gib=measure_available_memory_gib(),
    )
    result = register_weights(context, request, ProgressLines())
    fields = {
        "version": result.version,
        "registered": not result.was_registered,
        "digest": result.provenance.digest,
        "smoke_test": result.smoke_test.model_dump(),
        "cases": result.num_cases,
        "champion": result.is_champion,
    }
    show(fields, _describe(result), as_json)


def _restore(context: Context, folder: Path, number: int | None, as_json: bool) -> None:
    restored = restore_version(context, folder, number)
    outcome = " again" if restored.was_missing else "; nothing changed"
    text = f"v{restored.version} is in the registry{outcome}"
    show({"version": restored.version, "registered": restored.was_missing}, text, as_json)


def _describe(result: RegistrationResult) -> str:
    """Describe a registered version in lines, the last of which is what to do next."""
    lines = [f"v{result.version} was registered before" if result.was_registered else f"registered v{result.version}"]
    provenance = result.provenance
    lines[0] += f" in {provenance.dtype}, sha256 {provenance.digest[:16]}…"
    if provenance.stored_dtype != provenance.dtype:
        lines.append(f"rounded from {provenance.stored_dtype}; --dtype fp32 keeps every digit")
    if result.smoke_test.answer is None:
        lines.append(f"not smoke-tested: {result.smoke_test.reason}")
        lines.append("it cannot become the champion; run the command again on a machine that can load it")
    else:
        lines.append(f"smoke test: it answers {result.smoke_test.answer!r}; evaluated on {result.num_cases} more cases")
    if result.is_champion:
        lines.append("it is the champion; next: cotrain round start --recipe NAME")
    return "\n".join(lines)


class ProgressLines:
    """Print the progress of a registration on stderr: a line at the begin of each step, then every few seconds."""

    def __init__(self) -> None:
        self._step: RegistrationStep | None = None
        self._begun_at = self._printed_at = time.monotonic()

    def __call__(self, step: RegistrationStep, done_bytes: int = 0, total_bytes: int = 0) -> None:
        now = time.monotonic()
        if step != self._step:
            self._step, self._begun_at = step, now
        elif now - self._printed_at < PROGRESS_INTERVAL_S:
            return
        self._printed_at = now
        print(
            escape_control_codes(describe_progress(step, done_bytes, total_bytes, now - self._begun_at)),
            file=sys.stderr,
        )
