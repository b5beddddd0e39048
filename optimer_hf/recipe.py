"""A finished study -> recipe.yaml, recipe.lock.json and merge configs; and back: build and verify
the merge.

A recipe says which vectors at which weights on which base, and what that scored; its lock holds the
sha256 of every weights file that went in and came out, so that another machine can tell whether it
built the same model.
"""

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from optimer_hf.checkpoint import (
    Checkpoint,
    files_beside_weights,
    files_in_shards,
    tokenizer_files,
    weight_files,
)
from optimer_hf.convert import ResolvedModel, resolve_model, resolve_tokenizer
from optimer_hf.errors import ConfigError, ModelError, OptimerError, OutputError
from optimer_hf.evaluate import Unit, said_of
from optimer_hf.files import (
    FileModel,
    ReferenceText,
    TokenizerSource,
    VersionedFile,
    finish_move,
    is_pinned,
    is_there,
    portable,
    replacing,
    tokenizer_reference,
    write_text,
    yaml_text,
)
from optimer_hf.merge import MAX_SHARD_SIZE, write_merged
from optimer_hf.merge_config import (
    linear_config,
    optimer_config,
    vanilla_config,
    with_tokenizer,
)
from optimer_hf.report import CAPTIONS, CARD_FIGURES, FIGURES
from optimer_hf.study import MERGE, Study, StudyConfig, Trial, model_digests
from optimer_hf.tokenizer import opened_tokenizer, tokenizer_path
from optimer_hf.vector import (
    AdapterVector,
    DistributionVector,
    extract,
    norms,
    open_vector,
    read_record,
)

logger = logging.getLogger(__name__)

LOCK = "recipe.lock.json"  # beside a built model
MERGE_CONFIG, MADE_HERE = "optimer.yml", "# Written beside a recipe by optimer-hf.\n"
VERSIONED_PACKAGES = (
    "optimer-hf",
    "torch",
    "transformers",
    "peft",
    "mergekit",
    "smac",
    "lm-eval",
    "safetensors",
)
LARGEST_BFLOAT16_DELTA = (
    0.05  # relative norm; rounded by at most 2^-8, it moves 6 % of a bfloat16 output by one ulp
)
LARGEST_CANCELLATION = (
    2.0  # beyond this sum of |w|, base weight 1 - sum w loses digits of bfloat16 checkpoints
)


class Ingredient(FileModel):
    """One vector of a recipe."""

    source: ReferenceText
    weight: float = Field(ge=-1e4, le=1e4)


class RecipeFile(VersionedFile):
    """recipe.yaml: all that is needed to build the merge, and the evidence for it.

    `tokenizer_source`: the vector or the model whose tokenizer the merge has, if not the base's.
    """

    name: str
    base_model: ReferenceText
    dtype: Literal["bfloat16", "float16", "float32"]
    vectors: dict[str, Ingredient]
    tokenizer_source: TokenizerSource = None
    objective: dict[str, Any]
    scores: dict[str, Any]
    study: dict[str, Any]
    ledger: dict[str, Any] = {}
    versions: dict[str, str] = {}
    derived_from: str | None = None  # the recipe it continues: org/name@commit

    @property
    def weights(self) -> dict[str, float]:
        """Weight of every vector."""
        return {name: ingredient.weight for name, ingredient in self.vectors.items()}

    @property
    def tokenizer_reference(self) -> str | None:
        """The model whose tokenizer the merge has; None: the base."""
        sources = {name: vector.source for name, vector in self.vectors.items()}
        return tokenizer_reference(self.tokenizer_source, sources)


class Lock(VersionedFile):
    """recipe.lock.json: file name -> sha256 of the weights of base, vectors and the built model,
    and of the tokenizer, if it is not the base's; `kinds` says which vectors are adapters, deltas
    and checkpoints, `max_shard_size` how large a file of the built model may be, in bytes.
    """

    base: dict[str, str]
    vectors: dict[str, dict[str, str]]
    kinds: dict[str, str] = {}
    tokenizer: dict[str, str] = {}
    weights: dict[str, float]
    dtype: str
    output: dict[str, str] = {}
    max_shard_size: int = Field(default=MAX_SHARD_SIZE, gt=0, le=2**50)


# -- study -> recipe -------------------------------------------------------------------------------


