"""Say what readers can do with what was pushed, and what they cannot."""

import json
from collections.abc import Iterator

from optimer_hf.hub.publication import BaseModel, Publication
from optimer_hf.recipes.record import LOCK, VANILLA_CONFIG, Lock, Recipe
from optimer_hf.report.captions import REPORT
from optimer_hf.scoring.objective import Objective
from optimer_hf.vectors.record import VectorFile


def describe_uses(publication: Publication, repo_id: str) -> Iterator[str]:
    """Yield a line for each thing that readers can do with a repository, with its command, and for
    what they cannot do, with the reason.
    """
    record = publication.record
    if isinstance(record, BaseModel):
        yield f"can merge into it: base_model: {repo_id}"
    elif isinstance(record, VectorFile):
        yield f"can search its weight: vectors: {{{record.name}: {repo_id}}} in a study.yaml"
    else:
        yield from _uses_of_merge(publication, record, repo_id)


def _uses_of_merge(publication: Publication, recipe: Recipe, repo_id: str) -> Iterator[str]:
    out = repo_id.rpartition("/")[2]
    if publication.kind == "model":
        yield f'can load it: AutoModelForCausalLM.from_pretrained("{repo_id}")'
    yield f"can build it: optimer pull {repo_id}, then optimer build {out}/recipe.yaml MODEL"
    if Lock.model_validate_json(publication.text(LOCK)).output:
        yield f"can verify it: optimer verify {out}/recipe.yaml MODEL"
    else:
        yield "cannot verify it: no model was built. Run `optimer build`, and push again"
    if VANILLA_CONFIG in publication.files:
        yield f"can merge it with mergekit alone, as {VANILLA_CONFIG} says"
    if n_trials := count_trials(publication.text("study/trials.jsonl")):
        yield f"can re-target it from its {n_trials} trials: optimer retarget {out} OBJECTIVE.yaml"
        yield f"can draw its report: optimer report {out}"
        if kept := list_what_stays(recipe.objective):
            yield f"cannot score new trials on your {' and '.join(kept)}, which stay with you"
    elif publication.kind == "recipe":
        yield "cannot re-target it, as it has no trials: push the directory of the study or run"
    if REPORT in publication.files:
        yield f"can look at the report: {REPORT}"


def list_what_stays(objective: Objective | None) -> list[str]:
    """Return the kinds of an objective's terms and constraints that need files of its author."""
    if objective is None:
        return []
    asked = [*objective.terms, *objective.constraints]
    kinds = {
        "texts": any(each.text is not None for each in asked),
        "tasks": objective.include_path is not None and any(each.task for each in asked),
        "functions": any(each.function is not None for each in asked),
    }
    return [kind for kind, is_there in kinds.items() if is_there]


def count_trials(text: str) -> int:
    """Count the trials in a trials.jsonl; those that were scored again have a second line there. A
    line that was torn by a kill is none.
    """
    return sum(_is_search(line) for line in text.split("\n") if line)


def _is_search(line: str) -> bool:
    try:
        trial = json.loads(line)
    except ValueError:
        return False
    return isinstance(trial, dict) and trial.get("fidelity") == "search"
