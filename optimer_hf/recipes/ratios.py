"""Turn the weights of a study or a recipe into mixture ratios, and those into a train file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from optimer_hf.comparison.ratio_check import RatioCheck, check_ratios
from optimer_hf.errors import ConfigError
from optimer_hf.files.text import count, markdown_table
from optimer_hf.recipes.record import Recipe
from optimer_hf.study.directory import load_study
from optimer_hf.training import mixture
from optimer_hf.training.config import MOST_TOKENS, TrainConfig, is_count_of_tokens
from optimer_hf.vectors.record import VectorFile, read_record


@dataclass(frozen=True)
class SourceRatios:
    """The mixture ratios of a study or a recipe, the weights behind them, and the reason why each
    vector without a share has none. `mixtures` are the vectors whose weight counts for others.
    `check` says how well the search predicts mixtures, if its run has trained some.
    """

    ratios: mixture.Ratios
    weights: dict[str, float]
    reasons: dict[str, str]
    mixtures: list[str]
    check: RatioCheck | None = None


def ratios_of(
    source: Path,
    train_yamls: Sequence[Path] = (),
    *,
    out: Path | None = None,
    max_tokens: int | None = None,
    tokens: Sequence[str] = (),
    without: Sequence[str] = (),
) -> SourceRatios:
    """Return the mixture ratios that correspond to the weights of a study directory or a recipe.
    Given the train files of its vectors, also write the train file of that mixture to `out`.

    `tokens` are texts NAME=N, for vectors that do not record how many tokens they were trained on.
    `without` names vectors to leave out. `max_tokens` is the length of the mixture (None: the
    tokens of all vectors together). Raises ConfigError for names that the source does not have.
    """
    if (out is None) != (not train_yamls):
        raise ConfigError("TRAIN_YAML and --out go together: what to mix, and where to write it.")
    weights, sources, mixtures = _weights_of(source, without)
    given = _parse_tokens(tokens, sources)
    known = given | mixture.training_tokens({n: s for n, s in sources.items() if n not in given})
    ratios = mixture.ratios_of(weights, known, mixtures)
    along = ", also with its share of the mixtures," if mixtures else ""
    reasons = {n: f"weight {weights[n]:g}{along} is not above 0" for n in ratios.left_out}
    reasons |= dict.fromkeys(without, "--without")
    ratios.left_out.extend(without)
    if out is not None:
        trainings = _by_vector(list(map(TrainConfig.read, train_yamls)), sources)
        n_tokens = max_tokens or sum(n for name, n in known.items() if name not in mixtures)
        mixed = mixture.mix_runs(trainings, ratios.shares, name="mixture", max_tokens=n_tokens)
        mixture.write_mixture(mixed, out)
    check = check_ratios(load_study(source)) if source.is_dir() else None
    return SourceRatios(ratios, weights, reasons, list(mixtures), check)


def _weights_of(
    source: Path, without: Sequence[str]
) -> tuple[dict[str, float], dict[str, str], dict[str, Mapping[str, float]]]:
    """Return the weights, the sources and the mixtures of the vectors of a study directory or a
    recipe, without those in `without`.
    """
    if source.is_dir():
        study = load_study(source)
        weights, sources = study.best_trial.weights, study.config.sources
        mixtures, groups = study.config.mixtures, study.config.groups
    else:
        recipe = Recipe.read(source)
        weights, sources, mixtures = recipe.weights, recipe.sources, recipe.mixtures
        groups = recipe.groups
    for name in without:
        if name not in sources:
            raise ConfigError(
                f"--without {name}: there is no such vector. Known: {', '.join(sources)}."
            )
    kept = [name for name in sources if name not in without]
    if split := [name for name in kept if name in groups]:
        raise ConfigError(
            f"{source}: the vector {split[0]!r} has a weight for each group of its tensors, and a "
            f"ratio needs one. Leave it out: --without {split[0]}."
        )
    return (
        {name: weights[name] for name in kept},
        {name: sources[name] for name in kept},
        {name: mixtures[name] for name in kept if name in mixtures},
    )


def _by_vector(
    trainings: Sequence[TrainConfig], sources: Mapping[str, str]
) -> dict[str, TrainConfig]:
    """Return trainings by name, and that of each vector by the name of the vector."""
    found = {training.name: training for training in trainings}
    by_name = dict(found)
    for name, source in sources.items():
        training = _training_of(name, read_record(Path(source)), by_name)
        if training is None:
            found.pop(name, None)
        else:
            found[name] = training
    return found


def _training_of(
    name: str, record: VectorFile | None, by_name: Mapping[str, TrainConfig]
) -> TrainConfig | None:
    """Return the training of a vector. In a study, a vector may have another name than in its train
    file, and that of another vector's: what the vector recorded goes before the name.
    """
    own = by_name.get(name)
    if record is None:
        return own
    if record.name != name and record.name in by_name:  # of `optimer train`
        return by_name[record.name]
    texts = [] if record.corpus is None else record.corpus.names
    if not texts:
        return own
    alike = [each for each in by_name.values() if _names_of_texts(each) == texts]
    if own in alike or (record.name == name and not alike):  # the text may have moved
        return own
    return alike[0] if len(alike) == 1 else None


def _names_of_texts(training: TrainConfig) -> list[str]:
    return [corpus.name for corpus, _ in mixture.corpora_of(training)]


def _parse_tokens(texts: Sequence[str], names: Mapping[str, str]) -> dict[str, int]:
    numbers = {}
    for text in texts:
        name, _, number = text.partition("=")
        if name not in names or not is_count_of_tokens(number):
            raise ConfigError(
                f"--tokens {text!r}: expected NAME=N with one of "
                f"{', '.join(sorted(names))} and a number of "
                f"tokens up to {MOST_TOKENS:,}."
            )
        numbers[name] = int(number)
    return numbers


def describe_check(check: RatioCheck) -> str:
    """Return a Markdown table of what was predicted and measured, and the rank correlation."""
    names = list(check.shares[0])
    rows = [
        [
            *(f"{100 * shares[name]:.0f} %" for name in names),
            *(check.unit.show(gain) for gain in (predicted, measured)),
        ]
        for shares, predicted, measured in zip(
            check.shares, check.predicted, check.measured, strict=True
        )
    ]
    table = markdown_table([*names, "merge, predicted", "mixture, measured"], rows)
    intro = (
        "\nGain over the base on the items of the search, of mixtures that were trained, and of "
        f"merges with the same weights as the search predicts it:\n\n{table}\n"
    )
    if check.correlation is None:
        return f"{intro}No rank correlation, because all are alike."
    ends = "" if check.interval is None else f" [{', '.join(f'{e:.2f}' for e in check.interval)}]"
    return (
        f"{intro}Rank correlation (Spearman, 95 %): {check.correlation:.2f}{ends} over "
        f"{count(len(rows), 'mixture')}."
    )