def write_recipe(
    study: Study,
    path: Path,
    *,
    name: str,
    sealed: Mapping[str, Any] | None = None,
    ledger: Mapping[str, Any] | None = None,
    pick: Trial | None = None,
    derived_from: str | None = None,
) -> RecipeFile:
    """Write recipe.yaml at `path`, its lock and `optimer.yml` beside it, and return the recipe.

    `pick` is the trial to write (None: the incumbent), for instance one of the front;
    `derived_from` the recipe it continues, org/name@commit. Raises ConfigError when that is not
    pinned, OutputError where files of somebody else would be lost, StudyError when weights are no
    longer those that the trials scored.
    """
    if derived_from is not None and not is_pinned(derived_from):
        raise ConfigError(
            f"--derived-from: found {derived_from!r}, expected org/name@<40-digit commit>, as "
            "`optimer pull` prints it."
        )
    config, incumbent = study.config, pick or study.incumbent
    folder = path.resolve().parent
    _refuse_foreign(path, folder / MERGE_CONFIG)
    base = resolve_model(config.base_model)
    sources = {key: resolve_model(str(vector.source)) for key, vector in config.vectors.items()}
    _check_inputs(study, base, sources)
    base_model = _pinned(config.base_model, base, folder)
    pinned = {
        key: _pinned(str(config.vectors[key].source), source, folder)
        for key, source in sources.items()
    }
    recipe = {
        "format_version": 1,
        "name": name,
        "base_model": base_model,
        "dtype": config.dtype,
        "vectors": {
            key: {"source": source, "weight": incumbent.weights[key]}
            for key, source in pinned.items()
        },
        **_tokenizer_field(config, folder),
        **_evidence(study, incumbent, sealed, folder),
        "ledger": dict(ledger or {}),
        "versions": {package: version(package) for package in VERSIONED_PACKAGES},
    }
    if derived_from is not None:
        recipe["derived_from"] = derived_from
    lock = _lock_of(config, base, sources, incumbent.weights)
    _write_lock(lock, path.with_suffix(".lock.json"))
    write_text(folder / MERGE_CONFIG, MADE_HERE + yaml_text(_merge_config(recipe)))
    header = f"# Build it with: optimer build {path.name} OUT\n"
    write_text(path, header + yaml_text(recipe))
    return RecipeFile.read(path)


def _lock_of(
    config: StudyConfig,
    base: ResolvedModel,
    sources: Mapping[str, ResolvedModel],
    weights: Mapping[str, float],
) -> Lock:
    """Return the lock of a merge that is not built yet; `sources` by vector."""
    return Lock(
        base=weight_files(base.path),
        vectors={key: weight_files(source.path) for key, source in sources.items()},
        kinds={
            key: open_vector(key, str(config.vectors[key].source), base).kind for key in sources
        },
        tokenizer=_tokenizer_digests(config.tokenizer_reference),
        weights=dict(weights),
        dtype=config.dtype,
    )


def _check_inputs(study: Study, base: ResolvedModel, sources: Mapping[str, ResolvedModel]) -> None:
    """Raise StudyError when weights or tokenizer are no longer those that the trials scored."""
    paths = {key: source.path for key, source in sources.items()}
    tokenizer = tokenizer_path(study.config.tokenizer_reference)
    study.check_inputs(model_digests(base.path, paths, tokenizer))


