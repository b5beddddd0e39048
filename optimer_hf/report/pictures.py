"""The figures of a report as pictures that a notebook shows."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from optimer_hf.errors import ConfigError
from optimer_hf.files.reference import AnyPath
from optimer_hf.files.staging import make_directory
from optimer_hf.merging.geometry_file import GEOMETRY
from optimer_hf.report.drawing import FIGURE_METADATA, Panel, to_png, use_style, write_picture
from optimer_hf.report.evidence import read_evidence
from optimer_hf.report.page import MAKERS, OF_VECTORS, make_panels
from optimer_hf.study.directory import Study

FIGURE = Markup(
    '<figure style="margin: 0 0 1.5em; max-width: 640px">'
    '<img alt="{}" src="data:image/png;base64,{}" style="width: 100%">'
    "<figcaption>{}</figcaption></figure>"
)


@dataclass(frozen=True, repr=False)
class Pictures:
    """Figures of a study. A notebook shows them one below the other, each with its conclusion."""

    panels: Sequence[Panel]

    @property
    def names(self) -> list[str]:
        """The names of the figures, in the order of the report."""
        return [panel.name for panel in self.panels]

    def __repr__(self) -> str:
        return (
            f"Pictures({', '.join(map(repr, self.names))}): a notebook shows them, save(path) "
            "writes them"
        )

    def _repr_html_(self) -> str:
        with use_style():
            return "".join(FIGURE.format(*_parts(panel)) for panel in self.panels)

    def save(self, path: AnyPath) -> Path:
        """Write one picture to a file that ends in .png, .svg or .pdf, or all of them as NAME.png
        into a directory, and return the path.

        Raises ConfigError for the file of several pictures, and for another ending.
        """
        target = Path(path)
        is_file = bool(target.suffix) and not target.is_dir()
        if is_file:
            self._check_file(target)
        make_directory(target.parent if is_file else target)
        with use_style():
            for panel in self.panels:
                write_picture(panel, target if is_file else target / f"{panel.name}.png")
        return target

    def _check_file(self, path: Path) -> None:
        if path.suffix not in FIGURE_METADATA:
            raise ConfigError(
                f"{path}: expected a name that ends in one of {', '.join(FIGURE_METADATA)}, or a "
                "directory."
            )
        if len(self.panels) != 1:
            raise ConfigError(
                f"{path}: is one file, and there are {len(self.panels)} pictures. Give a directory,"
                " or draw one of them by its name."
            )


def _parts(panel: Panel) -> tuple[str, str, str]:
    return panel.shows, base64.b64encode(to_png(panel)).decode("ascii"), panel.conclusion


def draw(study: Study, names: Sequence[str]) -> Pictures:
    """Return the figures of a study with these names, in their order; all of them without names.

    The cosines between vectors, for which every vector is read once, are drawn where they are named
    or were measured before. Raises ConfigError for a name that no figure of this study has.
    """
    evidence, measured = read_evidence(study), (study.directory / GEOMETRY).exists()
    every = [name for name in MAKERS if measured or name != OF_VECTORS]
    with use_style():
        panels = make_panels(evidence, [name for name in names or every if name in MAKERS])
        missing = set(names) - {panel.name for panel in panels}
        if missing:
            known = ", ".join(panel.name for panel in make_panels(evidence, every))
            raise ConfigError(f"no figure {min(missing)!r}: this study has {known}.")
    return Pictures(panels)
