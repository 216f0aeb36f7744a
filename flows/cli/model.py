"""`cotrain generate | export | import`: use and convert model folders."""

import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from flows.cli.output import JsonOption, check_text_option, check_version, name_options, note_alias, parse_path, show
from infra.folder_cache import CachedFolder
from yuan.config import MAX_MODEL_SIZE, MAX_SEED, Precision, format_count
from yuan.generate.limits import Sampling

ModelFormatOption = Annotated[Literal["hf"], typer.Option(help="hf: the published Hugging Face layout")]
WeightsDtypeOption = Annotated[Precision | None, typer.Option(help="default: as stored")]


def generate(
    version: Annotated[str, typer.Argument(help="7, v7, an alias, or a model folder", callback=check_text_option)],
    prompt: Annotated[str, typer.Option(help="prompt text; default: standard input")] = "",
    max_tokens: Annotated[int, typer.Option(min=1, max=MAX_MODEL_SIZE)] = 64,
    temperature: Annotated[float, typer.Option(help="0 to 100; 0: greedy decoding")] = 0.0,
    top_k: Annotated[int, typer.Option(help="sample from the k likeliest tokens; 0: all")] = 0,
    top_p: Annotated[float, typer.Option(help="keep tokens up to this total probability, above 0 to 1")] = 1.0,
    repetition_penalty: Annotated[
        float, typer.Option(help="0.01 to 100; above 1 avoids tokens that occurred before")
    ] = 1.0,
    stop: Annotated[list[str] | None, typer.Option(help="stop before this text; may be repeated")] = None,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED)] = 0,
    as_json: JsonOption = False,
) -> None:
    """Generate a completion of one prompt. A model folder needs no running stack."""
    with name_options():
        sampling = Sampling(
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            stop=tuple(stop or ()),
            seed=seed,
        )
    model_folder = _open_model_folder(version)
    # Imported here, as in the other commands: torch takes seconds, and no model may be there.
    from yuan.generate.answers import generate as generate_answers
    from yuan.model.weights import load, load_tokenizer

    text = prompt or sys.stdin.read().strip()
    with model_folder as model:
        weights = load(model.path, is_verified=model.is_verified)
        completion = generate_answers(weights, load_tokenizer(model.path), [text], sampling)[0]
    show({"text": completion.text, "finish_reason": completion.finish_reason}, completion.text, as_json)


def export(
    version: Annotated[str, typer.Argument(help="7, v7, an alias, or a model folder", callback=check_text_option)],
    out: Annotated[Path, typer.Option(help="folder to write; must be empty or new", parser=parse_path, metavar="PATH")],
    format: ModelFormatOption = "hf",
    dtype: WeightsDtypeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a model in a format that other tools read. A model folder needs no running stack."""
    model_folder = _open_model_folder(version)
    from yuan.model.convert import export_hf

    with model_folder as model:
        manifest = export_hf(model.path, out, dtype=dtype)
    show(
        {"out": str(out), **manifest.to_json()},
        f"wrote {format_count(len(manifest.files), 'file')} and their manifest to {out}",
        as_json,
    )


def import_(
    folder: Annotated[Path, typer.Argument(help="folder with config.json and weights", exists=True, file_okay=False)],
    out: Annotated[Path, typer.Option(help="folder to write; must be empty or new", parser=parse_path, metavar="PATH")],
    format: ModelFormatOption = "hf",
    dtype: WeightsDtypeOption = None,
    rope_precision: Annotated[
        Precision | None,
        typer.Option(help="of the rotary angles in training; default: config.json's, else that of the weights"),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Convert published weights, safetensors or pickles, to a model folder; no code in them is executed."""
    from yuan.model.convert import import_hf

    manifest = import_hf(folder, out, dtype=dtype, rope_precision=rope_precision)
    text = f"wrote {out}; next: cotrain generate {out} --prompt ..."
    show({"out": str(out), **manifest.to_json()}, text, as_json)


def _open_model_folder(version: str) -> CachedFolder:
    """Return a model folder as it is, or that of a version, which stays in the cache until it is closed."""
    folder = Path(version)
    if folder.is_dir():
        return CachedFolder(folder, None)
    if folder.exists():
        raise ValueError(f"{version} is a file; give the model folder itself, a version as 7 or v7, or an alias")
    if os.sep in version or version.startswith((".", "~")):
        raise ValueError(f"there is no folder {version}; give a model folder, a version as 7 or v7, or an alias")
    try:
        check_version(version)
    except typer.BadParameter as error:
        raise typer.BadParameter(f"{error.message}, or a model folder", param_hint=["VERSION"]) from None
    with note_alias(version):
        # Imported here, since a model folder needs no registry, and the import of MLflow takes a second.
        from flows.context import open_operator_context
        from flows.model_folders import open_model_folder

        context = open_operator_context()
    return open_model_folder(context, version)
