"""Write mergekit_config.yml, with which mergekit alone makes the merge of a recipe."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optimer_hf.files.reading import yaml_text
from optimer_hf.files.staging import write_text
from optimer_hf.merging.mergekit_pool import mergekit_command, plain_config_of
from optimer_hf.recipes.record import LOCAL_RUN, Lock, Recipe


def write_plain_config(recipe: Recipe, lock: Lock, path: Path) -> bool:
    """Write the config with which mergekit alone makes the merge of a recipe, and return whether
    there is one. If there is none, that of an earlier recipe is taken away.
    """
    config = plain_config_of(recipe, recipe.weights, lock.stored_kinds, recipe.n_layers)
    if config is None:
        path.unlink(missing_ok=True)
        return False
    write_for_mergekit(config, path)
    return True


def write_for_mergekit(config: Mapping[str, Any], path: Path, note: str = "") -> None:
    """Write a config for mergekit alone with local paths, below its command and a `note`."""
    header = f"{LOCAL_RUN}{mergekit_command(config, path.name)}\n"
    write_text(path, header + note + yaml_text(config))
