"""Write the recipe of a finished study: recipe.yaml, its lock, optimer.yml and, if mergekit alone
can make the merge, mergekit_config.yml.

Weights are hashed and not read, so nothing here imports torch, unless the base is a GGUF file, the
merge has the tokens of its vectors, or only mergekit knows whether it finds their tensors.
"""

from collections.abc import Mapping
from pathlib import Path

from optimer_hf.comparison.ledger import Ledger
from optimer_hf.comparison.result import Comparison, verdicts
from optimer_hf.errors import ConfigError, OutputError
from optimer_hf.files.reading import yaml_text
from optimer_hf.files.reference import is_pinned, is_there, pin, relative_reference
from optimer_hf.files.staging import write_text
from optimer_hf.files.versions import versions
from optimer_hf.merging.mergekit_names import list_unreadable
from optimer_hf.merging.mergekit_pool import merge_config_of
from optimer_hf.models.layout import ResolvedModel, model_digests, tokenizer_digests, weight_digests
from optimer_hf.models.resolve import resolve_model, resolve_tokenizer
from optimer_hf.models.union import AddedToken, UnionRecord
from optimer_hf.recipes.plain_config import write_plain_config
from optimer_hf.recipes.record import (
    BEGINNINGS,
    MADE_HERE,
    MERGE_CONFIG,
    VANILLA_CONFIG,
    Evidence,
    Ingredient,
    Lock,
    Recipe,
    Score,
    Search,
    path_beside,
)
from optimer_hf.scoring.formatting import Unit, describe_interval
from optimer_hf.scoring.scores import Scores
from optimer_hf.study.config import StudyConfig
from optimer_hf.study.directory import Study
from optimer_hf.study.trials import ENGINE, Fidelity, Trial
from optimer_hf.vectors.groups import weights_of_groups
from optimer_hf.vectors.layers import layers_for
from optimer_hf.vectors.record import read_record


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
    """Write recipe.yaml at `path` with its lock and merge configs beside it, and return the recipe.

    The merge configs are optimer.yml and, if mergekit alone can make the merge,
    mergekit_config.yml; otherwise that of an earlier recipe is taken away. Beside a recipe of
    another name they have it in front: chat.optimer.yml.

    `pick` is the trial to write (None: the best one), for instance one of the front.
    `derived_from` is the recipe that this one continues, org/name@commit.

    The recipe comes after its lock. If it replaces another one and the command is killed, the new
    lock lies beside the old recipe; `build` and `verify` then refuse them until the recipe is
    written again.

    Raises ConfigError if `derived_from` is not pinned, OutputError if files of somebody else would
    be lost, StudyError if weights are no longer those that the trials scored.
    """
    _refuse_unpinned(derived_from)
    config, trial = study.config, pick or study.best_trial
    folder = path.resolve().parent
    refuse_foreign_files(path)
    base = resolve_model(config.base_model)
    sources = {key: resolve_model(str(vector.source)) for key, vector in config.vectors.items()}
    _check_inputs(study, base, sources)
    recipe = Recipe.model_construct(  # its references are relative to its folder
        name=name,
        base_model=_pin(config.base_model, base, folder),
        dtype=config.dtype,
        vectors=_ingredients_of(config, sources, trial.weights, folder),
        tokenizer_source=_tokenizer_source(config, folder),
        vocabulary=config.vocabulary,
        n_layers=layers_for(config.groups, base) or None,
        **dict(evidence_of(study, trial, sealed, ledger)),
        versions=versions() | _version_of_engine(study),
        derived_from=derived_from,
    )
    lock = _lock_of(config, base, sources, trial.weights)
    _write_lock(lock, path.with_suffix(".lock.json"))
    merge_config = merge_config_of(recipe, recipe.weights, recipe.n_layers)
    write_text(path_beside(path, MERGE_CONFIG), MADE_HERE + yaml_text(merge_config))
    header = f"# Build it with: optimer build {path.name} OUT\n"
    data = recipe.model_dump(mode="json", exclude_none=True, context={"folder": folder})
    plain = path_beside(path, VANILLA_CONFIG)
    plain.unlink(missing_ok=True)  # that of an earlier merge
    write_text(path, header + yaml_text(data))
    recipe = Recipe.read(path)
    write_plain_config(recipe, lock, plain)
    return recipe


