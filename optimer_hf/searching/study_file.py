"""A study.yaml, or a mergekit YAML with an objective file -> StudyConfig; StudyConfig + weights ->
mergekit YAML.
"""

import logging
import re
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import Any

from optimer_hf.errors import ConfigError, EvaluationError, ModelError
from optimer_hf.files.layered import Layered
from optimer_hf.files.model import (
    list_mistakes,
    parse,
    refuse_absent_files,
    warn_of_idle_fields,
)
from optimer_hf.files.paths import Place
from optimer_hf.files.reading import read_yaml, yaml_text
from optimer_hf.files.reference import relative_reference
from optimer_hf.merging.mergekit_keys import is_for_mergekit, keep_read_keys
from optimer_hf.merging.mergekit_pool import (
    is_union,
    merge_config_of,
    mergekit_command,
    obstacle_to_plain,
    plain_config_of,
    tokenizer_of,
    with_absolute_references,
)
from optimer_hf.merging.mergekit_search import (
    SPLIT,
    By,
    Layers,
    former_split,
    obstacle_in,
    place_of_vector,
    pool_to_search,
    refuse_other_depth,
    splits_to_search,
    text_with,
    unsearched_settings,
    vectors_once_whole,
    with_weights,
)
from optimer_hf.merging.mergekit_weights import lacks_weights, weights_of_config
from optimer_hf.merging.mergekit_yaml import known_keys, read_keys, read_merge_config
from optimer_hf.models.loader import count_layers
from optimer_hf.models.resolve import resolve_model
from optimer_hf.scoring.objective import Objective, ObjectiveFile
from optimer_hf.study.config import (
    LARGEST_WEIGHT,
    Baselines,
    SearchConfig,
    StudyConfig,
    VectorConfig,
)
from optimer_hf.study.trials import STUDY_FILE
from optimer_hf.vectors.layers import layers_for

logger = logging.getLogger(__name__)

# how an error about a term begins; that of a worker has its name before it
TERM_NAMED = re.compile(r"""(?:worker \S+: )?(?P<test>test )?term (['"])(?P<label>.+?)\2: """)


def read_study(
    path: Path,
    *,
    objective: Path | None = None,
    test: Path | None = None,
    n_trials: int | None = None,
    study_dir: Path | None = None,
) -> StudyConfig:
    """Return the study of a study.yaml, or of a mergekit YAML, whose models become the pool, with
    the objective files `objective` and (for its sealed test) `test`. `n_trials` replaces the number
    in the file. A vector that began whole in `study_dir` stays so if an older version ignored what
    the YAML gives it.

    Raises ConfigError for a mistake in one of the files, and for a local file that is missing.
    """
    if is_for_mergekit(read_yaml(path)):
        if objective is None:
            raise ConfigError(
                f"{path}: a mergekit YAML says what to merge, but not for which objective. Add "
                "--objective OBJECTIVE.yaml."
            )
        config = study_of_merge_config(path, objective, test)
        if study_dir is not None:
            config = _keep_as_begun(config, path, study_dir / STUDY_FILE)
    elif objective is not None or test is not None:
        raise ConfigError(
            f"{path}: has its own objective. Leave --objective and --test out; they are for a "
            "mergekit YAML."
        )
    else:
        config = StudyConfig.read(path)
        # `compare` reads the baselines
        refuse_absent_files({path: config.model_dump(exclude={"baselines"})})
    if n_trials is not None:
        changed = SearchConfig.model_validate(config.search.model_dump() | {"n_trials": n_trials})
        config = config.model_copy(update={"search": changed})
    return config


