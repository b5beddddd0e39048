"""Read a recipe folder: the trainings, the study and the baselines of a run, all checked."""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from optimer_hf.errors import ConfigError
from optimer_hf.experiment.checking import list_missing_inputs_of_recipe
from optimer_hf.experiment.marks import CLAIM_FILE, Claim, read_claim
from optimer_hf.experiment.profile import STUDY, RecipeFiles, read_profile, read_recipe_files
from optimer_hf.experiment.recipe_checks import check_mixtures, check_study, mix_vectors
from optimer_hf.files.digest import digest, fingerprint, sha256_file
from optimer_hf.files.paths import strings_in
from optimer_hf.files.reading import read_yaml
from optimer_hf.files.reference import expand_home, is_there
from optimer_hf.files.text import did_you_mean
from optimer_hf.training.config import MOST_TOKENS, is_count_of_tokens
from optimer_hf.vectors.shapes import refuse_other_shapes

if TYPE_CHECKING:
    from optimer_hf.study.config import SearchConfig, StudyConfig, VectorConfig
    from optimer_hf.training.config import TrainConfig

SeededT = TypeVar("SeededT", "TrainConfig", "SearchConfig")

SHORT = "short"  # the profile of --short

RESULTS = (  # files of a finished run; its model has figures, too
    *(f"merged/{name}" for name in ("config.json", "recipe.yaml", "recipe.lock.json")),
    *("merged/figures/captions.json", "results.json", "results.md"),
)


def _is_claimed(folder: Path) -> bool:
    """Whether a folder has the results of a run, and a run.json in it is no file of the user."""
    with contextlib.suppress(ConfigError):
        return read_claim(folder) is not None
    return False


@dataclass(frozen=True)
class Run:
    """A recipe folder, the directory for its results, and its budget.

    `profile` names a YAML file of the folder with values that are laid over its others (short: the
    smaller budget). `tokens` trains every vector on that many. `seed` is added to the seeds of all
    trainings and searches.
    """

    folder: Path
    out: Path
    profile: str | None = None
    tokens: int | None = None
    seed: int = 0

    @property
    def name(self) -> str:
        """Name of the recipe, which is that of its folder."""
        return self.folder.name

    def inputs_digest(self) -> str:
        """Return a digest of all input files and the budget; a finished run records it."""
        files = {
            str(path.relative_to(self.folder)): sha256_file(path)
            for path in self._match_inputs("*")
            if path.is_file() and path.suffix != ".md" and "__pycache__" not in path.parts
        }
        return digest({"files": files, "elsewhere": self._digest_elsewhere()} | self.claim().budget)

    def _match_inputs(self, pattern: str) -> list[Path]:
        """Return what matches in the folder, without the results of runs that lie in it."""
        folders = {file.parent for file in self.folder.rglob(CLAIM_FILE)}
        runs = {folder for folder in folders if _is_claimed(folder)}
        claimed = (runs | {self.out}) - {self.folder}
        matches = sorted(self.folder.rglob(pattern))
        return [path for path in matches if claimed.isdisjoint(path.parents)]

    def _digest_elsewhere(self) -> dict[str, dict[str, str]]:
        """Return fingerprints of the files that YAML files of the folder name and that lie outside
        it. For a directory (a model, tasks), they are those of the files directly in it.
        """
        fingerprints = {}
        for file in sorted([*self._match_inputs("*.yaml"), *self._match_inputs("*.yml")]):
            with contextlib.suppress(ConfigError):  # not one of ours, or refused when it is read
                for _, text in strings_in(read_yaml(file)):
                    path = (file.parent / expand_home(Path(text))).resolve()
                    if is_there(path) and not path.is_relative_to(self.folder):
                        files = sorted(path.iterdir()) if path.is_dir() else [path]
                        fingerprints[text] = {f.name: fingerprint(f) for f in files if f.is_file()}
        return fingerprints

    def claim(self, *, seeds: bool = False) -> Claim:
        """Return the claim of this run, or of runs under several `seeds`, on its directory."""
        is_short = self.profile == SHORT
        return Claim(
            recipe=self.name,
            seeds=seeds,
            short=is_short,
            profile=None if is_short else self.profile,
            tokens=self.tokens,
            seed=self.seed,
        )


