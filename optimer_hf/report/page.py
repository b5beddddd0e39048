"""Write the report of a study: one self-contained HTML page, and its figures.

A study is read once, as Evidence. The first screen and each section are made from that alone, and
the template arranges them.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from optimer_hf.comparison.result import Comparison
from optimer_hf.errors import ConfigError
from optimer_hf.files.staging import make_directory, write_text
from optimer_hf.report.answer import answer_of, verdict_of
from optimer_hf.report.captions import (
    CAPTIONS,
    CARD_FIGURES,
    Caption,
    Captions,
    dark_file,
    light_file,
)
from optimer_hf.report.cells import Table
from optimer_hf.report.drawing import (
    FIGURE_METADATA,
    Panel,
    to_svg,
    use_style,
    write_picture,
    write_pictures,
)
from optimer_hf.report.evidence import Evidence, read_evidence
from optimer_hf.report.facts import (
    digests_table,
    identity_of,
    inputs_table,
    objective_in_words,
)
from optimer_hf.report.score_panels import answer_panel, sealed_panel, terms_panel
from optimer_hf.report.search_panels import (
    front_panel,
    progress_panel,
    slices_panel,
    weights_panel,
)
from optimer_hf.report.tables import sealed_table, targets_table, terms_table, trial_table
from optimer_hf.report.vector_panels import cosines_panel, ledger_panel, losses_panel, norms_panel
from optimer_hf.study.directory import Study, load_study


def _of_test(draw: Callable[[Comparison], Panel]) -> Callable[[Evidence], Panel | None]:
    """Return the maker of a figure of the sealed test, which not every study has."""
    return lambda evidence: None if evidence.comparison is None else draw(evidence.comparison)


MAKERS: Mapping[str, Callable[[Evidence], Panel | None]] = {  # of the figures, by their names
    "answer": _of_test(answer_panel),  # the page draws it as its first screen
    "terms": terms_panel,
    "sealed": _of_test(sealed_panel),
    "progress": progress_panel,
    "weights": weights_panel,
    "slices": slices_panel,
    "front": front_panel,
    "cosines": cosines_panel,
    "losses": losses_panel,
    "norms": norms_panel,
    "ledger": ledger_panel,
}
OF_VECTORS = "cosines"  # the figure for which every vector is read once


@dataclass(frozen=True)
class Section:
    """A part of the page: its panels side by side, then its tables. A folded one shows its title
    and its lead until it is opened.
    """

    name: str
    title: str
    lead: str = ""
    panels: Sequence[Panel] = ()
    tables: Sequence[Table] = ()
    is_folded: bool = True


# -- writing ---------------------------------------------------------------------------------------


def write_report(
    study: Study, out: Path, *, figures: Path | None = None, vectors: bool = True
) -> list[Panel]:
    """Write the page at `out` and its figures as PNG, for light and for dark pages and with their
    captions, into `figures`; return the panels in the order of the page.

    `vectors=False` leaves out the cosines, for which every vector is read once; geometry.json of
    the study keeps them. Raises StudyError for a study without a trial.
    """
    evidence = read_evidence(study)
    with use_style():
        sections = list(_make_sections(evidence, vectors))
        panels = [panel for section in sections for panel in section.panels]
        if figures is not None:  # before the page: drawing settles where the labels are
            _write_figures(evidence, [*make_panels(evidence, ["answer"]), *panels], figures)
        page = _render(evidence, sections)
    write_text(out, page)
    return panels


def write_figures(study: Study, folder: Path) -> None:
    """Write the figures of a card as PNG, with their captions, into a folder. None of them reads a
    vector.
    """
    evidence = read_evidence(study)
    with use_style():
        shown = [name for name in MAKERS if name in CARD_FIGURES and name != OF_VECTORS]
        _write_figures(evidence, make_panels(evidence, shown), folder)


def make_panels(evidence: Evidence, names: Iterable[str]) -> list[Panel]:
    """Return the figures with some names, in their order; those for which there are no data are
    left out.
    """
    panels = (MAKERS[name](evidence) for name in names)
    return [panel for panel in panels if panel is not None]


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
        write_picture(sealed_panel(comparison), path)


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


def _write_figures(evidence: Evidence, panels: Sequence[Panel], folder: Path) -> None:
    comparison = evidence.comparison
    for panel in panels:
        light, dark = (folder / Path(of(panel.name)).name for of in (light_file, dark_file))
        write_pictures(panel, light, dark)
    captions = {
        panel.name: Caption(title=panel.title, conclusion=panel.conclusion, shows=panel.shows)
        for panel in panels
    }
    record = Captions(
        weights=evidence.study.best_trial.weights,
        verdict="" if comparison is None else verdict_of(comparison),
        captions=captions,
    )
    record.write(folder / Path(CAPTIONS).name)


def _render(evidence: Evidence, sections: Sequence[Section]) -> str:
    environment = Environment(
        loader=PackageLoader("optimer_hf", "report"), undefined=StrictUndefined, autoescape=True
    )
    environment.filters["svg"] = lambda panel: Markup(to_svg(panel))
    here = files("optimer_hf.report")
    return environment.get_template("report.html.jinja").render(
        name=evidence.name,
        identity=identity_of(evidence),
        answer=answer_of(evidence),
        sections=sections,
        style=Markup(here.joinpath("report.css").read_text(encoding="utf-8")),
        script=Markup(here.joinpath("report.js").read_text(encoding="utf-8")),
    )


# -- sections --------------------------------------------------------------------------------------


def _make_sections(evidence: Evidence, vectors: bool) -> Iterator[Section]:
    """Yield the sections for which this study has data, in the order of the page."""
    yield from _score_sections(evidence)
    yield Section(
        "inputs",
        "What went in",
        "Objective: " + objective_in_words(evidence.study.config.objective),
        tables=[inputs_table(evidence)],
        is_folded=False,
    )
    search = make_panels(evidence, ["progress", "weights", "slices", "front"])
    yield Section(
        "search",
        "How the search went",
        search[0].conclusion,
        search,
        [trial_table(evidence)],
    )
    names = [OF_VECTORS] * vectors + ["losses", "norms"]
    if panels := make_panels(evidence, names):
        yield Section("vectors", "The vectors", panels[0].conclusion, panels)
    if panels := make_panels(evidence, ["ledger"]):
        yield Section("cost", "Where the time went", panels[0].conclusion, panels)
    yield Section(
        "digests",
        "Digests and versions",
        "They say exactly which weights and items were scored.",
        tables=[digests_table(evidence)],
    )


def _score_sections(evidence: Evidence) -> Iterator[Section]:
    comparison = evidence.comparison
    panels = make_panels(evidence, ["terms", "sealed"])
    yield Section(
        "scores", "Scores", panels=panels, tables=[terms_table(evidence)], is_folded=False
    )
    if comparison is None:
        return
    if comparison.retarget:
        yield Section(
            "targets",
            "Re-targeted merges",
            "Other objectives, answered from the trials of this search.",
            tables=[targets_table(comparison)],
            is_folded=False,
        )
    yield Section(
        "rows",
        "Every score of the sealed test",
        f"{len(comparison.rows)} rows with their intervals.",
        tables=[sealed_table(comparison)],
    )
