"""Train the data mixtures of a run that are compared with the merge.

They come after the search, since some have its ratios. A mixture in the pool is a vector like any
other, and is trained before it.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from optimer_hf.comparison.mixtures_file import Attempt, record_attempts, record_mixture
from optimer_hf.errors import ConfigError
from optimer_hf.experiment.folder import Inputs, Run
from optimer_hf.files.text import slug
from optimer_hf.study.config import MixtureBaseline
from optimer_hf.study.directory import Study
from optimer_hf.training.config import TrainConfig
from optimer_hf.training.mixture import (
    DIGITS,
    budget_of,
    draw_shares,
    mix_runs,
    owners_of_parts,
    ratios_of,
    training_tokens,
)
from optimer_hf.training.run import train
from optimer_hf.vectors.training_record import TRAINING_FILE, TrainingRecord

logger = logging.getLogger(__name__)


def train_mixtures(run: Run, study: Study, inputs: Inputs) -> dict[str, str]:
    """Train the data mixtures among the baselines with the settings of the vectors, and return
    their directories by name. The study records them, for `optimer compare`.
    """
    singles, trained = inputs.single_trainings, {}
    for name, baseline in study.config.baselines.mixtures.items():
        shares = _shares_of(baseline, study, inputs)
        if shares is None:
            logger.warning(
                "mixture %r is left out: no weight is above 0, so there are no ratios", name
            )
            continue
        n_tokens = budget_of(singles, baseline.budget, shares)
        config = mix_runs(singles, shares, name=slug(name), max_tokens=n_tokens)
        out = _train(run, config)
        record_mixture(study.directory, name, out)
        trained[name] = str(out)
    return trained


def _shares_of(
    baseline: MixtureBaseline, study: Study, inputs: Inputs
) -> Mapping[str, float] | None:
    """Return the shares of a mixture; None if they are those of the search and no weight is above
    zero.
    """
    if baseline.shares == "uniform":
        return dict.fromkeys(inputs.single_trainings, 1.0)
    if isinstance(baseline.shares, dict):
        return baseline.shares
    tokens = {name: int(each.max_tokens or 0) for name, each in inputs.trainings.items()}
    given = {name: study.config.sources[name] for name in study.config.mixtures.keys() - tokens}
    tokens |= training_tokens(given)
    try:
        return ratios_of(study.best_trial.weights, tokens, study.config.mixtures).shares
    except ConfigError:
        return None


def train_attempts(run: Run, study: Study, inputs: Inputs) -> None:
    """Train the attempts at a mixture among the baselines, and record them in the study: for each
    number R, R mixtures on 1/R of the tokens of all vectors.
    """
    singles, seed = inputs.single_trainings, study.config.search.seed
    for n in study.config.baselines.attempts:
        attempts = []
        for index, shares in enumerate(draw_shares(list(singles), n, seed=seed), start=1):
            n_tokens = budget_of(singles, "all") // n
            name = f"attempt-{index}-of-{n}"
            config = mix_runs(singles, shares, name=name, max_tokens=n_tokens)
            model, owners = _train(run, config), owners_of_parts(singles, shares)
            attempts.append(Attempt(model=model, shares=_trained_shares(model, singles, owners)))
        record_attempts(study.directory, attempts)


def _trained_shares(model: Path, names: Iterable[str], owners: Sequence[str]) -> dict[str, float]:
    """Return the share of each vector's text that a mixture was trained on, in whole blocks, by the
    record of its training. `owners` names the vector of each part of the mixture; a replay, the
    last part, has none.
    """
    parts = TrainingRecord.read(model / TRAINING_FILE).corpus.parts or []
    tokens = dict.fromkeys(names, 0)
    for owner, part in zip(owners, parts, strict=False):
        tokens[owner] += part.n_tokens
    total = sum(tokens.values())
    return {name: round(n / total, DIGITS) for name, n in tokens.items()}


def _train(run: Run, config: TrainConfig) -> Path:
    """Train a mixture into a directory of the run, unless it is there, and return the directory."""
    out = run.out / "mixtures" / f"{config.name}-{config.digest()[:6]}"
    train(config, out)
    return out.resolve()
