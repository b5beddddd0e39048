"""The weights of a merge -> mixture ratios -> a train config that retrains with them.

A weight scales what a vector learned from its tokens, so weight x tokens reads as the share of a
data set in the mixture that would have taught the same (OptiMer, arXiv 2603.28858, sec. 5). What a
reader would not guess: a weight of zero or less has no share, and is named rather than hidden.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optimer_hf.corpus.config import CorpusConfig
from optimer_hf.errors import ConfigError
from optimer_hf.files.digest import differences
from optimer_hf.files.paths import portable
from optimer_hf.files.reading import yaml_text
from optimer_hf.files.staging import write_text
from optimer_hf.training.config import MixturePart, TrainConfig
from optimer_hf.vectors.record import read_record

DIGITS = 6


@dataclass(frozen=True)
class Ratios:
    """Shares that sum to 1, by vector, and the vectors that have none because their weight is not
    above zero.
    """

    shares: dict[str, float]
    left_out: list[str]


def ratios(weights: Mapping[str, float], tokens: Mapping[str, int]) -> Ratios:
    """Return shares in proportion to weight x tokens.

    Raises ConfigError when no weight is above zero.
    """
    kept = {name: weight * tokens[name] for name, weight in weights.items() if weight > 0}
    if not kept:
        raise ConfigError("no weight is above 0, so there is no mixture to read from the weights.")
    total = sum(kept.values())
    shares = {name: round(value / total, DIGITS) for name, value in kept.items()}
    largest = max(shares, key=lambda name: shares[name])
    shares[largest] = round(shares[largest] + 1 - sum(shares.values()), DIGITS)
    return Ratios(shares, [name for name, weight in weights.items() if weight <= 0])


def training_tokens(sources: Mapping[str, str]) -> dict[str, int]:
    """Return how many tokens each vector was trained on, from what its training left beside it.

    Raises ConfigError for a vector that does not say.
    """
    found = {}
    for name, source in sources.items():
        record = read_record(Path(source)) if Path(source).is_dir() else None
        training: Mapping[str, Any] = (record.training if record is not None else None) or {}
        if "n_tokens" not in training:
            raise ConfigError(
                f"vector {name!r} ({source}) does not say how many tokens it was trained on (no "
                "training record in its vector.json). Train it with `optimer train`, or give "
                f"--tokens {name}=N; if no corpus stands behind it, leave it out: --without {name}."
            )
        found[name] = int(training["n_tokens"])
    return found


def mixture(
    trainings: Mapping[str, TrainConfig], shares: Mapping[str, float], *, name: str, max_tokens: int
) -> TrainConfig:
    """Return the run that trains on the corpora of some runs mixed by shares, with the settings of
    the first one; corpora that are too small are repeated.

    Raises ConfigError when a share has no run, or the runs are not alike.
    """
    unknown = [key for key in shares if key not in trainings]
    if unknown:
        raise ConfigError(
            f"mixture {name!r}: no training run is called {unknown[0]!r}; known: "
            f"{sorted(trainings)}. Give its train file, too, or leave the vector out."
        )
    if not sum(shares.values()) > 0 or min(shares.values()) < 0:
        raise ConfigError(f"mixture {name!r}: shares must be >= 0, and one > 0.")
    first = trainings[next(iter(shares))]
    _check_alike(name, [trainings[key] for key in shares])
    if "max_steps" in first.trainer:
        raise ConfigError(
            f"mixture {name!r}: trainer.max_steps fixes the length of a run, not its tokens. Use "
            "max_tokens in the train files."
        )
    total = sum(shares.values())
    parts = [
        MixturePart(
            **corpus.model_dump(exclude={"share", "upsample"}),
            share=share / total * part,
            upsample=True,
        )
        for key, share in shares.items()
        if share > 0
        for corpus, part in _corpora(trainings[key])
    ]
    fields = first.model_dump(exclude={"corpus", "mixture", "name", "max_tokens"})
    return TrainConfig(**fields, name=name, mixture=parts, max_tokens=max_tokens)


def _corpora(training: TrainConfig) -> list[tuple[CorpusConfig, float]]:
    """Return the corpora of a run with their share in it."""
    if training.corpus is not None:
        return [(training.corpus, 1.0)]
    return [(part, part.share) for part in training.mixture or []]


def _check_alike(name: str, trainings: Sequence[TrainConfig]) -> None:
    """Refuse runs that differ in more than name, text, length and seed: their mixture would be
    another experiment.
    """
    own = {"name", "corpus", "mixture", "max_tokens", "seed"}
    first, *others = (training.model_dump(exclude=own) for training in trainings)
    for training, other in zip(trainings[1:], others, strict=True):
        if differing := differences(other, first):
            raise ConfigError(
                f"mixture {name!r}: {training.name!r} was trained with another setting than "
                f"{trainings[0].name!r} ({differing[0]}); a mixture needs one. Train them alike."
            )


def write_mixture(config: TrainConfig, path: Path) -> None:
    """Write a train config as YAML with its paths relative to where it lies."""
    data = {"format_version": 1} | config.model_dump(mode="json", exclude_defaults=True)
    header = f"# Shares found from merge weights. Run: optimer train {path.name} OUT\n"
    text = yaml_text(portable(data, path.resolve().parent))
    write_text(path, header + text)