def run_of(
    recipe_dir: Path,
    out: Path | None = None,
    *,
    short: bool = False,
    profile: str | None = None,
    tokens: str | int | None = None,
    is_seeded: bool = False,
) -> Run:
    """Return the run of a recipe folder. Its results go to `out` (None: a folder under runs/ named
    after the recipe and its budget).

    `short` is short for the profile of that name. `tokens` may be a text such as 1_000_000. Raises
    ConfigError if there is no such folder or profile, or if `tokens` is no number.
    """
    if not recipe_dir.is_dir():
        found = "found a file, expected a" if recipe_dir.exists() else "no such"
        raise ConfigError(f"{recipe_dir}: {found} recipe folder.")
    folder = recipe_dir.resolve()
    if short and profile not in (None, SHORT):
        raise ConfigError(f"--short is --profile {SHORT}, and --profile {profile} is another one.")
    profile = SHORT if short else profile
    _check_profile(folder, profile)
    n_tokens = _n_tokens(tokens)
    suffix = (f"-{profile}" if profile else "") + (f"-{n_tokens}" if n_tokens else "")
    suffix += "-seeds" if is_seeded else ""
    target = out or Path("runs") / (folder.name + suffix)
    return Run(folder, target.resolve(), profile, n_tokens)


def _check_profile(folder: Path, profile: str | None) -> None:
    """Raise ConfigError if a recipe folder has no such profile."""
    if profile is None or profile in (names := _profiles_in(folder)):
        return
    hint = did_you_mean(profile, names) if names else " The folder has none."
    raise ConfigError(
        f"{folder}: no profile {profile!r}, which would be the file {profile}.yaml with the keys "
        f"'train' and 'study'.{hint}"
    )


def _profiles_in(folder: Path) -> list[str]:
    """Return the names of the YAML files in a recipe folder that belong to no other kind."""
    files = (path for path in sorted(folder.glob("*.yaml")) if path.name != STUDY)
    return [path.stem for path in files if _is_profile(path)]


def _is_profile(path: Path) -> bool:
    """Whether a file is a profile by its keys. One with mistakes is, so that they are named."""
    try:
        data = read_yaml(path)
    except ConfigError:
        return True
    return not data.keys() & {"base_model", "terms", "name"}


def _n_tokens(given: str | int | None) -> int | None:
    if given is None:
        return None
    plain = str(given).replace("_", "").replace(",", "")
    if not is_count_of_tokens(plain):
        raise ConfigError(
            f"--tokens {given!r}: expected a number of tokens, e.g. 1_000_000, up to "
            f"{MOST_TOKENS:,}."
        )
    return int(plain)


# -- reading a recipe folder -----------------------------------------------------------------------


@dataclass(frozen=True)
class Inputs:
    """What a recipe folder asks for: the study, and the training of each vector that is trained
    here, by name. The study takes such vectors from `out`, and has the shares of mixtures.
    """

    study: "StudyConfig"
    trainings: Mapping[str, "TrainConfig"]

    @property
    def single_trainings(self) -> dict[str, "TrainConfig"]:
        """The trainings of the vectors that have text of their own, so of no mixtures."""
        mixtures = self.study.mixtures
        return {name: each for name, each in self.trainings.items() if name not in mixtures}


def check_folder(run: Run) -> None:
    """Raise ConfigError for a folder without a study.yaml, for missing files, and for mistakes in
    the fields of its files that are found without a library that takes seconds to import.
    """
    _read_files(run)


