"""The tables of a report: every trial, every row of the sealed test, and the scores by term."""

from collections.abc import Mapping

from optimer_hf.comparison.result import Comparison
from optimer_hf.comparison.rows import SealedRow
from optimer_hf.report.cells import Cell, Row, Table, head
from optimer_hf.report.drawing import seconds_of
from optimer_hf.report.evidence import Evidence
from optimer_hf.report.score_panels import part_of
from optimer_hf.scoring.formatting import OF_TERMS, Unit, describe_interval
from optimer_hf.scoring.objective import Objective, gains
from optimer_hf.scoring.scores import Scores, TermScore
from optimer_hf.study.prediction import reweight
from optimer_hf.study.trials import Trial

# -- trials ----------------------------------------------------------------------------------------


def trial_table(evidence: Evidence) -> Table:
    """Return every trial of the search with its weights and its gains on the search items."""
    study, unit = evidence.study, evidence.unit
    rescored = {trial.number: trial for trial in study.log.trials_at("rescore")}
    labels = list(study.base)
    groups = [("", 2), ("weight", len(study.config.weight_names)), ("gain", len(labels))]
    heads = [head("trial"), head("chosen by", is_number=False)]
    heads += [head(name, f"weight of {name}") for name in study.config.weight_names]
    heads += [head(label, _unit_of(study.config.objective, label)) for label in labels]
    heads.append(head("search score", f"gain over {study.baseline}, {unit.sign}"))
    heads += [head("scored again", "the best few, on more items")] if rescored else []
    heads.append(head("seconds"))
    rows = [
        Row(
            _cells_of_trial(evidence, trial, rescored),
            "merge" if trial.number == study.best_trial.number else "",
        )
        for trial in study.trials
    ]
    caption = (
        f"Weights and gains over {study.baseline} on the items of the search: losses relative, in "
        "percent; accuracies in points."
    )
    return Table(caption, heads, rows, is_sortable=True, groups=groups)


def _cells_of_trial(evidence: Evidence, trial: Trial, rescored: Mapping[int, Trial]) -> list[Cell]:
    study, unit = evidence.study, evidence.unit
    cells = [Cell(str(trial.number), trial.number), Cell(trial.origin)]
    weights = (trial.weights[name] for name in study.config.weight_names)
    cells += [Cell(f"{weight:.3g}", weight, repr(weight)) for weight in weights]
    if trial.status == "ok":
        cells += _gain_cells(trial.terms, study.base, study.config.objective)
        cells.append(_score_cell(unit, evidence.gain(trial)))
    else:
        kind = (trial.error or "").partition(":")[0]  # a message may name hosts or paths
        cells += [Cell("crashed", hint=kind), *(Cell("") for _ in study.base)]
    if rescored:
        cells.append(_rescore_cell(evidence, rescored.get(trial.number)))
    seconds = seconds_of(trial)
    return [*cells, Cell(f"{seconds:.1f}", seconds, _phases_of(trial))]


def _rescore_cell(evidence: Evidence, trial: Trial | None) -> Cell:
    """Return the gain of a trial that was scored again; nothing if it was not."""
    if trial is None or trial.status != "ok":
        return Cell("")
    study = evidence.study
    base = study.log.first("rescore")
    return _score_cell(evidence.unit, study.value(trial) - study.value(base))


def _score_cell(unit: Unit, gain: float) -> Cell:
    return Cell(unit.number(gain), gain, repr(gain))


def _phases_of(trial: Trial) -> str:
    return ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in trial.seconds.items())


def _gain_cells(scores: Scores, base: Scores, objective: Objective) -> list[Cell]:
    """Return the gain in every term; the mouse shows the score itself."""
    each = gains(scores, base)
    return [
        Cell(
            OF_TERMS.number(each[label]),
            each[label],
            f"{_unit_of(objective, label)}: {score.score:.5g}, {len(score.items)} items",
        )
        for label, score in scores.items()
    ]


# -- the sealed test -------------------------------------------------------------------------------


def sealed_table(comparison: Comparison) -> Table:
    """Return every row of the sealed test with its gains over the base; intervals for the mouse."""
    unit, best = Unit.of(comparison.objective), comparison.best_baseline()
    heads = [head("row", is_number=False)]
    heads += [head(name, _unit_of(comparison.objective, name)) for name in comparison.base.scores]
    heads.append(head("sealed score", f"gain over the base, {unit.sign}"))
    rows = [
        Row(_cells_of_row(comparison, row, unit), part_of(row, best)) for row in comparison.rows
    ]
    caption = (
        "Gains over the base on the sealed test: losses relative, in percent; accuracies in points."
    )
    return Table(caption, heads, rows, is_sortable=True)


