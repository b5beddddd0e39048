"""Build the model of a recipe, and verify a built model against the lock."""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from optimer_hf.errors import ConfigError, ModelError, OptimerError
from optimer_hf.files.locks import remove_dead_locks
from optimer_hf.files.reading import yaml_text
from optimer_hf.files.reference import is_there
from optimer_hf.files.staging import finish_move, replacing
from optimer_hf.merging.union import open_base
from optimer_hf.merging.writer import write_merged
from optimer_hf.models.layout import (
    MAX_SHARD_SIZE,
    ResolvedModel,
    files_beside_weights,
    role_of,
    tokenizer_digests,
    weight_digests,
)
from optimer_hf.models.loader import read_tokenizer
from optimer_hf.models.resolve import resolve_model
from optimer_hf.models.shards import files_in_shards
from optimer_hf.models.union import UnionRecord
from optimer_hf.recipes.record import LOCK, Lock, Recipe
from optimer_hf.recipes.write import digests_of_tokenizer
from optimer_hf.report.captions import CAPTIONS, CARD_FILES
from optimer_hf.vectors.groups import weights_of_parts
from optimer_hf.vectors.layers import layers_for
from optimer_hf.vectors.opening import open_vector
from optimer_hf.vectors.splitting import idle_weights, split_pool
from optimer_hf.vectors.vector import AdapterVector

logger = logging.getLogger(__name__)

LARGEST_FILE = 2**50  # bytes


def build(
    path: Path,
    out: Path,
    *,
    out_dtype: str | None = None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    device: str = "cpu",
    replace: bool = False,
) -> None:
    """Build the merged model of a recipe into `out`, with its recipe, lock and figures.

    `device` does the arithmetic. `max_shard_size` is in bytes, or a text such as 5GB. With
    `replace`, the model takes the place of another one in `out`, which stays until then. A whole
    model of this recipe and lock that is already in `out` stays, and the files beside its weights
    are updated.

    Raises ModelError if base, vectors or tokenizer are not the locked ones, before anything is
    written.
    """
    n_bytes = _parse_size(max_shard_size)
    recipe = Recipe.read(path)
    lock_file = path.with_suffix(".lock.json")
    base = resolve_model(recipe.base_model)
    lock = read_lock(lock_file, recipe, base)
    base, tokenizer = open_base(base, recipe.sources, recipe.tokenizer_reference, recipe.vocabulary)
    if lock is not None:
        _check_added_tokens(lock, recipe, base)
    opened = [
        open_vector(name, ingredient.source, base) for name, ingredient in recipe.vectors.items()
    ]
    vectors = split_pool(opened, recipe.groups, base, idle=idle_weights(recipe.weights))
    write = partial(
        write_merged,
        base,
        vectors,
        weights_of_parts(recipe.weights, recipe.groups, layers_for(recipe.groups, base)),
        out,
        out_dtype=out_dtype or recipe.dtype,
        tokenizer=tokenizer,
        max_shard_size=n_bytes,
        device=device,
        replace=replace,
    )
    if lock is None:
        write()
        return
    asked = {"dtype": out_dtype or recipe.dtype, "max_shard_size": n_bytes}
    beside = files_beside_weights(base.path, tokenizer=tokenizer.path if tokenizer else None)
    finish_move(out)
    built = _lock_of_built(lock, out, asked, [*beside])
    if built is None:
        built = _write_locked(write, recipe, path.parent, lock, asked, out)
    else:
        logger.info("%s: holds the model of this recipe already; nothing to build", out)
        _write_beside(recipe, path.parent, built, out, out)
    if out_dtype is None:
        _keep_output(lock_file, out, built, any(isinstance(v, AdapterVector) for v in vectors))


def _parse_size(size: int | str) -> int:
    from accelerate.utils import convert_file_size_to_int

    try:
        n_bytes = int(convert_file_size_to_int(size))
    except (ValueError, OverflowError):
        n_bytes = 0
    if not 0 < n_bytes <= LARGEST_FILE:
        raise ConfigError(f"--max-shard-size: found {size!r}, expected e.g. 5GB.")
    return n_bytes


