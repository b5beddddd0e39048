"""The source of the text in a corpus."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import AliasChoices, BeforeValidator, Field

from optimer_hf.corpus.texts import fingerprint_named, fingerprint_texts
from optimer_hf.files.model import FileModel, Mistake
from optimer_hf.files.paths import strings_in
from optimer_hf.files.reference import LocalPath, LocalText

DataFiles = LocalText | list[LocalText] | dict[str, LocalText | list[LocalText]]


class CorpusConfig(FileModel):
    """Where training text comes from. Give either `path` or `dataset`."""

    path: LocalPath | None = Field(default=None, examples=["math.jsonl", "shards/*.parquet"])
    """Local text: a file (.jsonl .json .csv .tsv .txt .md .parquet .arrow; .gz .xz .bz2 .zst), a
    folder of such files, or a pattern (data/*.jsonl).
    """
    dataset: LocalText | None = Field(default=None, examples=["HuggingFaceFW/fineweb-2"])
    """Data set for `datasets.load_dataset`, streamed: a Hub id or a folder."""
    dataset_config: str | None = Field(
        default=None, validation_alias=AliasChoices("dataset_config", "name"), examples=["jpn_Jpan"]
    )
    """Configuration of the data set, the `name` of load_dataset. Default: the data set's own."""
    data_files: DataFiles | None = Field(default=None, examples=["data/*.parquet"])
    """Files of the data set to read, as load_dataset takes them. Default: all files."""
    split: str = Field(default="train", examples=["validation"])
    """Split of the data set, as load_dataset names it."""
    text_field: str = Field(default="text", examples=["content"])
    """Column or field that holds the text of a document."""

    def mistakes(self) -> Iterator[Mistake]:
        if (self.path is None) == (self.dataset is None):
            yield (), "give exactly one of 'path' (local files) and 'dataset' (for `datasets`)"
        for field_ in ("dataset_config", "data_files"):
            if self.path is not None and getattr(self, field_) is not None:
                yield (field_,), f"'{field_}' goes with 'dataset'; remove it or use 'dataset'"

    def idle_fields(self) -> Iterator[Mistake]:
        if self.path is not None and self.split != "train":
            yield ("split",), "does nothing beside 'path', which names the files; leave it out"

    @property
    def name(self) -> str:
        """The name of the corpus in messages and metadata; never a path on this machine."""
        if self.path is not None:
            return self.path.name
        dataset = str(self.dataset)
        return Path(dataset).name if Path(dataset).is_absolute() else dataset

    def fingerprint(self) -> str | None:
        """Return a digest of the local files, also of those of a local data set, or None if there
        are none.
        """
        if self.path is not None:
            return fingerprint_texts(self.path)
        named = [self.dataset, *(text for _, text in strings_in(self.data_files))]
        paths = map(Path, filter(None, named))
        return fingerprint_named(path for path in paths if path.is_absolute())


def _expand_path(value: Any) -> Any:
    """Return the fields of a corpus; a text or a path alone is its path."""
    return {"path": value} if isinstance(value, str | os.PathLike) else value


# a text stands for {"path": text}
CorpusEntry = Annotated[
    CorpusConfig, BeforeValidator(_expand_path, json_schema_input_type=str | CorpusConfig)
]