def _cells_of_row(comparison: Comparison, row: SealedRow, unit: Unit) -> list[Cell]:
    weights = ", ".join(f"{name} {weight:g}" for name, weight in row.weights.items())
    cells = [Cell(row.marked_title, hint=weights)]
    for label, score in row.scores.items():
        interval = comparison.term_interval(row, label)
        gain = describe_interval(interval, OF_TERMS, is_gain=True)
        hint = f"{_unit_of(comparison.objective, label)}: {score.score:.5g}; gain {gain}"
        cells.append(Cell(OF_TERMS.number(interval.difference), interval.difference, hint))
    interval = comparison.interval(row, comparison.base)
    gain = describe_interval(interval, unit, is_gain=True)
    return [*cells, Cell(unit.number(interval.difference), interval.difference, gain)]


# -- scores by term --------------------------------------------------------------------------------


def terms_table(evidence: Evidence) -> Table:
    """Return what each term measures, on how many items, and what base and merge scored on the
    sealed test or, without one, in the search.
    """
    study, comparison = evidence.study, evidence.comparison
    if comparison is None:
        objective, score = study.config.objective, "search score"
        columns: dict[str, Scores] = {"base": study.base, "merge": _search_scores(evidence)}
    else:
        objective, score = comparison.objective, "sealed score"
        best = comparison.best_baseline()
        columns = {"base": comparison.base.scores, "merge": comparison.merge.scores}
        columns |= {} if best == comparison.base else {best.title: best.scores}
    weights = {term.label: term.weight for term in objective.terms}
    heads = [head("term", is_number=False), head("measured in", is_number=False)]
    heads.append(head("weight", "in the objective; 0: recorded, but not part of it"))
    heads += [head(f"{name}", score) for name in columns]
    heads += [head("items, search"), *([head("items, sealed")] if comparison else [])]
    rows = []
    for label in columns["base"]:
        counts = [_item_count(study.base, label)]
        counts += [_item_count(comparison.base.scores, label)] if comparison else []
        scores = [_raw_cell(scores[label]) for scores in columns.values()]
        weight = weights.get(label, 0.0)
        counted = Cell(f"{weight:g}", weight)
        named = [Cell(label), Cell(_unit_of(objective, label, columns["base"][label]))]
        rows.append(Row([*named, counted, *scores, *counts]))
    return Table(f"The {score}s by term, in their own units.", heads, rows)


def _search_scores(evidence: Evidence) -> Scores:
    """Return the scores of the merge on the items of the search."""
    number = evidence.study.best_trial.number
    return next(trial.terms for trial in evidence.trials if trial.number == number)


def _raw_cell(score: TermScore) -> Cell:
    return Cell(f"{score.score:.4f}", score.score, repr(score.score))


def _item_count(scores: Scores, label: str) -> Cell:
    """Return on how many items a term was scored; nothing if it was not."""
    if label not in scores:
        return Cell("none", 0.0)
    n_items = len(scores[label].items)
    return Cell(f"{n_items:,}", n_items)


def _unit_of(objective: Objective, label: str, score: TermScore | None = None) -> str:
    """Return the metric of a term in words and, with a score, its direction."""
    term = next((term for term in objective.scored_terms if term.label == label), None)
    name = "score" if term is None else (term.function_name or term.metric_name).replace("_", " ")
    if score is None:
        return name
    return f"{name}, {'higher' if score.higher_is_better else 'lower'} is better"


# -- re-targets ------------------------------------------------------------------------------------


def targets_table(comparison: Comparison) -> Table:
    """Return the re-targeted merges with their weights, and what the sealed test says of each under
    its own objective.
    """
    heads = [
        head("re-targeted to", is_number=False),
        *(head(name, f"weight of {name}") for name in comparison.merge.weights),
        head("against", "the best baseline for this objective", is_number=False),
        head("sealed score", "gain over that baseline"),
        head("95 % interval"),
        head("verdict", is_number=False),
    ]
    rows = [_row_of_target(comparison, name) for name in comparison.retarget]
    caption = "Each merge against the best baseline for its own objective."
    groups = [("", 1), ("weight", len(comparison.merge.weights))]
    return Table(caption, heads, rows, groups=groups)


def _row_of_target(comparison: Comparison, name: str) -> Row:
    target = comparison.retarget[name]
    row, objective = comparison.row("retargeted", name), reweight(comparison.objective, target)
    best, unit = comparison.best_baseline(objective), Unit.of(objective)
    interval = comparison.interval(row, best, objective)
    wanted = ", ".join(f"{label} {weight:g}" for label, weight in target.items())
    cells = [Cell(name, hint=f"objective: {wanted}")]
    cells += [Cell(f"{weight:.3g}", weight, repr(weight)) for weight in row.weights.values()]
    cells.append(Cell(best.marked_title))
    cells.append(Cell(unit.number(interval.difference), interval.difference))
    cells.append(Cell(unit.show_interval(interval), interval.low, interval.kind))
    return Row([*cells, Cell(interval.verdict)], "target")
