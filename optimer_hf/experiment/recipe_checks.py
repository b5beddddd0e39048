"""What `optimer run` refuses of the files of a recipe folder, beyond the fields of each.

Errors name the file that sets the field: a file of the folder, or the profile laid over it. Nothing
is loaded that takes seconds to import.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from optimer_hf.comparison.rows import check_titles
from optimer_hf.errors import ConfigError
from optimer_hf.experiment.profile import RecipeFiles
from optimer_hf.files.model import list_mistakes
from optimer_hf.files.paths import Place
from optimer_hf.files.reference import function_in_file
from optimer_hf.files.text import prefix_field, slug
from optimer_hf.scoring.objective import Objective
from optimer_hf.study.plugins import refuse_missing_plugins
from optimer_hf.training.config import TrainConfig
from optimer_hf.training.mixture import budget_of, mix_runs, training_tokens


def _refuse(files: RecipeFiles, place: Place, message: str) -> ConfigError:
    """Return the error about a field of the study."""
    return ConfigError(list_mistakes(files.file, [(place, prefix_field(place, message))]))


# -- the study -------------------------------------------------------------------------------------


def check_study(files: RecipeFiles, *, needs_test: bool = True) -> None:
    """Raise ConfigError for a study that `optimer run` cannot run. Without `needs_test`, a profile
    may still add the sealed test.
    """
    config, trainings = files.study, files.trainings
    _check_functions(files, "objective", config.objective)
    if config.test is None and needs_test:
        message = "field 'test' is missing. A run ends with the sealed test. Name its terms, or "
        message += "use `optimer search`."
        raise ConfigError(list_mistakes(files.file, [(("test",), message)]))
    if config.test is not None:
        _check_functions(files, "test", config.test)
    for name, training in trainings.items():
        if training.base_model != config.base_model:
            message = (
                f"vectors.{name} is trained from {training.base_model!r}, but base_model is "
                f"{config.base_model!r}. Give both the same base."
            )
            raise ConfigError(list_mistakes(files.file, [(("base_model",), message)]))
    if config.tokenizer_source in {*trainings, *config.mixtures}:
        raise _refuse(
            files,
            ("tokenizer_source",),
            f"the vector {config.tokenizer_source!r} is trained here, with the tokenizer of the "
            "base. Leave the field out, or name another model.",
        )
    check_titles(config, files.file)
    refuse_missing_plugins(config, files.file)


def _check_functions(files: RecipeFiles, part: str, objective: Objective) -> None:
    """Raise ConfigError for terms with a function that no file has."""
    for group in ("terms", "constraints"):
        for index, term in enumerate(getattr(objective, group)):
            if term.function is not None and function_in_file(term.function) is None:
                message = (
                    f"term {term.label!r}: found the function {term.function!r}, which only Python "
                    f"can give. Name its file: `function: my_metrics.py:{term.function}`."
                )
                raise ConfigError(
                    list_mistakes(files.file, [((part, group, index, "function"), message)])
                )


# -- mixtures --------------------------------------------------------------------------------------


def mix_vectors(files: RecipeFiles) -> dict[str, TrainConfig]:
    """Return the trainings of the mixtures in the pool. Raises ConfigError if the runs that one
    mixes are not alike.
    """
    mixed, singles = {}, files.trainings
    for name, vector in files.study.vectors.items():
        if vector.mixture is not None and vector.source is None:
            shares = vector.mixture
            if not isinstance(shares, dict):
                shares = dict.fromkeys(singles, 1.0)
            n_tokens = budget_of(singles, vector.budget, shares)
            with _naming(files, ("vectors", name, "mixture")):
                mixed[name] = mix_runs(singles, shares, name=slug(name), max_tokens=n_tokens)
    return mixed


@contextmanager
def _naming(files: RecipeFiles, place: Place) -> Iterator[None]:
    """Put the file and the field of the study before an error about a mixture."""
    try:
        yield
    except ConfigError as error:
        raise _refuse(files, place, str(error)) from error


def check_mixtures(files: RecipeFiles, *, has_budget: bool = True) -> None:
    """Raise ConfigError for mixtures that cannot be trained: those in the pool, and the baselines,
    which are trained after the search. Without `has_budget`, a profile may still change on how many
    tokens the vectors are trained.
    """
    config, singles = files.study, files.trainings
    baselines = config.baselines
    for name, baseline in baselines.mixtures.items():
        if baseline.shares == "searched":
            with _naming(files, ("baselines", "mixtures", name, "shares")):
                training_tokens(_sources_of_mixtures(files))
    for name, vector in config.vectors.items():
        if vector.mixture is not None and vector.source is None:
            shares = vector.mixture
            parts = list(shares) if isinstance(shares, dict) else list(singles)
            _check_parts(files, ("vectors", name, "mixture"), parts)
    mix_vectors(files)
    if not baselines.n_trained_models:
        return
    parts = [name for name, vector in config.vectors.items() if vector.mixture is None]
    _check_parts(files, ("baselines", "mixtures" if baselines.mixtures else "attempts"), parts)
    for name, baseline in baselines.mixtures.items():
        given = baseline.shares
        shares = given if isinstance(given, dict) else dict.fromkeys(singles, 1.0)
        with _naming(files, ("baselines", "mixtures", name)):
            mix_runs(singles, shares, name=slug(name), max_tokens=1)
    if baselines.attempts:
        _check_attempts(files, has_budget=has_budget)


def _sources_of_mixtures(files: RecipeFiles) -> Mapping[str, str]:
    """Return the mixtures in the pool that are not trained here, by name."""
    named = files.study.vectors.items()
    return {
        name: str(vector.source)
        for name, vector in named
        if vector.mixture is not None and vector.source is not None
    }


def _check_attempts(files: RecipeFiles, *, has_budget: bool) -> None:
    """Raise ConfigError if the attempts at a mixture cannot share the tokens of all vectors, or if
    one of these is in every merge, and so would be in each attempt twice.
    """
    config, singles, place = files.study, files.trainings, ("baselines", "attempts")
    if fixed := [name for name in singles if name in config.fixed_parts]:
        raise _refuse(
            files,
            place,
            f"vector {fixed[0]!r} is trained here and fixed, so it is added to each attempt, which "
            "has its text already. Search its weight, or leave the attempts out.",
        )
    n = max(config.baselines.attempts)
    n_tokens = budget_of(singles, "all") // n
    shares = dict.fromkeys(singles, 1.0)
    with _naming(files, place):
        block_size = mix_runs(singles, shares, name="attempt", max_tokens=1).block_size
    if has_budget and n_tokens < block_size:
        raise _refuse(
            files,
            place,
            f"{n} attempts leave {n_tokens} tokens for each, less than a block of {block_size}. "
            f"Give fewer attempts, or more tokens to the vectors (max_tokens in "
            f"{_files_that_set_tokens(files)}).",
        )


def _files_that_set_tokens(files: RecipeFiles) -> str:
    """Return the files that say on how many tokens the vectors are trained, as text."""
    places = (file.locate(("max_tokens",))[0].name for file in files.train_files.values())
    return ", ".join(dict.fromkeys(places))


def _check_parts(files: RecipeFiles, place: Place, parts: Sequence[str]) -> None:
    """Raise ConfigError unless all parts of a mixture are trained here, on so many tokens."""
    singles = files.trainings
    if not parts:
        message = "no other vector has a 'train' file, so there is nothing to mix."
        raise _refuse(files, place, message)
    for part in parts:
        if part not in singles or singles[part].max_tokens is None:
            raise _refuse(
                files,
                place,
                f"vector {part!r} is not trained here with max_tokens, so no mixture can contain "
                "its text. Train it in this folder, or leave it out of the mixture.",
            )
