"""A finished study -> recipe.yaml, its lock and merge configs."""

from collections.abc import Mapping
from pathlib import Path

from optimer_hf.comparison.ledger import Ledger
from optimer_hf.comparison.result import Comparison, verdicts
from optimer_hf.errors import ConfigError, OutputError
from optimer_hf.files.reading import yaml_text
from optimer_hf.files.reference import is_pinned, is_there, pin, relative_reference
from optimer_hf.files.staging import finish_move, write_text
from optimer_hf.files.versions import versions
from optimer_hf.merging.mergekit_pool import merge_config_of, vanilla_config
from optimer_hf.merging.tokenizer import tokenizer_path
from optimer_hf.models.checkpoint import Checkpoint
from optimer_hf.models.layout import ResolvedModel, model_digests, tokenizer_digests, weight_digests
from optimer_hf.models.resolve import resolve_model, resolve_tokenizer
from optimer_hf.recipes.record import (
    MADE_HERE,
    MERGE_CONFIG,
    Evidence,
    Ingredient,
    Lock,
    Recipe,
    Score,
    Search,
    tokenizer_note,
)
from optimer_hf.scoring.formatting import Unit, describe_interval
from optimer_hf.scoring.scores import Scores
from optimer_hf.study.config import StudyConfig
from optimer_hf.study.directory import Study
from optimer_hf.study.trials import Fidelity, Trial
from optimer_hf.vectors.delta import extract, measure_norms
from optimer_hf.vectors.opening import open_vector
from optimer_hf.vectors.record import read_record
from optimer_hf.vectors.vector import DistributionVector

LARGEST_BFLOAT16_DELTA = (
    0.05  # relative norm; rounded by at most 2^-8, it moves 6 % of a bfloat16 output by one ulp
)


# -- study -> recipe -------------------------------------------------------------------------------


def write_recipe(
    study: Study,
    path: Path,
    *,
    name: str,
    sealed: Comparison | None = None,
    ledger: Ledger | None = None,
    pick: Trial | None = None,
    derived_from: str | None = None,
) -> Recipe:
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
    config, incumbent = study.config, pick or study.best_trial
    folder = path.resolve().parent
    _refuse_foreign(path, folder / MERGE_CONFIG)
    base = resolve_model(config.base_model)
    sources = {key: resolve_model(str(vector.source)) for key, vector in config.vectors.items()}
    _check_inputs(study, base, sources)
    recipe = Recipe.model_construct(  # with references as they are seen from its folder
        name=name,
        base_model=_pinned(config.base_model, base, folder),
        dtype=config.dtype,
        vectors={
            key: Ingredient.model_construct(
                source=_pinned(str(config.vectors[key].source), source, folder),
                weight=incumbent.weights[key],
            )
            for key, source in sources.items()
        },
        tokenizer_source=_tokenizer_source(config, folder),
        **dict(_evidence_of(study, incumbent, sealed, ledger)),
        versions=versions(),
        derived_from=derived_from,
    )
    lock = _lock_of(config, base, sources, incumbent.weights)
    _write_lock(lock, path.with_suffix(".lock.json"))
    merge_config = merge_config_of(recipe, recipe.weights)
    write_text(folder / MERGE_CONFIG, MADE_HERE + yaml_text(merge_config))
    header = f"# Build it with: optimer build {path.name} OUT\n"
    data = recipe.model_dump(mode="json", exclude_none=True, context={"folder": folder})
    write_text(path, header + yaml_text(data))
    return Recipe.read(path)


