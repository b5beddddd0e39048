"""Write the report of a study: one self-contained HTML page, and its figures."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from optimer_hf.comparison.result import Comparison, verdicts
from optimer_hf.comparison.sealed_file import read_comparison
from optimer_hf.errors import ConfigError
from optimer_hf.files.reference import Reference
from optimer_hf.files.staging import make_directory, write_text
from optimer_hf.report.captions import CAPTIONS, CARD_FIGURES, Caption, Captions
from optimer_hf.report.drawing import FIGURE_METADATA, Panel, to_svg, use_style, write_figure
from optimer_hf.report.panels import (
    FEWEST_TERMS,
    cosines_panel,
    front_panel,
    ledger_panel,
    losses_panel,
    norms_panel,
    progress_panel,
    read_records,
    sealed_panel,
    slices_panel,
    terms_panel,
    training_runs,
    weights_panel,
)
from optimer_hf.scoring.formatting import Unit, describe_interval
from optimer_hf.study.directory import Study, load_study
from optimer_hf.study.surrogate import fit_surrogate
from optimer_hf.study.trials import ITEMS_OF


def write_report(
    study: Study, out: Path, *, figures: Path | None = None, vectors: bool = True
) -> list[Panel]:
    """Write the page at `out` and its figures as PNG, with their captions, into `figures`; return
    the panels.

    `vectors=False` leaves out the cosines, for which every vector is read once; geometry.json of
    the study keeps them. Raises StudyError for a study without a trial.
    """
    with use_style():
        panels = list(_make_panels(study, vectors))
        if figures is not None:
            _write_figures(study, panels, figures)
        pictures = [(panel, Markup(to_svg(panel))) for panel in panels]
    environment = Environment(
        loader=PackageLoader("optimer_hf", "report"), undefined=StrictUndefined, autoescape=True
    )
    page = environment.get_template("report.html.jinja").render(
        title=_title_of(study),
        summary=_summarize(study, read_comparison(study)),
        pictures=pictures,
        weights=study.best_trial.weights,
        pinned=_list_pinned(study),
    )
    write_text(out, page)
    return panels


def write_figures(study: Study, folder: Path) -> None:
    """Write the figures of a card as PNG, with their captions, into a folder. None of them reads a
    vector.
    """
    with use_style():
        panels = [panel for panel in _make_panels(study, False) if panel.name in CARD_FIGURES]
        _write_figures(study, panels, folder)


def prepare_figure_path(path: Path) -> None:
    """Raise ConfigError unless the suffix of a figure names a format that can be written; create
    its directory.
    """
    if path.suffix not in FIGURE_METADATA:
        suffixes = ", ".join(FIGURE_METADATA)
        raise ConfigError(f"--figure {path}: expected a name that ends in one of {suffixes}.")
    make_directory(path.parent)


def write_sealed_figure(comparison: Comparison, path: Path) -> None:
    """Draw the gain of every row over the base with its paired 95 % interval, in the format that
    the suffix of `path` names, one of FIGURE_METADATA.
    """
    with use_style():
        write_figure(sealed_panel(comparison).figure, path)


def report_study(
    study_dir: Path, out: Path | None = None, *, figures: Path | None = None, vectors: bool = True
) -> tuple[Path, list[Panel]]:
    """Write the page of a study directory, finished or not, and return its path and its panels.

    `out` is that path (None: report.html in the directory). The other arguments are those of
    `write_report`.
    """
    study = load_study(study_dir, unfinished=True)
    page = out or study_dir / "report.html"
    if page.is_dir():
        raise ConfigError(f"{page}: is a directory. Give the name of a file, e.g. report.html.")
    return page, write_report(study, page, figures=figures, vectors=vectors)


def _write_figures(study: Study, panels: Sequence[Panel], folder: Path) -> None:
    for panel in panels:
        write_figure(panel.figure, folder / f"{panel.name}.png")
    captions = {p.name: Caption(title=p.title, conclusion=p.conclusion) for p in panels}
    record = Captions(weights=study.best_trial.weights, captions=captions)
    record.write(folder / Path(CAPTIONS).name)


def _make_panels(study: Study, vectors: bool) -> Iterator[Panel]:
    """Return the panels for which this study has data."""
    unit = Unit.of(study.config.objective)
    trials = [trial for trial in study.trials if trial.status == "ok"]
    posterior = fit_surrogate(study.config, study.trials)
    comparison = read_comparison(study)
    yield progress_panel(study, trials, unit)
    yield weights_panel(study, posterior)
    yield slices_panel(study, posterior, trials, unit)
    yield terms_panel(study, comparison)
    if comparison is not None:
        yield sealed_panel(comparison)
    if len([t for t in study.config.objective.terms if t.weight > 0]) >= FEWEST_TERMS:
        yield front_panel(study, trials)
    if vectors and (cosines := cosines_panel(study)) is not None:
        yield cosines
    runs = training_runs(read_records(study))
    if losses := {name: run.losses for name, run in runs.items() if run.losses}:
        yield losses_panel(losses, runs)
    if norms := {name: run.norms for name, run in runs.items() if run.norms}:
        yield norms_panel(norms, runs)
    yield ledger_panel(study)


def _title_of(study: Study) -> str:
    directory = study.directory.resolve()
    return directory.parent.name if directory.name == "study" else directory.name


def _summarize(study: Study, comparison: Comparison | None) -> str:
    """Return what the sealed test says, if it was run, and the score that chose the merge."""
    best = study.best_trial
    gain = describe_interval(study.over_base(best), Unit.of(study.config.objective), is_gain=True)
    state = "" if study.is_finished else " The search is not finished."
    chosen = (
        f"The best of {len(study.trials)} trials is number {best.number} ({best.origin}). Its gain "
        f"over {study.baseline} on {ITEMS_OF[best.fidelity]}: {gain}."
    )
    if comparison is None:
        return f"{chosen} This score chose the weights, so it flatters them.{state}"
    verdict = verdicts(comparison)[0]
    return (
        f"On the sealed test: {verdict} {chosen} This score chose the weights, so it flatters "
        f"them; the sealed test does not.{state}"
    )


def _list_pinned(study: Study) -> list[tuple[str, str]]:
    """Return the inputs of a study with the digests that are known, as rows of a table."""
    records = read_records(study)
    rows = [
        ("study", study.config.digest()),
        ("base model", _readable_reference(study.config.base_model)),
    ]
    bases = {record.base.reference: record.base.files for record in records.values()}
    rows += [
        (f"base model, {name}", f"sha256 {value}")
        for files in list(bases.values())[:1]
        for name, value in files.items()
    ]
    for name, vector in study.config.vectors.items():
        corpus = records[name].corpus if name in records else None
        rows.append((f"vector {name}", _readable_reference(str(vector.source))))
        if corpus is not None and corpus.sha256 is not None:
            rows.append((f"corpus of {name}", f"{corpus.name}, sha256 {corpus.sha256}"))
    versions: dict[str, str] = {}
    for record in records.values():
        versions |= record.versions
    return rows + [(name, version) for name, version in versions.items()]


def _readable_reference(reference: str) -> str:
    """Return a reference that others may read: the last part of a local path, or a Hub id."""
    path = Reference(reference).path
    return path.name if path is not None else reference
