"""The figures of a report and their captions."""

from optimer_hf.files.model import FileModel, VersionedFile

FIGURES = "figures"  # the folder of a card's figures, beside recipe.yaml
CAPTIONS = f"{FIGURES}/captions.json"
REPORT = "report.html"  # the page, beside recipe.yaml

CARD_FIGURES = ("answer", "sealed", "terms", "weights", "progress", "slices", "front", "cosines")


def light_file(name: str) -> str:
    """Return the file of a figure for light pages, beside recipe.yaml."""
    return f"{FIGURES}/{name}.png"


def dark_file(name: str) -> str:
    """Return the file of a figure for dark pages; pushes of 0.1.0 have none."""
    return f"{FIGURES}/{name}-dark.png"


CARD_FILES = (*map(light_file, CARD_FIGURES), *map(dark_file, CARD_FIGURES), CAPTIONS)


class Caption(FileModel):
    """The title of a figure on disk, what to conclude from it, and what it shows, for readers who
    cannot see it.
    """

    title: str
    conclusion: str
    shows: str = ""


class Captions(VersionedFile):
    """captions.json beside the figures: their texts, the weights of the merge they show, and what
    the sealed test says of it in one sentence (empty without one).
    """

    weights: dict[str, float]
    verdict: str = ""
    captions: dict[str, Caption]