def study_of_merge_config(path: Path, objective: Path, test: Path | None = None) -> StudyConfig:
    """Return the study whose pool is the models of a mergekit YAML, with the objective and the
    sealed test of two objective files.
    """
    keys, target = known_keys(), _read_objective(objective)
    given, ignored = read_keys(path, keys)
    refuse_absent_files({path: with_absolute_references(given, path), objective: target})
    pool_to_search(keep_read_keys(given, ignored, keys), path)  # before mergekit is imported
    data = read_merge_config(path)
    base, sources = pool_to_search(data, path)
    splits = _splits_of(data, path, base)
    if dropped := unsearched_settings(data, path):
        logger.warning("%s: %s. Ignored: %s", path, SPLIT, ", ".join(dropped))
    fields = {
        "base_model": base,
        "dtype": data.get("out_dtype") or data.get("dtype") or "bfloat16",
        "vectors": {
            name: {"source": source, "by": splits.get(name)} for name, source in sources.items()
        },
        "objective": target,
    }
    if test is not None:
        fields["test"] = _read_objective(test)
        refuse_absent_files({test: fields["test"]})
        fields["baselines"] = {"weights": _rows_of_own_weights(data, path, base, splits)}
    if is_union(data):
        fields["vocabulary"] = "union"
    if (reference := tokenizer_of(data, path)) is not None:
        by_source = {source: name for name, source in sources.items()}
        fields["tokenizer_source"] = by_source.get(reference, reference)
    origin = Layered(path, fields, {("objective",): (objective, ()), ("test",): (test or path, ())})
    config = parse(StudyConfig, fields, origin)
    warn_of_idle_fields(config, origin)
    if splits:
        logger.info(
            "%s: %d weights are searched: %s", path, len(config.free), ", ".join(config.free)
        )
    return config


def _splits_of(data: Mapping[str, Any], path: Path, base: str) -> dict[str, By]:
    """Return how the vectors of a mergekit YAML are split, by name. Slices are compared with the
    layers of the base and the names of its tensors.
    """
    if not data.get("slices"):
        return splits_to_search(data, path)
    from optimer_hf.models.checkpoint import Checkpoint  # imports torch

    model = resolve_model(base).path
    refuse_other_depth(data, path, count_layers(model))
    return splits_to_search(data, path, Checkpoint(model).names)


def _rows_of_own_weights(
    config: Mapping[str, Any], path: Path, base: str, splits: Mapping[str, By]
) -> dict[str, dict[str, float]]:
    """Return the row of the sealed test for what a mergekit YAML merges as it stands; none if it
    leaves weights out. Logs how to compare with its merge if no weights of the search give it.
    """
    from optimer_hf.vectors.splitting import names_outside  # imports torch

    title = f"as in {path.name}"
    outside = names_outside(resolve_model(base).path) if config.get("slices") else []
    weights = weights_of_config(config, path, splits, outside)
    if weights is not None and all(abs(each) <= LARGEST_WEIGHT for each in weights.values()):
        return {title: weights}
    if not lacks_weights(config, path):
        logger.warning(
            "%s: no weights of this search give its own merge, so the sealed test has no row for "
            "it. To compare with it: optimer merge %s MODEL, then optimer compare STUDY_DIR "
            "--model %s",
            path,
            shlex.quote(str(path)),
            shlex.quote(f"{title}=MODEL"),
        )
    return {}


def _keep_as_begun(config: StudyConfig, path: Path, record: Path) -> StudyConfig:
    """Return the study of a mergekit YAML with those vectors whole that its `record`, if there is
    one, has whole because it was begun when a search ignored what the YAML gave them.
    """
    begun = StudyConfig.read_record(record).vectors if record.exists() else {}
    once_whole = vectors_once_whole(read_merge_config(path, warns=False), path)
    kept = {}
    for name, vector in config.vectors.items():
        if vector.by is None or name not in begun or begun[name].by == vector.by:
            continue
        given = {key: group.model_dump(exclude_none=True) for key, group in vector.by.items()}
        former = vector.model_copy(update={"by": None})
        if begun[name].by is not None:
            fields = vector.model_dump() | {"by": former_split(given)}
            former = VectorConfig.model_validate(fields)
        if former.by == begun[name].by and (former.by is not None or name in once_whole):
            kept[name] = former
    if not kept:
        return config
    logger.warning(
        "%s: the study in %s began with fewer weights for %s, and goes on so. Search in another "
        "directory for each of its values.",
        path,
        record.parent,
        ", ".join(kept),
    )
    changes = {"vectors": config.vectors | kept, "baselines": Baselines()}  # that name the groups
    return config.model_copy(update=changes)


def _read_objective(path: Path) -> dict[str, Any]:
    """Return the fields of an objective file; without `split_by` unless the file has it, so that a
    study on record keeps its own. What does nothing depends on the whole study.
    """
    objective = parse(ObjectiveFile, read_yaml(path), path)
    idle = {"split_by"} - objective.model_fields_set
    return objective.model_dump(exclude={"format_version"} | idle)


