"""A study -> one self-contained HTML page and its figures."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from optimer_hf.comparison import sealed
from optimer_hf.comparison.result import Comparison, verdicts
from optimer_hf.errors import ConfigError
from optimer_hf.files.reference import Reference, absolute_reference
from optimer_hf.files.staging import make_directory, write_text
from optimer_hf.report.captions import CAPTIONS, CARD_FIGURES, Caption, Captions
from optimer_hf.report.drawing import FIGURE_METADATA, Panel, _style, _svg, _write_figure
from optimer_hf.report.panels import (
    NO_PAIR,
    _cosines,
    _front,
    _ledger,
    _losses,
    _norms,
    _progress,
    _records,
    _sealed,
    _slices,
    _terms,
    _weights,
    training_runs,
)
from optimer_hf.scoring.formatting import Unit, describe_interval
from optimer_hf.study.config import MergeMethod
from optimer_hf.study.directory import Study, load_study
from optimer_hf.study.surrogate import fit_surrogate
from optimer_hf.study.trials import ITEMS_OF


def write_report(
    study: Study, out: Path, *, figures: Path | None = None, vectors: bool = True
) -> list[Panel]:
    """Write the page at `out`, the figures as PNG with their captions into `figures`, and return
    the panels.

    `vectors=False` leaves out the cosines, for which every vector is read once; what was measured
    is kept in geometry.json of the study. Raises StudyError for
    a study without a trial.
    """
    with _style():
        panels = list(_panels(study, vectors))
        if figures is not None:
            _write_figures(study, panels, figures)
        pictures = [(panel, Markup(_svg(panel))) for panel in panels]
    environment = Environment(
        loader=PackageLoader("optimer_hf", "."), undefined=StrictUndefined, autoescape=True
    )
    page = environment.get_template("report.html.jinja").render(
        title=_title(study),
        summary=_summary(study, sealed.recorded(study)),
        pictures=pictures,
        weights=study.best_trial.weights,
        pinned=_pinned(study),
    )
    write_text(out, page)
    return panels


def write_figures(study: Study, folder: Path) -> None:
    """Write the figures of a card as PNG with their captions into a folder, but those that read
    vectors.
    """
    with _style():
        panels = [panel for panel in _panels(study, False) if panel.name in CARD_FIGURES]
        _write_figures(study, panels, folder)


def write_sealed_figure(study: Study, comparison: Comparison, path: Path) -> None:
    """Write the gain of every row over the base with its paired 95 % interval as a figure; the
    suffix of `path`, one of FIGURE_METADATA, says the format.
    """
    with _style():
        _write_figure(_sealed(comparison).figure, path)


def compare_study(
    study_dir: Path,
    *,
    everything: bool = False,
    models: Sequence[str] = (),
    figure: Path | None = None,
) -> Comparison:
    """Score the baselines and the merge of a finished study on its sealed test.

    `everything` adds the merge methods and random vectors, `models` texts NAME=MODEL. The gains are
    drawn to `figure`. Raises ConfigError for a text or a suffix that cannot be used, before
    anything is scored.
    """
    study = load_study(study_dir)
    named = dict(_named_model(text) for text in models)
    if figure is not None:
        if figure.suffix not in FIGURE_METADATA:
            suffixes = ", ".join(FIGURE_METADATA)
            raise ConfigError(f"--figure {figure}: expected a name that ends in one of {suffixes}.")
        make_directory(figure.parent)
    known = study.config.baselines
    changes: dict[str, Any] = {"models": known.models | named}
    if everything:
        changes |= {"merge_methods": [*get_args(MergeMethod)], "random_vectors": True}
    baselines = known.model_copy(update=changes)
    config = study.config.model_copy(update={"baselines": baselines})
    comparison = sealed.compare(replace(study, config=config))
    if figure is not None:
        write_sealed_figure(study, comparison, figure)
    return comparison


def _named_model(text: str) -> tuple[str, str]:
    name, _, source = text.partition("=")
    if not (name and source):
        raise ConfigError(f"--model {text!r}: expected NAME=MODEL.")
    return name, absolute_reference(source, Path.cwd())


def report_on(
    study_dir: Path, out: Path | None = None, *, figures: Path | None = None, vectors: bool = True
) -> tuple[Path, list[Panel]]:
    """Write the page of a study directory, finished or not, to `out` (None: report.html in it), and
    return where it is with its panels. The other arguments are those of `write_report`.
    """
    study = load_study(study_dir, unfinished=True)
    page = out or study_dir / "report.html"
    if page.is_dir():
        raise ConfigError(f"{page}: is a directory. Give the name of a file, e.g. report.html.")
    return page, write_report(study, page, figures=figures, vectors=vectors)


def _write_figures(study: Study, panels: Sequence[Panel], folder: Path) -> None:
    for panel in panels:
        _write_figure(panel.figure, folder / f"{panel.name}.png")
    captions = {p.name: Caption(title=p.title, conclusion=p.conclusion) for p in panels}
    record = Captions(weights=study.best_trial.weights, captions=captions)
    record.write(folder / Path(CAPTIONS).name)


def _panels(study: Study, vectors: bool) -> Iterator[Panel]:
    """Return the panels that this study has something to show in."""
    unit, trials = (
        Unit.of(study.config.objective),
        [t for t in study.trials if t.status == "ok"],
    )
    posterior = fit_surrogate(study.config, study.trials)
    comparison = sealed.recorded(study)
    yield _progress(study, trials, unit)
    yield _weights(study, posterior)
    yield _slices(study, posterior, trials, unit)
    yield _terms(study, comparison)
    if comparison is not None:
        yield _sealed(comparison)
    if len([t for t in study.config.objective.terms if t.weight > 0]) >= NO_PAIR:
        yield _front(study, trials)
    if vectors and (found := _cosines(study)) is not None:
        yield found
    runs = training_runs(_records(study))
    if losses := {name: run.losses for name, run in runs.items() if run.losses}:
        yield _losses(losses, runs)
    if norms := {name: run.norms for name, run in runs.items() if run.norms}:
        yield _norms(norms, runs)
    yield _ledger(study)


def _title(study: Study) -> str:
    directory = study.directory.resolve()
    return directory.parent.name if directory.name == "study" else directory.name


def _summary(study: Study, comparison: Comparison | None) -> str:
    """Return what the sealed test says, where it was scored, and the score that the merge was
    chosen by, which is another number.
    """
    best = study.best_trial
    said = describe_interval(study.over_base(best), Unit.of(study.config.objective), is_gain=True)
    state = "" if study.is_finished else " The search is not finished."
    chosen = (
        f"The best of {len(study.trials)} trials is number {best.number} "
        f"({best.origin}): on {ITEMS_OF[best.fidelity]}, over {study.baseline}, {said}."
    )
    if comparison is None:
        return f"{chosen} Weights are chosen by this score, so it flatters them.{state}"
    verdict = verdicts(comparison)[0]
    return (
        f"On the sealed test: {verdict} {chosen} Weights are chosen by that score, so it flatters "
        f"them; the sealed one does not.{state}"
    )


def _pinned(study: Study) -> list[tuple[str, str]]:
    """Return what the study stands on, with the digests that are known."""
    records = _records(study)
    rows = [("study", study.config.digest()), ("base model", _shown(study.config.base_model))]
    bases = {record.base.reference: record.base.files for record in records.values()}
    rows += [
        (f"base model, {name}", f"sha256 {value}")
        for files in list(bases.values())[:1]
        for name, value in files.items()
    ]
    for name, vector in study.config.vectors.items():
        corpus = records[name].corpus if name in records else None
        rows.append((f"vector {name}", _shown(str(vector.source))))
        if corpus is not None and corpus.sha256 is not None:
            rows.append((f"corpus of {name}", f"{corpus.name}, sha256 {corpus.sha256}"))
    versions: dict[str, str] = {}
    for record in records.values():
        versions |= record.versions
    return rows + [(name, version) for name, version in versions.items()]


def _shown(reference: str) -> str:
    """Return a reference as others may read it: of a local path the last part."""
    path = Reference(reference).path
    return path.name if path is not None else reference