def _refuse_unpinned(derived_from: str | None) -> None:
    """Raise ConfigError if the recipe that another one continues has no commit."""
    if derived_from is not None and not is_pinned(derived_from):
        raise ConfigError(
            f"--derived-from: found {derived_from!r}, expected org/name@<40-digit commit>, as "
            "`optimer pull` prints it."
        )


def _ingredients_of(
    config: StudyConfig,
    sources: Mapping[str, ResolvedModel],
    weights: Mapping[str, float],
    folder: Path,
) -> dict[str, Ingredient]:
    """Return the vectors of a study with their weights; `sources` by vector."""
    return {
        name: Ingredient.model_construct(
            source=_pin(str(config.vectors[name].source), source, folder),
            weight=None if name in config.groups else weights[name],
            weights=weights_of_groups(name, config.groups[name], weights)
            if name in config.groups
            else None,
            mixture=config.mixtures.get(name),
        )
        for name, source in sources.items()
    }


def _version_of_engine(study: Study) -> dict[str, str]:
    """Return the engine that scored the trials, with its version, if the study records one."""
    name, _, version = study.read_inputs().get(ENGINE, "").partition(" ")
    return {name: version} if name else {}


def _lock_of(
    config: StudyConfig,
    base: ResolvedModel,
    sources: Mapping[str, ResolvedModel],
    weights: Mapping[str, float],
) -> Lock:
    """Return the lock of a merge that is not built yet; `sources` by vector."""
    kinds = {key: kind_of_vector(source.path) for key, source in sources.items()}
    deltas = {key: read_record(sources[key].path) for key in kinds if kinds[key] == "delta"}
    checkpoints = {key: sources[key].path for key in kinds if kinds[key] == "checkpoint"}
    return Lock(
        base=weight_digests(base.path),
        vectors={key: weight_digests(source.path) for key, source in sources.items()},
        kinds=kinds,
        dtypes={key: delta.dtype for key, delta in deltas.items() if delta and delta.dtype},
        unread=list_unreadable(base.path, checkpoints),
        tokenizer=digests_of_tokenizer(config.tokenizer_reference),
        added_tokens=_added_tokens(config, base),
        weights=dict(weights),
        dtype=config.dtype,
    )


def _added_tokens(config: StudyConfig, base: ResolvedModel) -> dict[str, AddedToken]:
    """Return the tokens that the merges of a study have and its base lacks."""
    if config.vocabulary == "base":
        return {}
    from optimer_hf.merging.union import open_base  # imports torch

    grown, _ = open_base(base, config.sources, config.tokenizer_reference, config.vocabulary)
    union = UnionRecord.of(grown.path)
    return {} if union is None else union.added


def kind_of_vector(path: Path) -> str:
    """Return the kind of the vector in a directory; the trials have already merged it."""
    if (path / "adapter_config.json").exists():
        return "adapter"
    record = read_record(path)
    return "delta" if record is not None and record.kind == "delta" else "checkpoint"


def _check_inputs(study: Study, base: ResolvedModel, sources: Mapping[str, ResolvedModel]) -> None:
    """Raise StudyError if weights or the tokenizer are no longer those that the trials scored."""
    paths = {key: source.path for key, source in sources.items()}
    reference = study.config.tokenizer_reference
    tokenizer = None if reference is None else resolve_tokenizer(reference).path
    study.check_inputs(model_digests(base.path, paths, tokenizer))


def _tokenizer_source(config: StudyConfig, folder: Path) -> str | None:
    """Return the `tokenizer_source` of a recipe: the name of a vector, a pinned model, or None for
    the base.
    """
    named = config.tokenizer_source
    if named is None or named in config.vectors:
        return named
    return _pin(named, resolve_tokenizer(named), folder)


def digests_of_tokenizer(reference: str | None) -> dict[str, str]:
    """Return the sha256 of each tokenizer file of a model by name; none for the base (None)."""
    return {} if reference is None else tokenizer_digests(resolve_tokenizer(reference).path)


