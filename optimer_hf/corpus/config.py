"""Where the text of a corpus comes from."""

from collections.abc import Iterator
from pathlib import Path

from pydantic import AliasChoices, Field

from optimer_hf.corpus.texts import fingerprint_of_texts
from optimer_hf.files.model import FileModel, Mistake
from optimer_hf.files.reference import LocalPath, LocalText

DataFiles = LocalText | list[LocalText] | dict[str, LocalText | list[LocalText]]


class CorpusConfig(FileModel):
    """Where training text comes from: local files (`path`: a file, a folder of shards or a glob),
    or a data set that `datasets` can stream, whose `dataset_config`, `data_files` and `split` are
    those of `load_dataset`.
    """

    path: LocalPath | None = None
    dataset: LocalText | None = None
    dataset_config: str | None = Field(
        default=None, validation_alias=AliasChoices("dataset_config", "name")
    )
    data_files: DataFiles | None = None
    split: str = "train"
    text_field: str = "text"

    def mistakes(self) -> Iterator[Mistake]:
        if (self.path is None) == (self.dataset is None):
            yield (), "give exactly one of 'path' (local files) and 'dataset' (for `datasets`)"
        for field_ in ("dataset_config", "data_files"):
            if self.path is not None and getattr(self, field_) is not None:
                yield (field_,), f"'{field_}' goes with 'dataset'; leave it out beside 'path'"

    @property
    def name(self) -> str:
        """What to call the corpus in messages and metadata; never a path of this machine."""
        if self.path is not None:
            return self.path.name
        dataset = str(self.dataset)
        return Path(dataset).name if Path(dataset).is_absolute() else dataset

    @property
    def fingerprint(self) -> str | None:
        """Digest of the local files it is read from; None where none are there."""
        return None if self.path is None else fingerprint_of_texts(self.path)
