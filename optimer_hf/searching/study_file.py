"""A study.yaml, or a mergekit YAML with an objective file -> StudyConfig; StudyConfig + weights ->
mergekit YAML.
"""

import logging
from collections.abc import Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any

from optimer_hf.errors import ConfigError
from optimer_hf.files.model import parse, refuse_absent_files
from optimer_hf.files.reading import read_yaml
from optimer_hf.merging.mergekit_keys import is_for_mergekit
from optimer_hf.merging.mergekit_pool import (
    is_union,
    merge_config_of,
    pool_to_search,
    tokenizer_of,
    unsearched_settings,
    with_absolute_references,
    with_weights,
)
from optimer_hf.merging.mergekit_yaml import read_merge_config
from optimer_hf.scoring.objective import ObjectiveFile
from optimer_hf.study.config import SearchConfig, StudyConfig

logger = logging.getLogger(__name__)


def read_study(
    path: Path,
    *,
    objective: Path | None = None,
    test: Path | None = None,
    n_trials: int | None = None,
) -> StudyConfig:
    """Return the study of a study.yaml, or of a mergekit YAML, whose models become the pool, with
    the objective files `objective` and (for its sealed test) `test`. `n_trials` replaces the number
    in the file.

    Raises ConfigError for a mistake in one of the files, and for a local file that is missing.
    """
    if is_for_mergekit(read_yaml(path)):
        if objective is None:
            raise ConfigError(
                f"{path}: a mergekit YAML says what to merge, but not for which objective. Add "
                "--objective OBJECTIVE.yaml."
            )
        config = study_of_merge_config(path, objective, test)
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
    data = read_merge_config(path)
    target = ObjectiveFile.read(objective).model_dump(exclude={"format_version"})
    refuse_absent_files({path: with_absolute_references(data, path), objective: target})
    base, sources = pool_to_search(data, path)
    if dropped := unsearched_settings(data):
        logger.warning(
            "%s: one weight is searched for each model, and trials and builds know nothing else; "
            "not in them: %s",
            path,
            ", ".join(dropped),
        )
    fields = {
        "base_model": base,
        "dtype": data.get("out_dtype") or data.get("dtype") or "bfloat16",
        "vectors": {name: {"source": source} for name, source in sources.items()},
        "objective": target,
    }
    if test is not None:
        fields["test"] = ObjectiveFile.read(test).model_dump(exclude={"format_version"})
        refuse_absent_files({test: fields["test"]})
    if is_union(data):
        fields["vocabulary"] = "union"
    if (reference := tokenizer_of(data, path)) is not None:
        by_source = {source: name for name, source in sources.items()}
        fields["tokenizer_source"] = by_source.get(reference, reference)
    return parse(StudyConfig, fields, path)


def merge_config_of_study(
    config: StudyConfig, weights: Mapping[str, float], path: Path, kinds: Mapping[str, str]
) -> dict[str, Any]:
    """Return the mergekit config of a study with these weights; `kinds` has the kind of each
    vector. If `path`, from which the study was read, is a mergekit YAML, it comes back with its
    models as they are written there.
    """
    if is_for_mergekit(read_yaml(path)):
        return with_weights(read_merge_config(path, warns=False), path, weights, kinds)
    return merge_config_of(config, weights)


def opening_comments(path: Path) -> list[str]:
    """Return the comments at the top of a mergekit YAML; none of another file."""
    if not is_for_mergekit(read_yaml(path)):
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    return list(takewhile(lambda line: line.startswith("#"), lines))