def refuse_foreign_files(recipe: Path) -> None:
    """Raise OutputError if a recipe or a file beside it would replace one of somebody else."""
    _refuse_foreign(path_beside(recipe, VANILLA_CONFIG), *BEGINNINGS)
    if not is_there(recipe):
        _refuse_foreign(path_beside(recipe, MERGE_CONFIG), MADE_HERE)
        _refuse_shared_lock(recipe)
        return
    try:
        Recipe.read(recipe)
    except ConfigError:
        raise _foreign_error(recipe) from None


def _refuse_foreign(path: Path, *beginnings: str) -> None:
    """Raise OutputError if a file that is to be written is there and begins as none of ours."""
    ours = tuple(each.encode() for each in beginnings)
    if is_there(path) and not path.read_bytes().startswith(ours):
        raise _foreign_error(path)


def _refuse_shared_lock(recipe: Path) -> None:
    """Raise OutputError if there is a recipe of the same name with another ending, whose lock and
    configs would be replaced.
    """
    lock, endings = recipe.with_suffix(".lock.json"), {".yaml", ".yml"} - {recipe.suffix}
    for other in (recipe.with_suffix(ending) for ending in sorted(endings)):
        if lock.exists() and other.exists():
            raise OutputError(
                f"{recipe}: would replace {lock.name} and the configs of {other.name}. Give it "
                "another name."
            )


def _foreign_error(path: Path) -> OutputError:
    return OutputError(
        f"{path}: exists and was not written with a recipe. Move it, or give the recipe a folder "
        "of its own."
    )


def evidence_of(
    study: Study, trial: Trial, sealed: Comparison | None, ledger: Ledger | None
) -> Evidence:
    """Return what the search maximized, how the merge scored, and which search found it."""
    search = Search(
        sha256=study.config.digest(),
        n_trials=len(study.trials),
        seed=study.config.search.seed,
        incumbent=trial.number,
    )
    return Evidence(
        objective=study.config.objective,
        scores=_scores(study, trial, sealed),
        study=search,
        ledger=ledger or Ledger(),
    )


def _write_lock(lock: Lock, path: Path) -> None:
    """Write a lock. A model that was built from the same inputs stays recorded."""
    if path.exists():
        earlier = Lock.read(path)
        built = {"output": earlier.output, "max_shard_size": earlier.max_shard_size}
        fields = ("kinds", "dtypes", "unread")  # which locks of earlier versions lack
        unrecorded = {field: getattr(earlier, field) for field in fields}
        if lock.model_copy(update=built | unrecorded) == earlier:
            lock = lock.model_copy(update=built)
    lock.write(path)


def _pin(reference: str, resolved: ResolvedModel, folder: Path) -> str:
    """Return a Hub reference with its commit, or a local one relative to a folder."""
    if resolved.commit is not None:
        return pin(resolved.reference, resolved.commit)
    return relative_reference(reference, folder)


def _scores(study: Study, trial: Trial, sealed: Comparison | None) -> dict[Fidelity, Score]:
    unit = Unit.of(study.config.objective)
    gain = describe_interval(study.over_base(trial), unit, is_gain=True)
    scores: dict[Fidelity, Score] = {
        trial.fidelity: Score(
            value=study.value(trial),
            summary=f"over {study.baseline} {gain}",
            terms={label: term.score for label, term in trial.terms.items()},
            higher_is_better=_higher_is_better(trial.terms),
        )
    }
    if sealed is not None:
        merge = sealed.merge
        searched = {term.label for term in study.config.objective.scored_terms}
        gain = describe_interval(
            sealed.interval(merge, sealed.base), Unit.of(sealed.objective), is_gain=True
        )
        scores["sealed"] = Score(
            value=sealed.value(merge),
            summary=f"over the base {gain}",
            terms={label: score.score for label, score in merge.scores.items()},
            higher_is_better=_higher_is_better(merge.scores),
            metrics={
                term.label: term.metric
                for term in sealed.objective.scored_terms
                if term.label in merge.scores and term.label not in searched
            },
            verdicts=verdicts(sealed),
        )
    return scores


def _higher_is_better(scores: Scores) -> dict[str, bool]:
    return {label: score.higher_is_better for label, score in scores.items()}