def _with_output(lock: Lock, model: Path, asked: Mapping[str, Any]) -> Lock:
    """Return the lock of a recipe with the digests of its model and the options of the build."""
    return lock.model_copy(update={"output": weight_digests(model), **asked})


def _lock_of_built(
    lock: Lock, model: Path, asked: Mapping[str, Any], beside: Sequence[str]
) -> Lock | None:
    """Return the lock of a model that is what a build after `lock` gives; None if it is another
    model, or lacks one of the files `beside` its weights.
    """
    if not all((model / name).is_file() for name in beside):
        return None
    try:
        built = _with_output(lock, model, asked)
        recorded = Lock.read(model / LOCK) if is_there(model / LOCK) else None
    except OptimerError:
        return None
    return built if built.output and built in (lock, recorded) else None


def _write_locked(
    write: Callable[..., None],
    recipe: Recipe,
    figures: Path,
    lock: Lock,
    asked: Mapping[str, Any],
    out: Path,
) -> Lock:
    """Write a model with `write`, and its recipe, lock and figures beside it; return the lock."""

    def complete(staging: Path) -> None:
        _write_beside(recipe, figures, _with_output(lock, staging, asked), staging, out)

    write(complete=complete)
    return Lock.read(out / LOCK)


def _keep_output(lock_file: Path, out: Path, built: Lock, has_adapters: bool) -> None:
    """Lock the files of the first build. Compare those of a later build with them."""
    lock = Lock.read(lock_file)
    if not lock.output:
        built.write(lock_file)
        return
    remove_dead_locks(lock_file.parent)  # of a build that was killed when it had written the lock
    output = built.output
    if output != lock.output and built.max_shard_size != lock.max_shard_size:
        output = files_in_shards(out, lock.max_shard_size)
    if lock.output != output and has_adapters:
        logger.warning(
            "%s: some bits differ from those of the model built first. LoRA products round "
            "differently on another processor",
            out,
        )
    elif lock.output != output:
        raise ModelError(
            f"{out}: differs from the model that this recipe built first ({lock_file.name}). It "
            "was kept."
        )


def _write_beside(recipe: Recipe, figures: Path, built: Lock, model: Path, out: Path) -> None:
    """Write the recipe and the lock of a built model into it, so that it can be verified and
    published, and the figures of its card from the folder `figures`. Files that are already right
    stay. `out` is the final place of the model.
    """
    built_recipe = recipe.model_copy(update={"dtype": built.dtype})
    folder = {"folder": out.resolve()}
    written = built_recipe.model_dump(mode="json", exclude_none=True, context=folder)
    files = {"recipe.yaml": yaml_text(written).encode()}
    if (figures / CAPTIONS).exists():
        there = [name for name in CARD_FILES if is_there(figures / name)]
        files |= {name: (figures / name).read_bytes() for name in there}
    for name, data in files.items():
        if not is_there(model / name) or (model / name).read_bytes() != data:
            with replacing(model / name) as partial:
                partial.write_bytes(data)
    if not is_there(model / LOCK) or Lock.read(model / LOCK) != built:
        built.write(model / LOCK)


def read_lock(file: Path, recipe: Recipe, base: ResolvedModel) -> Lock | None:
    """Return the lock of a recipe, or None if there is none.

    Raises ModelError unless base, vectors, weights, dtype and tokenizer are the locked ones.
    """
    if not file.exists():
        return None
    lock = Lock.read(file)
    _check_weights(lock, recipe)
    parts = {"base_model": (lock.base, base.path)}
    for name, ingredient in recipe.vectors.items():
        parts[f"vectors.{name}"] = (
            lock.vectors.get(name, {}),
            resolve_model(ingredient.source).path,
        )
    for field, (expected, directory) in parts.items():
        if weight_digests(directory) != expected:
            raise ModelError(
                f"{recipe.name}: {field}: the weights in {directory} are not the locked ones. "
                "Fetch them again, or write the recipe again with `optimer recipe`."
            )
    if digests_of_tokenizer(recipe.tokenizer_reference) != lock.tokenizer:
        raise ModelError(
            f"{recipe.name}: tokenizer_source: found {recipe.tokenizer_reference or 'base'}, whose "
            "tokenizer, chat template or generation config is not the locked one. Fetch it again, "
            "or write the recipe again with `optimer recipe`."
        )
    return lock