def _merge_config(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config of a recipe for `optimer merge`."""
    sources = {key: vector["source"] for key, vector in recipe["vectors"].items()}
    weights = {key: vector["weight"] for key, vector in recipe["vectors"].items()}
    found = optimer_config(recipe["base_model"], sources, weights, recipe["dtype"])
    return with_tokenizer(found, tokenizer_reference(recipe.get("tokenizer_source"), sources))


def _tokenizer_field(config: StudyConfig, folder: Path) -> dict[str, str]:
    """Return whose tokenizer a merge has as a recipe says it: a vector by its name, a model pinned
    as vectors are; nothing for the base's.
    """
    named = config.tokenizer_source
    if named is None or named in config.vectors:
        return {} if named is None else {"tokenizer_source": named}
    pinned = _pinned(named, resolve_tokenizer(named), folder)
    is_word = Path(named).is_absolute() and "/" not in pinned  # could name a vector, or be `base`
    return {"tokenizer_source": f"./{pinned}" if is_word else pinned}


def _tokenizer_digests(reference: str | None) -> dict[str, str]:
    """Return file name -> sha256 of a tokenizer that is not the base's; nothing for the base's."""
    path = tokenizer_path(reference)
    return {} if path is None else tokenizer_files(path)


def _refuse_foreign(recipe: Path, merge_config: Path) -> None:
    """Raise OutputError for a file of somebody else's where one of a recipe goes."""
    foreign = None
    if is_there(recipe):
        try:
            RecipeFile.read(recipe)
        except ConfigError:
            foreign = recipe
    elif is_there(merge_config) and not merge_config.read_bytes().startswith(MADE_HERE.encode()):
        foreign = merge_config
    if foreign is not None:
        raise OutputError(
            f"{foreign}: exists and was not written with a recipe. Move it, or give the recipe a "
            "folder of its own."
        )


def _evidence(
    study: Study, incumbent: Trial, sealed: Mapping[str, Any] | None, folder: Path
) -> dict[str, Any]:
    """Return what was asked of the merge, how it scored, and in which search it was found."""
    objective = study.config.objective.model_dump(mode="json", exclude_defaults=True)
    return {
        "objective": portable(objective, folder),
        "scores": _scores(study, incumbent, sealed),
        "study": {
            "sha256": study.config.digest,
            "n_trials": len(study.log.of("search")),
            "seed": study.config.search.seed,
            "incumbent": incumbent.number,
        },
    }


def _write_lock(lock: Lock, path: Path) -> None:
    """Write a lock; what the same inputs were built to before stays recorded."""
    if path.exists():
        earlier = Lock.read(path)
        built = {"output": earlier.output, "max_shard_size": earlier.max_shard_size}
        if lock.model_copy(update={**built, "kinds": earlier.kinds}) == earlier:
            lock = lock.model_copy(update=built)
    lock.write(path)


def _pinned(reference: str, resolved: ResolvedModel, folder: Path) -> str:
    """Return a Hub reference with its commit, a local one relative to the folder of the recipe."""
    if resolved.commit is not None:
        return f"{resolved.reference}@{resolved.commit}"
    return str(portable(reference, folder))


def _scores(study: Study, incumbent: Trial, sealed: Mapping[str, Any] | None) -> dict[str, Any]:
    said = said_of(study.over_base(incumbent), Unit.of(study.config.objective), is_gain=True)
    found: dict[str, Any] = {
        incumbent.fidelity: {
            "value": study.value(incumbent),
            "summary": f"over {study.baseline} {said}",
            "terms": {label: term.score for label, term in incumbent.terms.items()},
        }
    }
    if sealed is not None:
        merge = next(row for row in sealed["rows"] if row["name"] == MERGE)
        found["sealed"] = {
            "value": merge["value"],
            "summary": merge.get("summary"),
            "terms": {label: term["score"] for label, term in merge["terms"].items()},
            "verdicts": list(sealed["verdicts"]),
        }
    return found


def write_vanilla(study: Study, path: Path, *, pick: Trial | None = None) -> None:
    """Write a config at `path` that unmodified `mergekit-yaml` runs to the weights of the
    incumbent, or of the trial `pick`.

    A pool of checkpoints is merged with `linear` and base weight 1 - sum w. Adapters and deltas,
    and sums that would cancel, are written as delta directories under `deltas/` beside it, which
    `linear` adds to the base. What mergekit does not write of another tokenizer, a comment says.
    """
    config, weights = study.config, (pick or study.incumbent).weights
    base = resolve_model(config.base_model)
    vectors = [
        open_vector(name, str(vector.source), base) for name, vector in config.vectors.items()
    ]
    if (
        all(vector.kind == "checkpoint" for vector in vectors)
        and _sum_of_absolute(weights) <= LARGEST_CANCELLATION
    ):
        sources = {vector.name: str(vector.path) for vector in vectors}
        found = linear_config(str(base.path), sources, weights, config.dtype)
    else:
        deltas = {
            vector.name: str(_delta_directory(vector, base, path.resolve().parent))
            for vector in vectors
        }
        found = vanilla_config(str(base.path), deltas, weights, config.dtype)
    header = f"# Paths are of this machine. Run: mergekit-yaml {path.name} OUT\n"
    if config.tokenizer_reference is not None:
        header += untaken_note(str(resolve_tokenizer(config.tokenizer_reference).path))
    write_text(path, header + yaml_text(found))


def untaken_note(source: str) -> str:
    """Return a comment that says whose tokenizer to copy beside what mergekit writes. Given a
    tokenizer, mergekit cuts the embedding to its tokens, which makes another model.
    """
    return (
        f"# Copy tokenizer, chat template and (if there is one) generation_config.json of {source} "
        "into OUT.\n"
    )


def _sum_of_absolute(weights: Mapping[str, float]) -> float:
    return sum(abs(weight) for weight in weights.values())


def _delta_directory(vector: DistributionVector, base: ResolvedModel, folder: Path) -> Path:
    """Return the vector as a complete delta directory, written once for the same weights; in
    bfloat16 when that costs nothing visible.
    """
    out = folder / "deltas" / vector.name
    if out.resolve() == vector.path.resolve():
        return out
    record = read_record(out)
    current = weight_files(vector.path), weight_files(base.path)
    if record is None or (record.source_files, record.base.files) != current:
        _, relative_norm = norms(vector, Checkpoint(base.path))
        extract(
            vector,
            base,
            out,
            dtype="bfloat16" if relative_norm < LARGEST_BFLOAT16_DELTA else "float32",
            replace=record is not None and record.kind == "delta",  # of an earlier training
        )
    return out


# -- recipe -> model -------------------------------------------------------------------------------


def build(
    path: Path,
    out: Path,
    *,
    out_dtype: str | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
    device: str = "cpu",
    replace: bool = False,
) -> None:
    """Build the merged model of a recipe; `device` does the arithmetic, and with `replace` it takes
    the place of another model in `out`, which stays until then.

    The model appears with its recipe, lock and figures. One that is in `out` already, whole and of
    this recipe and lock, stays; what is beside its weights is brought up to date. Raises ModelError
    when base or vectors are not the locked ones, before anything is written.
    """
    recipe = RecipeFile.read(path)
    lock_file = path.with_suffix(".lock.json")
    base = resolve_model(recipe.base_model)
    lock = Lock.read(lock_file) if lock_file.exists() else None
    if lock is not None:
        _check_lock(lock, recipe, base)
    tokenizer = opened_tokenizer(base, recipe.tokenizer_reference)
    vectors = [
        open_vector(name, ingredient.source, base) for name, ingredient in recipe.vectors.items()
    ]
    write = partial(
        write_merged,
        base,
        vectors,
        recipe.weights,
        out,
        out_dtype=out_dtype or recipe.dtype,
        tokenizer=tokenizer,
        max_shard_size=max_shard_size,
        device=device,
        replace=replace,
    )
    if lock is None:
        write()
        return
    asked = {"dtype": out_dtype or recipe.dtype, "max_shard_size": max_shard_size}
    beside = files_beside_weights(base.path, tokenizer=tokenizer.path if tokenizer else None)
    finish_move(out)
    built = _lock_of_built(lock, out, asked, [file.name for file in beside])
    if built is not None:
        logger.info("%s: holds the model of this recipe already; nothing to build", out)
        _write_beside(recipe, path.parent, built, out, out)
    else:
        write(
            complete=lambda staging: _write_beside(
                recipe, path.parent, _with_output(lock, staging, asked), staging, out
            )
        )
        built = Lock.read(out / LOCK)
    if out_dtype is None:
        _keep_output(lock_file, out, built, any(isinstance(v, AdapterVector) for v in vectors))


def _with_output(lock: Lock, model: Path, asked: Mapping[str, Any]) -> Lock:
    """Return the lock of a recipe as it is of a model built from it, with what was asked of it."""
    return lock.model_copy(update={"output": weight_files(model), **asked})


def _lock_of_built(
    lock: Lock, model: Path, asked: Mapping[str, Any], beside: Sequence[str]
) -> Lock | None:
    """Return the lock of a model that is what a build after `lock` gives, with the files `beside`
    its weights; None when there is another one, or none.
    """
    if not all((model / name).is_file() for name in beside):
        return None
    try:
        built = _with_output(lock, model, asked)
        recorded = Lock.read(model / LOCK) if is_there(model / LOCK) else None
    except OptimerError:
        return None
    return built if built.output and built in (lock, recorded) else None


def _keep_output(lock_file: Path, out: Path, built: Lock, has_adapters: bool) -> None:
    """Lock the files of the first build, and compare those of a later one."""
    lock = Lock.read(lock_file)
    if not lock.output:
        built.write(lock_file)
        return
    found = built.output
    if found != lock.output and built.max_shard_size != lock.max_shard_size:
        found = files_in_shards(out, lock.max_shard_size)
    if lock.output != found and has_adapters:
        logger.warning(
            "%s: differs in bits from the model built first; LoRA products round differently on "
            "another processor",
            out,
        )
    elif lock.output != found:
        raise ModelError(
            f"{out}: differs from the model this recipe built first ({lock_file.name}). It was "
            "kept."
        )


def _write_beside(recipe: RecipeFile, figures: Path, built: Lock, model: Path, out: Path) -> None:
    """Write into a built model how it was built, so that it can be verified and published, and the
    figures of its card, which lie in a folder of the recipe; what is there stays. `out` is where
    the model will be.
    """
    built_recipe = recipe.model_copy(update={"dtype": built.dtype})
    data = portable(built_recipe.model_dump(mode="json", exclude_none=True), out.resolve())
    files = {"recipe.yaml": yaml_text(data).encode()}
    if (figures / CAPTIONS).exists():
        names = (*(f"{FIGURES}/{name}.png" for name in CARD_FIGURES), CAPTIONS)
        files |= {name: (figures / name).read_bytes() for name in names if is_there(figures / name)}
    for name, data in files.items():
        if not is_there(model / name) or (model / name).read_bytes() != data:
            with replacing(model / name) as partial:
                partial.write_bytes(data)
    if not is_there(model / LOCK) or Lock.read(model / LOCK) != built:
        built.write(model / LOCK)


def _check_lock(lock: Lock, recipe: RecipeFile, base: ResolvedModel) -> None:
    if (recipe.weights, recipe.dtype) != (lock.weights, lock.dtype):
        raise ModelError(
            f"{recipe.name}: weights or dtype are not the locked ones. Restore them, or delete the "
            "lock to make this another recipe."
        )
    parts = {"base_model": (lock.base, base.path)}
    for name, ingredient in recipe.vectors.items():
        parts[f"vectors.{name}"] = (
            lock.vectors.get(name, {}),
            resolve_model(ingredient.source).path,
        )
    for field, (expected, directory) in parts.items():
        if weight_files(directory) != expected:
            raise ModelError(
                f"{recipe.name}: {field}: the weights in {directory} are not the locked ones. "
                "Fetch them again, or write the recipe anew."
            )
    if _tokenizer_digests(recipe.tokenizer_reference) != lock.tokenizer:
        raise ModelError(
            f"{recipe.name}: tokenizer_source: found {recipe.tokenizer_reference or 'base'}, whose "
            "tokenizer, chat template or generation config is not the locked one. Fetch it again, "
            "or write the recipe anew."
        )


def verify(path: Path, model: Path) -> None:
    """Raise ModelError unless a built model has the sha256 that the lock of its recipe records, and
    the tokenizer, if that is not the base's; one in other shards than the locked one is hashed as
    if it were in those.
    """
    lock_file = path.with_suffix(".lock.json")
    if not path.is_file() or not lock_file.is_file():
        lacking = f"has no {lock_file.name} beside it" if path.is_file() else "no such recipe file"
        raise ConfigError(f"{path}: {lacking}. `optimer recipe STUDY_DIR {path}` writes both.")
    lock = Lock.read(lock_file)
    if not lock.output:
        raise ModelError(
            f"{path}: its lock records no built model. Run `optimer build {path} OUT` first."
        )
    if not model.is_dir():
        if is_there(model):
            raise ModelError(
                f"{model}: a file; expected the directory of a model after the recipe."
            )
        raise ModelError(f"{model}: no such model. Build it: `optimer build {path} {model}`.")
    beside = model / LOCK
    built, found = Lock.read(beside) if beside.exists() else lock, weight_files(model)
    if found != lock.output and built.max_shard_size != lock.max_shard_size:
        found = files_in_shards(model, lock.max_shard_size)
    for name in sorted(lock.output.keys() | found.keys()):
        if found.get(name) != lock.output.get(name):
            raise ModelError(
                f"{model / name}: sha256 differs from {lock_file.name}. Build it again."
            )
    has = tokenizer_files(model)
    for name in sorted(lock.tokenizer):
        if has.get(name) != lock.tokenizer[name]:
            raise ModelError(
                f"{model / name}: not the tokenizer that {lock_file.name} records. Build it again."
            )
