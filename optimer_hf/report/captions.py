"""The figures of a report and their captions."""

from optimer_hf.files.model import FileModel, VersionedFile

FIGURES = "figures"  # the folder of a card's figures, beside recipe.yaml
CAPTIONS = f"{FIGURES}/captions.json"
REPORT = "report.html"  # the page, beside recipe.yaml

CARD_FIGURES = ("sealed", "terms", "weights", "progress", "slices", "front", "cosines")


class Caption(FileModel):
    """The title of a figure on disk, and what to conclude from it."""

    title: str
    conclusion: str


class Captions(VersionedFile):
    """captions.json beside the figures: their texts, and the weights of the merge they show."""

    weights: dict[str, float]
    captions: dict[str, Caption]
