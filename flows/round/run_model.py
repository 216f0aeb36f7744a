"""The model that a round's run trains: the parent's, or new weights of the recipe's preset."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from flows.context import Context
from flows.recipe_files import CUSTOM_RECIPES_FOLDER
from flows.round.versions import open_version
from infra.error_text import SafeMessageError
from yuan import tokenizer as tokenizers
from yuan.config import MODEL_CONFIG_FILE, MODEL_PRESETS, ModelConfig
from yuan.recipe import TRAINED_TOKENIZER, Recipe
from yuan.recipe_resolution import pad_vocab_size
from yuan.train.run_folder import RunFolder
from yuan.version_names import parse_version_number


@dataclass(frozen=True)
class RunModel:
    """The config of the model that a run trains, and its tokenizer."""

    config: ModelConfig
    tokenizer: tokenizers.Tokenizer


class RoundUnfit(SafeMessageError, ValueError):
    """A round's recipe, data, parent and pool do not fit together; the message says what to change."""


def choose_parent(recipe: Recipe, champion: int | None) -> int | None:
    """Return the version whose weights a run starts from; None: new weights.

    Raises:
        RoundUnfit: if the recipe needs a parent and there is no champion.
    """
    if recipe.model.weights == "new":
        return None
    if champion is None and recipe.model.weights == "parent":
        raise RoundUnfit(
            "the recipe needs a parent's weights, and there is no champion; register published weights with `cotrain "
            "register DIR`, or start a round with a recipe of new weights"
        )
    return champion


def prepare_model(
    context: Context,
    folder: RunFolder,
    recipe: Recipe,
    parent_version: int | None,
    texts: Iterable[str],
) -> RunModel:
    """Return config and tokenizer of the parent, to whose folder in the cache `parent/` links, or of new weights.

    Args:
        texts: of the rows, for a tokenizer that is trained here; read only then.

    Raises:
        RoundUnfit: if the parent is not of the recipe's shape, the tokenizer does not fit, or windows are longer than
            the model's positions.
    """
    if parent_version is not None:
        # Not closed: the later steps of the round use it as well, and its lock ends with this process.
        parent = open_version(context, parent_version)
        link_parent(folder, parent.path)
        model = read_parent_model(parent.path, recipe, parent_version)
    else:
        model = make_new_model(recipe, context.settings.home / CUSTOM_RECIPES_FOLDER, texts)
    if recipe.data.seq_len > model.config.seq_len:
        raise RoundUnfit(
            f"data.seq_len must not be above the {model.config.seq_len:,} positions of {model.config.name}, got "
            f"{recipe.data.seq_len:,}; lower it"
        )
    return model


def link_parent(folder: RunFolder, model: Path) -> None:
    """Make `parent/` of a run a link to a model folder in the cache, relative, so that the home folder can be moved."""
    with contextlib.suppress(FileNotFoundError):
        folder.parent.unlink()
    folder.parent.symlink_to(os.path.relpath(model, folder.path))


@contextlib.contextmanager
def hold_parent(context: Context, folder: RunFolder) -> Iterator[tuple[Path, ...]]:
    """Keep the parent of a run in the cache while the block runs, and yield the folders that its ranks must read.

    A parent that the cache has lost is fetched again. A folder that an earlier version of the platform copied into the
    run folder, or an operator put there, is used as it is.

    Raises:
        ValueError: if run.json cannot be read, or as `open_version`.
    """
    parent = None if folder.is_finished else folder.read_spec().parent
    if parent is None or (folder.parent.is_dir() and not folder.parent.is_symlink()):
        yield ()
        return
    # By the version's number and never by the link, which ranks can change.
    with open_version(context, parse_version_number(parent)) as model:
        link_parent(folder, model.path)
        yield (model.path,)


def read_parent_model(model_folder: Path, recipe: Recipe, version: int) -> RunModel:
    """Read config and tokenizer of a parent's model folder.

    Raises:
        RoundUnfit: if the parent is not of the recipe's shape, or its tokenizer does not fit its vocabulary.
    """
    config = ModelConfig.from_json(json.loads((model_folder / MODEL_CONFIG_FILE).read_text()))
    check_parent_shape(recipe, config, version)
    try:
        tokenizer = tokenizers.load(model_folder)
        tokenizer.check_fits(config.vocab_size)
    except ValueError as error:
        raise RoundUnfit(f"the tokenizer of v{version}: {error}") from None
    return RunModel(config, tokenizer)


def check_parent_shape(recipe: Recipe, config: ModelConfig, version: int) -> None:
    """Check that a parent has the shape of the recipe's preset.

    Raises:
        RoundUnfit: if it has another one.
    """
    if recipe.model.preset == "parent":
        return
    preset = MODEL_PRESETS[recipe.model.preset]()
    for name in ("num_layers", "hidden_size", "num_heads"):
        expected, actual = getattr(preset, name), getattr(config, name)
        if expected != actual:
            raise RoundUnfit(
                f"the recipe trains {recipe.model.preset} with {name} {expected:,}, and v{version} has {actual:,}; use "
                "a recipe for its shape, or promote a version of this shape"
            )


def make_new_model(recipe: Recipe, recipes: Path, texts: Iterable[str]) -> RunModel:
    """Return the recipe's preset, with a tokenizer trained on the texts or read from a folder of the recipes.

    Raises:
        RoundUnfit: if there is no tokenizer, or it has more tokens than the preset.
    """
    make_config = MODEL_PRESETS[recipe.model.preset]
    if recipe.model.tokenizer == TRAINED_TOKENIZER:
        assert recipe.model.tokenizer_vocab_size is not None, "the recipe's rule"
        tokenizer = tokenizers.train(texts, vocab_size=recipe.model.tokenizer_vocab_size)
        return RunModel(dataclasses.replace(make_config(), vocab_size=pad_vocab_size(len(tokenizer))), tokenizer)
    config = make_config()
    try:
        tokenizer = tokenizers.load(recipes / recipe.model.tokenizer)
        tokenizer.check_fits(config.vocab_size)
    except ValueError as error:
        raise RoundUnfit(f"the tokenizer of new weights of {recipe.model.preset}: {error}") from None
    return RunModel(config, tokenizer)