@contextmanager
def naming_terms(path: Path, test: Path | None = None) -> Iterator[None]:
    """Put the file and the line before an error about one of its terms, such as a task that does
    not exist. `path` is a study or an objective; a sealed test may have its own file, `test`.
    """
    try:
        yield
    except EvaluationError as error:
        named = TERM_NAMED.match(str(error))
        if named is None:
            raise
        in_test = named["test"] is not None
        file = test if test is not None and in_test else path
        place = _place_of_term(file, named["label"], in_test=in_test)
        if place is None:
            raise
        raise EvaluationError(list_mistakes(file, [(place, str(error))])) from error


@contextmanager
def naming_groups(path: Path) -> Iterator[None]:
    """Put the file and the line before an error about the groups of one of its vectors."""
    try:
        yield
    except ModelError as error:
        named = re.match(r"vectors\.(.+?)\.by: ", str(error))
        if named is None:
            raise
        place: Place | None = ("vectors", named[1], "by")
        if is_for_mergekit(read_yaml(path)):
            place = place_of_vector(read_merge_config(path, warns=False), path, named[1])
        raise ModelError(list_mistakes(path, [(place or (), str(error))])) from error


def _place_of_term(path: Path, label: str, *, in_test: bool) -> Place | None:
    """Return where a file has the term or constraint of a label: an objective file, or a study, in
    its objective or in its test.
    """
    at: tuple[str, ...] = ()
    part: Objective | None
    if "objective" in read_yaml(path):
        study = StudyConfig.read(path)
        at, part = (("test",), study.test) if in_test else (("objective",), study.objective)
    else:
        part = ObjectiveFile.read(path)
    for group in ("terms", "constraints"):
        for index, term in enumerate(() if part is None else getattr(part, group)):
            if term.label == label:
                return (*at, group, index)
    return None


def merge_config_of_study(
    config: StudyConfig, weights: Mapping[str, float], path: Path, kinds: Mapping[str, str]
) -> dict[str, Any]:
    """Return the mergekit config of a study with these weights, for mergekit alone if that gives
    the same merge; `kinds` has the kind of each vector. If `path`, from which the study was read,
    is a mergekit YAML, it comes back with its models as they are written there. For a study.yaml,
    local models are seen from its folder.
    """
    from optimer_hf.vectors.splitting import names_outside, stack_of  # import torch

    base = resolve_model(config.base_model)
    n_layers = layers_for(config.groups, base) or None
    if is_for_mergekit(read_yaml(path)):
        given = read_merge_config(path, warns=False)
        stack = stack_of(base.path) if n_layers else None
        outside = names_outside(base.path) if n_layers else []
        layers = Layers(config.groups, n_layers, stack, outside)
        return with_weights(given, path, weights, kinds, layers)
    folder = path.resolve().parent
    vectors = {
        name: vector.model_copy(update={"source": relative_reference(str(vector.source), folder)})
        for name, vector in config.vectors.items()
    }
    reference = relative_reference(config.base_model, folder)
    here = config.model_copy(update={"base_model": reference, "vectors": vectors})
    plain = plain_config_of(here, weights, kinds, n_layers)
    return plain or merge_config_of(here, weights, n_layers)


def obstacle_of_study(
    config: StudyConfig, weights: Mapping[str, float], path: Path, kinds: Mapping[str, str]
) -> str | None:
    """Return why `merge_config_of_study` is not a config for mergekit alone, as a clause; None if
    it is one.
    """
    if is_for_mergekit(read_yaml(path)):
        return obstacle_in(read_merge_config(path, warns=False), path, kinds)
    return obstacle_to_plain(config, weights, kinds)


def merge_text(path: Path, merge_config: Mapping[str, Any], *notes: str) -> str:
    """Return what `merge_config_of_study` made of the file at `path` as the text of a mergekit
    YAML: that file with its comments, if it is one. The `notes` follow its opening comments, with
    the command that runs the text as THIS.yml.
    """
    command = mergekit_command(merge_config, "THIS.yml")
    lines = [*notes, f"Save it beside {path.name} as THIS.yml. Run: {command}"]
    note = "".join(f"# {line}\n" for line in lines)
    is_ours = not is_for_mergekit(read_yaml(path))
    edited = None if is_ours else text_with(merge_config, path)
    opening = "" if is_ours else "".join(opening_comments(path))
    if edited is None:
        return f"{opening}{note}{yaml_text(merge_config)}"
    return f"{opening}{note}{edited.removeprefix(opening)}"


def opening_comments(path: Path) -> list[str]:
    """Return the lines of comments at the top of a YAML file."""
    with path.open(encoding="utf-8-sig") as file:
        return list(takewhile(lambda line: line.startswith("#"), file))
