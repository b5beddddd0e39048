"""Turn the weights of a merge into mixture ratios, and those into a train file.

A weight scales what a vector learned from its tokens, so weight x tokens is the share of its
dataset in a mixture that would have taught the same (OptiMer, arXiv 2603.28858, sec. 5). The weight
of a vector that was itself trained on a mixture counts for the datasets in it, by their shares.
Vectors that come to zero or less get no share; they are reported by name.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from optimer_hf.corpus.config import CorpusConfig
from optimer_hf.errors import ConfigError
from optimer_hf.files.digest import differences
from optimer_hf.files.reading import yaml_text
from optimer_hf.files.staging import write_text
from optimer_hf.training.config import MixturePart, TrainConfig
from optimer_hf.vectors.record import read_record

DIGITS = 6


@dataclass(frozen=True)
class Ratios:
    """Shares by vector, which sum to 1, and the vectors left out because their weight is not above
    zero.
    """

    shares: dict[str, float]
    left_out: list[str]


def ratios_of(
    weights: Mapping[str, float],
    tokens: Mapping[str, int],
    mixtures: Mapping[str, Mapping[str, float]] | None = None,
) -> Ratios:
    """Return shares in proportion to weight x tokens. `mixtures` has the shares of the vectors that
    were trained on the text of others.

    Raises ConfigError when no weight is above zero.
    """
    mixtures = mixtures or {}
    amounts = {
        name: weight * tokens[name] for name, weight in weights.items() if name not in mixtures
    }
    for name, shares in mixtures.items():
        for part in amounts.keys() & shares.keys():
            share = shares[part] / sum(shares.values())
            amounts[part] += weights[name] * tokens[name] * share
    kept = {name: amount for name, amount in amounts.items() if amount > 0}
    if not kept:
        raise ConfigError("no weight is above 0, so the weights give no mixture.")
    total = sum(kept.values())
    shares = {name: round(value / total, DIGITS) for name, value in kept.items()}
    largest = max(shares, key=lambda name: shares[name])
    shares[largest] = round(shares[largest] + 1 - sum(shares.values()), DIGITS)
    return Ratios(shares, [name for name in amounts if name not in kept])


def training_tokens(sources: Mapping[str, str]) -> dict[str, int]:
    """Return how many tokens each vector was trained on, from its training record.

    Raises ConfigError for a vector without one.
    """
    tokens = {}
    for name, source in sources.items():
        record = read_record(Path(source)) if Path(source).is_dir() else None
        run = None if record is None else record.training
        if run is None or run.n_tokens is None:
            raise ConfigError(
                f"vector {name!r} ({source}) does not say how many tokens it was trained on: its "
                "vector.json has no training record. Train it with `optimer train`, or give "
                f"--tokens {name}=N. If it has no corpus, leave it out with --without {name}."
            )
        tokens[name] = run.n_tokens
    return tokens


def mix_runs(
    trainings: Mapping[str, TrainConfig], shares: Mapping[str, float], *, name: str, max_tokens: int
) -> TrainConfig:
    """Return the config of a run on the corpora of several runs, mixed by shares.

    The settings are those of the first run; corpora that are too small are repeated. Raises
    ConfigError when a share has no run, or when the settings of the runs differ.
    """
    unknown = [key for key in shares if key not in trainings]
    if unknown:
        raise ConfigError(
            f"mixture {name!r}: no training run is called {unknown[0]!r}; known: "
            f"{', '.join(sorted(trainings))}. Give its train file as well, or leave the vector out."
        )
    if not sum(shares.values()) > 0 or min(shares.values()) < 0:
        raise ConfigError(f"mixture {name!r}: no share may be below 0, and one must be above 0.")
    first = trainings[next(iter(shares))]
    _check_alike(name, [trainings[key] for key in shares])
    if "max_steps" in first.trainer:
        raise ConfigError(
            f"mixture {name!r}: trainer.max_steps fixes the length of a run, not its tokens. Use "
            "max_tokens in the train files instead."
        )
    total = sum(shares.values())
    parts = [
        MixturePart(
            **corpus.model_dump(exclude={"share", "upsample"}),
            share=shares[key] / total * part,
            upsample=True,
        )
        for key, corpus, part in _parts(trainings, shares)
    ]
    fields = first.model_dump(exclude={"corpus", "mixture", "name", "max_tokens"})
    return TrainConfig(**fields, name=name, mixture=parts, max_tokens=max_tokens)


def owners_of_parts(trainings: Mapping[str, TrainConfig], shares: Mapping[str, float]) -> list[str]:
    """Return the run that each part of the mixture of `mix_runs` comes from, in their order."""
    return [key for key, _, _ in _parts(trainings, shares)]


def draw_shares(names: Sequence[str], n: int, *, seed: int) -> list[dict[str, float]]:
    """Return the shares of n mixtures of some vectors' text: equal ones first, then such as are
    drawn evenly from all that sum to 1 (a flat Dirichlet distribution).
    """
    equal = {name: round(1 / len(names), DIGITS) for name in names}
    drawn = np.random.default_rng([seed, n]).dirichlet(np.ones(len(names)), size=n - 1)
    return [equal, *(dict(zip(names, row.round(DIGITS).tolist(), strict=True)) for row in drawn)]


def budget_of(
    trainings: Mapping[str, TrainConfig],
    budget: Literal["all", "mixed", "one"],
    shares: Mapping[str, float] | str = "uniform",
) -> int:
    """Return on how many tokens to train a mixture: those of all trainings together, of those with
    a share (all, if `shares` does not give them), or of one of all on average.
    """
    if budget == "mixed" and not isinstance(shares, str):
        trainings = {name: each for name, each in trainings.items() if shares.get(name, 0) > 0}
    n_tokens = sum(int(training.max_tokens or 0) for training in trainings.values())
    return n_tokens // max(len(trainings), 1) if budget == "one" else n_tokens


def _parts(
    trainings: Mapping[str, TrainConfig], shares: Mapping[str, float]
) -> list[tuple[str, CorpusConfig, float]]:
    """Return the corpora of a mixture, each with the name of its run and its share of that run."""
    return [
        (key, corpus, part)
        for key, share in shares.items()
        if share > 0
        for corpus, part in corpora_of(trainings[key])
    ]


def corpora_of(training: TrainConfig) -> list[tuple[CorpusConfig, float]]:
    """Return the corpora of a run, each with its share."""
    if training.corpus is not None:
        return [(training.corpus, 1.0)]
    return [(part, part.share) for part in training.mixture or []]


def _check_alike(name: str, trainings: Sequence[TrainConfig]) -> None:
    """Raise ConfigError for runs that differ in more than name, text, length and seed: mixing them
    would be a different experiment.
    """
    own = {"name", "corpus", "mixture", "max_tokens", "seed"}
    first, *others = (training.model_dump(exclude=own) for training in trainings)
    for training, other in zip(trainings[1:], others, strict=True):
        if differing := differences(other, first):
            raise ConfigError(
                f"mixture {name!r}: the settings of {training.name!r} differ from those of "
                f"{trainings[0].name!r} ({differing[0]}). Train both with the same settings."
            )


def write_mixture(config: TrainConfig, path: Path) -> None:
    """Write a train file at `path`, with paths relative to its folder."""
    folder = {"folder": path.resolve().parent}
    data = config.model_dump(mode="json", exclude_defaults=True, context=folder)
    header = f"# Shares computed from merge weights. Run: optimer train {path.name} OUT\n"
    write_text(path, header + yaml_text({"format_version": 1} | data))
