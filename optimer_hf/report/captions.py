"""The figures of a report and their captions."""

from optimer_hf.files.model import FileModel, VersionedFile

FIGURES = "figures"  # the folder of a card's figures, beside recipe.yaml
CAPTIONS = f"{FIGURES}/captions.json"

CARD_FIGURES = ("sealed", "terms", "weights", "progress", "slices", "front", "cosines")


class Caption(FileModel):
    """What a figure on disk shows and what to conclude from it."""

    title: str
    conclusion: str


class Captions(VersionedFile):
    """captions.json beside the figures: the weights of the merge they are of, and their texts."""

    weights: dict[str, float]
    captions: dict[str, Caption]