def load_inputs(run: Run) -> Inputs:
    """Read a recipe folder, and refuse everything that can be wrong with its files before anything
    is trained. Raises ConfigError and CorpusError.
    """
    from optimer_hf.corpus.documents import read_documents
    from optimer_hf.training.checks import check_config

    files = _read_files(run)
    config, singles = files.study, files.trainings
    for name, training in singles.items():
        check_config(training, files.train_files[name])
        for corpus in training.corpora:
            next(read_documents(corpus), None)
    _check_tests(config)
    trainings = {
        name: _add_seed(training, run.seed)
        for name, training in (singles | mix_vectors(files)).items()
    }
    sources = {
        name: _locate(vector, vector_dir(run, name), singles) if vector.source is None else vector
        for name, vector in config.vectors.items()
    }
    searches = {name: _add_seed(s, run.seed) for name, s in config.baselines.searches.items()}
    changed = {
        "vectors": sources,
        "search": _add_seed(config.search, run.seed),
        "baselines": config.baselines.model_copy(update={"searches": searches}),
    }
    return Inputs(config.model_copy(update=changed), trainings)


def _locate(
    vector: "VectorConfig", directory: Path, singles: Mapping[str, "TrainConfig"]
) -> "VectorConfig":
    """Return a vector that a run trains as the study names it: by its directory, and by the shares
    of a mixture.
    """
    shares = dict.fromkeys(singles, 1.0) if vector.mixture == "uniform" else vector.mixture
    changes = {"train": None, "source": str(directory), "mixture": shares}
    return vector.model_copy(update=changes)


def _add_seed(config: SeededT, seed: int) -> SeededT:
    """Return a training or a search with `seed` added to its own seed."""
    return config.model_copy(update={"seed": (config.seed + seed) % 2**32})


def _read_files(run: Run) -> RecipeFiles:
    """Return the files of a recipe folder with the budget of a run. All that they name is there."""
    if not (run.folder / STUDY).exists():
        raise ConfigError(f"{run.folder}: not a recipe folder (it has no study.yaml).")
    profile = read_profile(run.folder / f"{run.profile}.yaml") if run.profile else None
    files = read_recipe_files(run.folder, profile, run.tokens)
    check_study(files)
    check_mixtures(files)
    if missing := list_missing_inputs_of_recipe(files):
        raise ConfigError(missing)
    given = {n: str(v.source) for n, v in files.study.vectors.items() if v.source is not None}
    refuse_other_shapes(files.study.base_model, given)
    return files


def _check_tests(config: "StudyConfig") -> None:
    """Raise EvaluationError for items that are in both the search and the sealed test."""
    from optimer_hf.scoring.items import check_disjoint
    from optimer_hf.scoring.tasks import load_tasks

    if config.test is not None:
        check_disjoint(config.objective, config.test, load_tasks([config.objective, config.test]))


def check_sources(inputs: Inputs) -> None:
    """Open the vectors and models that are not trained here, and the tools that trials are reported
    to. Raises OptimerError for those that cannot be used, before anything is trained.
    """
    from optimer_hf.merging.tokenizer import scoring_tokenizer
    from optimer_hf.merging.union import open_base
    from optimer_hf.models.resolve import resolve_base
    from optimer_hf.searching.engine import refuse_missing_engine, refuse_unusable_engine
    from optimer_hf.searching.tracking import make_callbacks
    from optimer_hf.vectors.opening import open_vector
    from optimer_hf.vectors.splitting import (
        idle_weights,
        refuse_unknown_groups,
        split_pool,
    )

    config = inputs.study
    refuse_missing_engine(config.engine)
    for search in (config.search, *config.baselines.searches.values()):
        make_callbacks(search.report_to)
    given = {name: v.source for name, v in config.vectors.items() if name not in inputs.trainings}
    base, tokenizer = open_base(
        resolve_base(config.base_model),
        {name: str(source) for name, source in given.items()},
        config.tokenizer_reference,
        config.vocabulary,
    )
    refuse_unusable_engine(config.engine, base, tokenizer, config.dtype)
    templated = config.objective.apply_chat_template
    scoring_tokenizer(base, tokenizer, apply_chat_template=templated)
    for name, source in config.baselines.models.items():
        open_vector(name, str(source), base)
    opened = [open_vector(n, str(each), base) for n, each in given.items()]
    split_pool(opened, config.groups, base, idle=idle_weights(config.fixed))
    for name, groups in config.groups.items():
        if name in inputs.trainings:
            refuse_unknown_groups(name, groups, base)


def vector_dir(run: Run, name: str) -> Path:
    """Return the directory of a vector that a run trains."""
    return (run.out / "vectors" / name).resolve()
