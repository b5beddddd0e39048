"""Complete what a push sends: a vector.json for models without one, report and figures of a study.

Everything is written into memory; the originals stay as they are. No other module of this room
needs the engines that draw and that read weights, and this one only where it is called.
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from optimer_hf.comparison.costs import ledger_of_study
from optimer_hf.comparison.results_file import Results, results_of
from optimer_hf.comparison.sealed_file import read_comparison
from optimer_hf.merging.geometry_file import GEOMETRY
from optimer_hf.models.layout import ResolvedModel
from optimer_hf.recipes.record import Recipe
from optimer_hf.report.captions import CARD_FILES, FIGURES, REPORT
from optimer_hf.study.directory import load_study
from optimer_hf.vectors.record import VectorFile

logger = logging.getLogger(__name__)

RESULTS = "results.json"


def base_of_vectors(recipe: Recipe) -> ResolvedModel:
    """Return the base to which the vectors of a recipe are compared: with `vocabulary: union`, the
    copy that has the tokens of all.
    """
    from optimer_hf.merging.union import open_base
    from optimer_hf.models.resolve import resolve_model

    base, reference = resolve_model(recipe.base_model), recipe.tokenizer_reference
    if recipe.vocabulary == "base":
        return base
    return open_base(base, recipe.sources, reference, recipe.vocabulary)[0]


def describe_local(name: str, path: Path, base: ResolvedModel, *, is_adapter: bool) -> VectorFile:
    """Return the vector.json of a checkpoint or adapter that has none; reads its weights once."""
    from optimer_hf.vectors.delta import describe_vector

    kind: Literal["adapter", "checkpoint"] = "adapter" if is_adapter else "checkpoint"
    return describe_vector(path, base, name=name, kind=kind)


@dataclass(frozen=True)
class StudyEvidence:
    """What a study directory says about its recipe: the recipe with all evidence, report, figures
    and results by their names in a repository, and the results of the sealed test.
    """

    recipe: Recipe
    files: dict[str, Path | bytes] = field(default_factory=dict)
    results: Results | None = None


def evidence_of_study(directory: Path, recipe: Recipe) -> StudyEvidence:
    """Return what a study directory says about the recipe in it. The recipe of another trial than
    the best one stays as it is, without files, which would show the best one.
    """
    from optimer_hf.recipes.write import evidence_of
    from optimer_hf.report.page import write_report

    study = load_study(directory, unfinished=True)
    best = study.best_trial
    if recipe.weights != best.weights:
        logger.warning(
            "%s: recipe.yaml is not that of the best trial, so the repository gets neither report "
            "nor figures, which show the best one.",
            directory,
        )
        return StudyEvidence(recipe)
    comparison = read_comparison(study)
    evidence = evidence_of(study, best, comparison, ledger_of_study(study))
    results = None if comparison is None else results_of(comparison)
    with TemporaryDirectory() as scratch:
        out = Path(scratch)
        has_geometry = (directory / GEOMETRY).exists()
        write_report(study, out / REPORT, figures=out / FIGURES, vectors=has_geometry)
        if results is not None:
            results.write(out / RESULTS)
        wanted = (REPORT, RESULTS, *CARD_FILES)
        files: dict[str, Path | bytes] = {
            name: (out / name).read_bytes() for name in wanted if (out / name).exists()
        }
    return StudyEvidence(recipe.model_copy(update=dict(evidence)), files, results)
