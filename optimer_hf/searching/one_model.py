"""A model + an objective -> the score of every term."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from optimer_hf.errors import ConfigError
from optimer_hf.merging.tokenizer import scoring_tokenizer
from optimer_hf.models.placement import DeviceMap, Placement
from optimer_hf.models.resolve import AnyModel, base_from_here
from optimer_hf.progress import announce
from optimer_hf.scoring.evaluator import Evaluator
from optimer_hf.scoring.functions import Scorer
from optimer_hf.scoring.objective import Objective, ObjectiveFile
from optimer_hf.scoring.scores import TermScore
from optimer_hf.scoring.tasks import load_tasks
from optimer_hf.searching.engine import (
    keep_engine,
    open_engine,
    refuse_missing_engine,
    refuse_other_generation,
    refuse_unusable_engine,
)
from optimer_hf.searching.study_file import naming_terms
from optimer_hf.study.engine import TRANSFORMERS, EngineConfig


@dataclass(frozen=True)
class ScoredTerm:
    """The score of one term; `limited` says that a limit, not all items, was scored."""

    label: str
    metric: str
    score: float
    n_items: int
    limited: bool


def evaluate_model(
    model: str,
    objective: Path,
    *,
    dtype: str = "bfloat16",
    engine: EngineConfig = TRANSFORMERS,
    device_map: str | None = None,
) -> list[ScoredTerm]:
    """Score a model, given as a directory or Hub id, on an objective file; return the terms in the
    order of the file. With a `device_map` the model is spread over devices, see StudyConfig.
    """
    target = ObjectiveFile.read(objective)
    with naming_terms(objective):
        scores = score_model(model, target, dtype=dtype, engine=engine, device_map=device_map)
    return [
        ScoredTerm(
            each.label,
            str(each.term.function_name or each.term.metric),
            scores[each.label].score,
            len(scores[each.label].items),
            each.limit is not None,
        )
        for each in target.asked_terms("rescore")
    ]


def score_model(
    model: AnyModel,
    objective: Objective,
    *,
    dtype: str = "bfloat16",
    engine: EngineConfig = TRANSFORMERS,
    functions: Mapping[str, Scorer] | None = None,
    device_map: DeviceMap | None = None,
) -> dict[str, TermScore]:
    """Return the scores of a model on an objective, by the label of the term. `functions` score the
    terms that name them, see Evaluator. With a `device_map` the model is spread over devices, see
    StudyConfig.
    """
    if device_map is not None and engine.name != "transformers":
        raise ConfigError(
            f"device_map: found {device_map!r}, which spreads a model of transformers. With "
            "engine: vllm, give its option tensor_parallel_size instead."
        )
    placement = None if device_map is None else Placement(device_map)
    with keep_engine():
        with announce("evaluate: opening model and tasks"):
            refuse_missing_engine(engine)
            base, templated = base_from_here(model), objective.apply_chat_template
            refuse_unusable_engine(engine, base, None, dtype)
            tokenizer = scoring_tokenizer(base, None, apply_chat_template=templated)
            tasks = load_tasks([objective])
            refuse_other_generation(engine, [objective], tasks)
            opened = open_engine(
                engine,
                base,
                [],
                dtype=dtype,
                scoring_tokenizer=tokenizer,
                placement=placement,
            )
            evaluator = Evaluator.of(opened.lm, tasks, [objective], functions=functions)
        asked = objective.asked_terms("rescore")
        with announce(f"evaluate: scoring {', '.join(each.label for each in asked)}"):
            return evaluator.evaluate(asked)
