"""A model and an objective file -> the score of every term."""

from dataclasses import dataclass
from pathlib import Path

from optimer_hf.files.reference import absolute_reference
from optimer_hf.merging.resident import ResidentModel
from optimer_hf.merging.tokenizer import scoring_tokenizer
from optimer_hf.models.live import default_device
from optimer_hf.models.resolve import resolve_base
from optimer_hf.scoring.evaluator import Evaluator
from optimer_hf.scoring.objective import ObjectiveFile


@dataclass(frozen=True)
class Scored:
    """The score of a term of an objective; `limited` when its items are not all that there are."""

    label: str
    metric: str
    score: float
    n_items: int
    limited: bool


def evaluate_model(model: str, objective: Path, *, dtype: str = "bfloat16") -> list[Scored]:
    """Score a model, a directory or a Hub id, on every term of an objective file, in the order of
    the file.
    """
    target = ObjectiveFile.read(objective)
    resolved = resolve_base(absolute_reference(model, Path.cwd()))
    tokenizer = scoring_tokenizer(resolved, None, apply_chat_template=target.apply_chat_template)
    resident = ResidentModel(resolved, [], dtype=dtype, device=default_device())
    evaluator = Evaluator(resident.model, tokenizer, [target])
    asked = target.asked("rescore")
    scores = evaluator.evaluate(asked)
    return [
        Scored(
            each.label,
            str(each.term.metric),
            scores[each.label].score,
            len(scores[each.label].items),
            each.limit is not None,
        )
        for each in asked
    ]
