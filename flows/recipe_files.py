"""Find and read recipes: those that the platform ships, and the operator's own in `$COTRAIN_HOME/recipes`."""

import importlib.resources
from dataclasses import dataclass
from pathlib import Path

from feedback.contracts import RECIPE_NAME_RULE
from yuan.config import suggest_nearest_name
from yuan.data.text import make_printable
from yuan.recipe import MAX_RECIPE_BYTES, Recipe, parse_recipe
from yuan.safe_files import read_regular_file

CUSTOM_RECIPES_FOLDER = "recipes"  # in the home folder
RECIPE_SUFFIX = ".toml"


@dataclass(frozen=True)
class RecipeFile:
    """A recipe by name, and its file.

    Attributes:
        is_custom: it is in the home folder, not shipped.
    """

    name: str
    path: Path
    is_custom: bool

    def read(self) -> bytes:
        """Return the content.

        Raises:
            ValueError: if it cannot be read.
        """
        try:
            return read_regular_file(self.path, MAX_RECIPE_BYTES)
        except OSError as error:
            raise ValueError(f"the recipe {self.path} cannot be read: {error.strerror}; correct or remove it") from None


def find_recipe_files(home: Path, *, all_of_a_name: bool = False) -> list[RecipeFile]:
    """List the shipped recipes and those of a home folder, by name; of one name in both, the shipped one counts.

    Files whose names break the rule are left out: see `find_misnamed_recipes`.

    Args:
        all_of_a_name: also list those that do not count.
    """
    shipped = Path(str(importlib.resources.files("flows.recipes")))
    custom = home / CUSTOM_RECIPES_FOLDER
    files = [
        RecipeFile(path.stem, path, True)
        for path in custom.glob(f"*{RECIPE_SUFFIX}")
        if RECIPE_NAME_RULE.is_met_by(path.stem)
    ]
    files += [RecipeFile(path.stem, path, False) for path in shipped.glob(f"*{RECIPE_SUFFIX}")]
    counted_files = files if all_of_a_name else list({file.name: file for file in files}.values())
    return sorted(counted_files, key=lambda file: file.name)


def find_misnamed_recipes(home: Path) -> dict[str, str]:
    """Return the printable paths of files that no round can name as its recipe, each with the reason and what to do."""
    paths = sorted((home / CUSTOM_RECIPES_FOLDER).glob(f"*{RECIPE_SUFFIX}"))
    return {
        make_printable(str(path)): f"the name must be {RECIPE_NAME_RULE.words}, of at most "
        f"{RECIPE_NAME_RULE.max_length} characters without {RECIPE_SUFFIX}; rename the file"
        for path in paths
        if not RECIPE_NAME_RULE.is_met_by(path.stem)
    }


def find_recipe_file(home: Path, name: str) -> RecipeFile:
    """Return the file of a recipe.

    Raises:
        ValueError: if there is none of that name.
    """
    files = {file.name: file for file in find_recipe_files(home)}
    if name not in files:
        suggestion = suggest_nearest_name(name, files)
        raise ValueError(
            f"there is no recipe {make_printable(name, 60)!r}; {suggestion or 'see `cotrain recipe list`'} A recipe of "
            f"your own is a file {home / CUSTOM_RECIPES_FOLDER / 'NAME.toml'}"
        )
    return files[name]


def load_recipe(home: Path, name: str) -> Recipe:
    """Read the recipe of a name.

    Raises:
        ValueError: if there is none, or its file breaks a rule.
    """
    return parse_recipe(find_recipe_file(home, name).read(), name)