def _check_added_tokens(lock: Lock, recipe: Recipe, base: ResolvedModel) -> None:
    """Raise ModelError if the base of the merge, with the tokens of the vectors, has others."""
    union = UnionRecord.of(base.path)
    if (union.added if union is not None else {}) != lock.added_tokens:
        raise ModelError(
            f"{recipe.name}: vocabulary: the vectors have other tokens than the locked ones. Fetch "
            "their tokenizers again, or write the recipe again with `optimer recipe`."
        )


def _check_weights(lock: Lock, recipe: Recipe) -> None:
    if (recipe.weights, recipe.dtype) != (lock.weights, lock.dtype):
        raise ModelError(
            f"{recipe.name}: the weights or the dtype are not the locked ones. The recipe was "
            "edited, or `optimer recipe` was stopped: restore it, or run that command again. To "
            "make another recipe of it, delete the lock."
        )


def verify(path: Path, model: Path) -> None:
    """Raise ModelError unless a built model is the one that the lock of a recipe records, and the
    recipe has the weights of its lock.

    The weights and, if it is not that of the base, the tokenizer are compared by sha256. A model
    in other shards than the locked one is hashed as if it were in those.
    """
    lock_file = path.with_suffix(".lock.json")
    if not path.is_file() or not lock_file.is_file():
        lacking = f"has no {lock_file.name} beside it" if path.is_file() else "no such recipe file"
        raise ConfigError(f"{path}: {lacking}. `optimer recipe STUDY_DIR {path}` writes both.")
    recipe, lock = Recipe.read(path), Lock.read(lock_file)
    _check_weights(lock, recipe)
    if not lock.output:
        raise ModelError(
            f"{path}: its lock records no built model. Run `optimer build {path} OUT` first."
        )
    if not model.is_dir():
        if is_there(model):
            raise ModelError(f"{model}: found a file, expected the directory of a built model.")
        raise ModelError(f"{model}: no such model. Build it: `optimer build {path} {model}`.")
    beside = model / LOCK
    built, output = Lock.read(beside) if beside.exists() else lock, weight_digests(model)
    if output != lock.output and built.max_shard_size != lock.max_shard_size:
        output = files_in_shards(model, lock.max_shard_size)
    for name in sorted(lock.output.keys() | output.keys()):
        if output.get(name) != lock.output.get(name):
            raise ModelError(
                f"{model / name}: sha256 differs from {lock_file.name}. Build it again."
            )
    _verify_tokens(lock, model, lock_file.name)
    tokenizer = tokenizer_digests(model)
    for name in sorted(lock.tokenizer):
        if lock.added_tokens and role_of(name) not in ("template", "generation"):
            continue  # a union writes the others anew
        if tokenizer.get(name) != lock.tokenizer[name]:
            raise ModelError(
                f"{model / name}: not the tokenizer that {lock_file.name} records. Build it again."
            )


def _verify_tokens(lock: Lock, model: Path, lock_name: str) -> None:
    """Raise ModelError if the tokenizer of a built model gives an added token another id."""
    if not lock.added_tokens:
        return
    ids = read_tokenizer(model).get_vocab()
    for token, added in lock.added_tokens.items():
        if ids.get(token) != added.id:
            raise ModelError(
                f"{model}: its tokenizer gives the token {token!r} the id {ids.get(token)}, and "
                f"{lock_name} records {added.id}. Build it again."
            )
