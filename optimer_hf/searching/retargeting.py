"""A new objective over recorded terms: predict its best weights, and verify the prediction."""

from collections.abc import Mapping
from pathlib import Path

from optimer_hf.errors import ConfigError
from optimer_hf.files.reference import is_there
from optimer_hf.scoring.formatting import Unit
from optimer_hf.scoring.objective import Objective, ObjectiveFile
from optimer_hf.searching.loop import search_on
from optimer_hf.searching.runner import Runner
from optimer_hf.study.directory import Study, load_study
from optimer_hf.study.prediction import Estimate, Prediction, match_to_record, predict


def predict_for(study_dir: Path, objective: Path) -> tuple[Objective, Prediction]:
    """Read an objective file, and return the objective over the terms that a study recorded, with
    the weights that the study predicts for it.

    Raises StudyError for a term that was not recorded.
    """
    study = load_study(study_dir)
    target = match_to_record(study, ObjectiveFile.read(objective))
    return target, predict(study, target)


def verify_prediction(
    study_dir: Path,
    target: Objective,
    out: Path,
    n_trials: int,
    *,
    runner: Runner | None = None,
) -> Study:
    """Run `n_trials` trials for the objective that `predict_for` returned, the predicted weights
    first, and return the study at `out`, which holds the recorded trials, too.
    """
    study = load_study(study_dir)
    for term in target.scored_terms:
        if term.text is not None and not is_there(term.text):
            raise ConfigError(
                f"term {term.label!r}: {term.text}: no such file. Items of a study that was pulled "
                "stay with its author: ask for the file, and name it in the objective. It has to "
                "be the one that the trials scored."
            )
    return search_on(study, target, out, n_trials, runner=runner)


def prediction_text(prediction: Prediction, target: Objective) -> str:
    """Return a prediction as lines of text, in the unit of the objective."""
    unit = Unit.of(target)

    def show(estimate: Estimate | Prediction) -> str:
        deviation = f"{unit.factor * estimate.deviation:.{unit.digits}f}"
        return f"{unit.show(estimate.value)} +- {deviation}"

    if prediction.note:
        return f"not predicted: {prediction.note}\n  weights: {_weights_text(prediction.weights)}"
    lines = [
        f"predicted: value {show(prediction)} (posterior mean and standard deviation)",
        f"  weights: {_weights_text(prediction.weights)}",
        *(f"  {label}: gain {show(term)}" for label, term in prediction.terms.items()),
    ]
    if target.constraints:
        lines.append(f"  constraints kept with probability {prediction.feasible:.2f}")
    return "\n".join(lines)


def verification_text(study: Study) -> str:
    """Return the best trial of a study that verified a prediction, as lines of text."""
    best = study.best_trial
    value = Unit.of(study.config.objective).show(study.over_base(best).difference)
    weights = _weights_text(best.weights)
    return f"verified: value {value} (trial {best.number})\n  weights: {weights}"


def _weights_text(weights: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {weight:.4g}" for name, weight in weights.items())
