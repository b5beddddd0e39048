"""conversion.json: what a model was converted from. It is written last into the directory."""

from optimer_hf.files.model import VersionedFile

CONVERSION_FILE = "conversion.json"


class ConversionRecord(VersionedFile):
    """conversion.json beside the weights that were de-quantised from a GGUF file.

    `source` and `source_sha256` are the name and digest of that file, `sha256` has the digests of
    the weights by name, and `transformers` is the version that converted them.
    """

    source: str
    source_sha256: str
    dtype: str
    note: str = "de-quantised from GGUF; not the original weights"
    transformers: str
    sha256: dict[str, str]
