"""Read mergekit's YAML and return a config in which mergekit reads every key."""

import functools
import logging
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from optimer_hf.errors import ConfigError
from optimer_hf.files.paths import Place
from optimer_hf.files.reading import read_yaml
from optimer_hf.files.text import first_line
from optimer_hf.merging.mergekit_keys import Keys, check_merge_config, keep_read_keys
from optimer_hf.merging.mergekit_models import model_name, with_models
from optimer_hf.merging.mergekit_table import KEYS, VERSION

logger = logging.getLogger(__name__)


def read_merge_config(path: Path, *, warns: bool = True) -> dict[str, Any]:
    """Return a mergekit YAML as a mapping, without the keys that its merge method ignores; a
    warning names those.

    Raises ConfigError with one line for each mistake: keys that no merge method knows, values that
    the method does not accept, and everything else that mergekit would refuse before it opens a
    model. Imports mergekit, which takes seconds, when the keys are right.
    """
    keys = known_keys()
    config, ignored = read_keys(path, keys)
    if ignored and warns:
        named = ", ".join(".".join(map(str, place)) for place in ignored)
        method = config["merge_method"]
        logger.warning("%s: merge_method %s does not read %s; left out", path, method, named)
    read = keep_read_keys(config, ignored, keys)
    for field in ("dtype", "out_dtype"):
        if field in read:  # mergekit would copy the prefix into config.json, which then fails
            read[field] = str(read[field]).removeprefix("torch.")
    parse_with_mergekit(read, path)
    return read


def read_keys(path: Path, keys: Keys) -> tuple[dict[str, Any], list[Place]]:
    """Return the fields of a mergekit YAML that have a value, and the places of those that its
    merge method ignores. Raises the ConfigError of `check_merge_config`.
    """
    config = {key: value for key, value in read_yaml(path).items() if value is not None}
    return config, check_merge_config(config, path, keys)


def parse_with_mergekit(config: Mapping[str, Any], path: Path) -> Any:
    """Return a config as mergekit's own object. Raises ConfigError for what mergekit refuses.

    The models keep the order of the file. mergekit's own order changes from run to run, and its
    first model provides config and tokenizer when there is no base_model, and ids for new tokens.
    """
    folder = path.resolve().parent
    long = with_models(config, lambda value: model_name(value, folder).long_form)
    try:
        return _ordered_configuration().model_validate(long)
    except (ValueError, RuntimeError) as error:
        reason = first_line(error)
        raise ConfigError(f"{path}: mergekit refuses this config: {reason}.") from error


@functools.cache
def _ordered_configuration() -> Any:
    from mergekit.common import ModelReference
    from mergekit.config import MergeConfiguration

    class OrderedConfiguration(MergeConfiguration):
        def referenced_models(self) -> list[ModelReference]:
            layers = [self, *(self.modules or {}).values()]
            models = [self.base_model] if self.base_model else []
            for layer in layers:
                models += [entry.model for entry in layer.models or ()]
                for piece in layer.slices or ():
                    models += [source.model for source in piece.sources]
            return list(dict.fromkeys(models))

    return OrderedConfiguration


def chat_templates() -> dict[str, str]:
    """Return the chat templates that come with mergekit, by name."""
    import importlib.resources

    from mergekit._data import chat_templates as folder

    files = importlib.resources.files(folder).iterdir()
    return {
        file.name.removesuffix(".jinja"): file.read_text(encoding="utf-8")
        for file in files
        if file.name.endswith(".jinja")
    }


def known_keys() -> Keys:
    """Return the keys of mergekit from the table, without importing it. mergekit itself is asked
    where it may know more: in another version, or once it is imported, since programs can register
    merge methods.
    """
    is_imported = "mergekit.merge_methods.registry" in sys.modules
    return mergekit_keys() if is_imported or version("mergekit") != VERSION else KEYS


@functools.cache
def mergekit_keys() -> Keys:
    """Return the keys of the installed mergekit, with the merge method of this package."""
    from mergekit import config as blocks
    from mergekit.merge_methods.registry import registered_methods
    from mergekit.tokenizer import config as tokenizers

    from optimer_hf.merging.mergekit_method import register_method

    register_method()
    models = {
        "config": blocks.MergeConfiguration,
        "module": blocks.OutputModuleDefinition,
        "model": blocks.InputModelDefinition,
        "slice": blocks.OutputSliceDefinition,
        "source": blocks.InputSliceDefinition,
        "tokenizer": tokenizers.TokenizerConfig,
        "token": tokenizers.TokenEmbeddingConfig,
        "model_token": tokenizers.ModelTokenEmbedding,
        "zero": tokenizers.ZeroEmbedding,
    }
    parameters = {
        method.spec.name: {each.name: each.value_type for each in method.spec.parameters}
        for method in registered_methods()
    }
    fields = {block: list(model.model_fields) for block, model in models.items()}
    return Keys(fields, parameters, chat_templates().keys())