def _lock_of(
    config: StudyConfig,
    base: ResolvedModel,
    sources: Mapping[str, ResolvedModel],
    weights: Mapping[str, float],
) -> Lock:
    """Return the lock of a merge that is not built yet; `sources` by vector."""
    return Lock(
        base=weight_digests(base.path),
        vectors={key: weight_digests(source.path) for key, source in sources.items()},
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


def _tokenizer_source(config: StudyConfig, folder: Path) -> str | None:
    """Return whose tokenizer a merge has as a recipe says it: a vector by its name, a model pinned
    as vectors are; None for the base's.
    """
    named = config.tokenizer_source
    if named is None or named in config.vectors:
        return named
    return _pinned(named, resolve_tokenizer(named), folder)


def _tokenizer_digests(reference: str | None) -> dict[str, str]:
    """Return file name -> sha256 of a tokenizer that is not the base's; nothing for the base's."""
    path = tokenizer_path(reference)
    return {} if path is None else tokenizer_digests(path)


def _refuse_foreign(recipe: Path, merge_config: Path) -> None:
    """Raise OutputError for a file of somebody else's where one of a recipe goes."""
    foreign = None
    if is_there(recipe):
        try:
            Recipe.read(recipe)
        except ConfigError:
            foreign = recipe
    elif is_there(merge_config) and not merge_config.read_bytes().startswith(MADE_HERE.encode()):
        foreign = merge_config
    if foreign is not None:
        raise OutputError(
            f"{foreign}: exists and was not written with a recipe. Move it, or give the recipe a "
            "folder of its own."
        )


def _evidence_of(
    study: Study, incumbent: Trial, sealed: Comparison | None, ledger: Ledger | None
) -> Evidence:
    """Return what was asked of the merge, how it scored, and in which search it was found."""
    search = Search(
        sha256=study.config.digest(),
        n_trials=len(study.trials),
        seed=study.config.search.seed,
        incumbent=incumbent.number,
    )
    return Evidence(
        objective=study.config.objective,
        scores=_scores(study, incumbent, sealed),
        study=search,
        ledger=ledger or Ledger(),
    )


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
        return pin(resolved.reference, resolved.commit)
    return relative_reference(reference, folder)


def _scores(study: Study, incumbent: Trial, sealed: Comparison | None) -> dict[Fidelity, Score]:
    unit = Unit.of(study.config.objective)
    said = describe_interval(study.over_base(incumbent), unit, is_gain=True)
    scores: dict[Fidelity, Score] = {
        incumbent.fidelity: Score(
            value=study.value(incumbent),
            summary=f"over {study.baseline} {said}",
            terms={label: term.score for label, term in incumbent.terms.items()},
            higher_is_better=_directions(incumbent.terms),
        )
    }
    if sealed is not None:
        merge = sealed.merge
        said = describe_interval(
            sealed.interval(merge, sealed.base), Unit.of(sealed.objective), is_gain=True
        )
        scores["sealed"] = Score(
            value=sealed.value(merge),
            summary=f"over the base {said}",
            terms={label: score.score for label, score in merge.scores.items()},
            higher_is_better=_directions(merge.scores),
            verdicts=verdicts(sealed),
        )
    return scores


def _directions(scores: Scores) -> dict[str, bool]:
    return {label: score.higher_is_better for label, score in scores.items()}


def write_vanilla(study: Study, path: Path, *, pick: Trial | None = None) -> None:
    """Write a config at `path` that unmodified `mergekit-yaml` runs to the weights of the
    incumbent, or of the trial `pick`.

    A pool of checkpoints is merged with `linear` and base weight 1 - sum w. Adapters and deltas,
    and sums that would cancel, are written as delta directories under `deltas/` beside it, which
    `linear` adds to the base. What mergekit does not write of another tokenizer, a comment says.
    """
    config, weights = study.config, (pick or study.best_trial).weights
    base = resolve_model(config.base_model)
    vectors = [
        open_vector(name, str(vector.source), base) for name, vector in config.vectors.items()
    ]
    merge_config = None
    if all(vector.kind == "checkpoint" for vector in vectors):
        sources = {vector.name: str(vector.path) for vector in vectors}
        merge_config = vanilla_config(
            str(base.path), sources, weights, config.dtype, are_deltas=False
        )
    if merge_config is None:
        deltas = {
            vector.name: str(_delta_directory(vector, base, path.resolve().parent))
            for vector in vectors
        }
        merge_config = vanilla_config(
            str(base.path), deltas, weights, config.dtype, are_deltas=True
        )
    assert merge_config is not None  # a sum of deltas cancels nothing
    header = f"# Paths are of this machine. Run: mergekit-yaml {path.name} OUT\n"
    if config.tokenizer_reference is not None:
        header += tokenizer_note(str(resolve_tokenizer(config.tokenizer_reference).path))
    write_text(path, header + yaml_text(merge_config))


def _delta_directory(vector: DistributionVector, base: ResolvedModel, folder: Path) -> Path:
    """Return the vector as a complete delta directory, written once for the same weights; in
    bfloat16 when that costs nothing visible.
    """
    out = folder / "deltas" / vector.name
    if out.resolve() == vector.path.resolve():
        return out
    finish_move(out)
    record = read_record(out)
    current = weight_digests(vector.path), weight_digests(base.path)
    if record is None or (record.source_files, record.base.files) != current:
        _, relative_norm = measure_norms(vector, Checkpoint(base.path))
        extract(
            vector,
            base,
            out,
            dtype="bfloat16" if relative_norm < LARGEST_BFLOAT16_DELTA else "float32",
            replace=record is not None and record.kind == "delta",  # of an earlier training
        )
    return out
