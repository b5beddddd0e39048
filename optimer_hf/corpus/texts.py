"""Read documents from local files in order, with one row in memory at a time.

A path is a file, a folder of shards or a glob. JSON Lines, JSON arrays, CSV and TSV are read here,
so text that looks like a date or a number stays text. `datasets` reads Parquet and Arrow. A plain
text file is one document, or several if it is large.
"""

import bz2
import csv
import glob
import gzip
import json
import logging
import lzma
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from optimer_hf.errors import CorpusError
from optimer_hf.files.digest import digest, fingerprint
from optimer_hf.files.reference import is_there, match_pattern
from optimer_hf.files.text import LFS_POINTER
from optimer_hf.printable import warn_once

logger = logging.getLogger(__name__)


LONGEST_ROW = 64 * 2**20  # characters; a longer row means a damaged or hostile file
LONGEST_TEXT = 4 * 2**20  # characters; longer plain text files become several documents
CHUNK = 2**20  # characters
SURROGATE = re.compile("[\ud800-\udfff]")  # JSON may contain these, but no tokenizer accepts them
BETWEEN_ROWS = re.compile(r"[\s,]*")
ABOUT = re.compile(r"(readme|licen[cs]e)\b", re.IGNORECASE)  # texts about a corpus
HELD_OUT = re.compile(r"(?<![a-z])(test|testing|eval|dev|valid|validation|held-?out)(?![a-z])")
PLAIN = (".txt", ".md")
ROWS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
TABLES = (".parquet", ".arrow")  # read by `datasets`
COMPRESSIONS = (".gz", ".xz", ".bz2", ".zst")


def read_texts(path: Path, field: str) -> Iterator[str]:
    """Yield the documents in a file, a folder or a glob.

    They are the texts in `field` of each row, or plain text. Rows whose text is null are skipped,
    and a warning says how many.

    Raises a CorpusError that names file and row if something is missing, damaged, malformed or
    longer than LONGEST_ROW, or if a row lacks the field.
    """
    for file in find_files(path):
        yield from _texts_of_file(file, field)


def has_rows(file: Path) -> bool:
    """Whether a file contains rows rather than plain text, by its name."""
    return _format(file) in (*ROWS, *TABLES)


def fingerprint_texts(path: Path) -> str | None:
    """Return a digest of the files that a path stands for, or None if there are none."""
    try:
        files = find_files(path)
    except CorpusError:
        return None
    return fingerprint(path) if files == [path] else _fingerprint_files(files)


def fingerprint_named(paths: Iterable[Path]) -> str | None:
    """Return a digest of all files that paths name: themselves, those below a folder, those that
    match a pattern. None if there are none. Hidden files below a folder, such as those of git, and
    texts about the corpus do not count.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            files += _drop_about(list(_walk(path)))
        else:
            files += match_pattern(path) or [path]
    there = sorted({file for file in files if file.is_file()})
    return _fingerprint_files(there) if there else None


def _fingerprint_files(files: Sequence[Path]) -> str:
    folder = os.path.commonpath([file.parent for file in files])
    return digest({file.relative_to(folder).as_posix(): fingerprint(file) for file in files})


# -- which files -----------------------------------------------------------------------------------


def find_files(path: Path) -> list[Path]:
    """Return the files that a path stands for: itself, or those of a folder or a glob, sorted.

    Raises CorpusError if there are none, if one has an unknown format, or if a folder contains
    several formats or a held-out split.
    """
    if is_there(path):
        if path.is_dir():
            return _find_shards(path)
        if not path.is_file():
            raise CorpusError(f"{path}: is not a regular file.")
        files = [path]
    elif (matches := match_pattern(path)) is not None:
        files = _drop_duplicates([file for file in matches if _is_file(file)])
        if not files:
            raise CorpusError(f"{path}: no file matches this pattern.")
    else:
        raise CorpusError(f"{path}: no such file.")
    for file in files:
        if _format(file) is None:
            raise CorpusError(
                f"{file}: found a file that ends in {file.suffix!r}. Expected "
                f"{', '.join((*ROWS, *PLAIN))} (plain, or compressed as {', '.join(COMPRESSIONS)}) "
                f"or {', '.join(TABLES)}."
            )
    return files


def _find_shards(folder: Path) -> list[Path]:
    """Return the shards in a folder and its sub-folders.

    If there are files of rows, plain text such as README.md is ignored.
    """
    if (folder / "state.json").is_file():
        return _files_saved_by_datasets(folder)
    if (folder / "dataset_dict.json").is_file():
        return _files_of_saved_split(folder)
    by_format: dict[str, list[Path]] = {}
    for file in _walk(folder):
        kind = _format(file)
        if kind is not None and _is_file(file):
            by_format.setdefault("text" if kind in PLAIN else kind, []).append(file)
    plain = _drop_about(by_format.pop("text", []))
    if not by_format and not plain:
        raise CorpusError(
            f"{folder}: found no shards in this folder. Expected files that end in "
            f"{', '.join((*ROWS, *TABLES, *PLAIN))}."
        )
    if len(by_format) > 1:
        raise CorpusError(
            f"{folder}: found files of several formats ({', '.join(sorted(by_format))}). Use a "
            f"pattern to select those to read: path: {folder.name}/*{min(by_format)}"
        )
    shards = _drop_duplicates(sorted(next(iter(by_format.values()), plain)))
    if _format(shards[0]) not in PLAIN:  # a guide may be called testing.md
        _refuse_held_out(folder, shards)
    return shards


def _walk(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder that are not hidden, entering each linked folder once."""
    entered: set[Path] = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        if Path(parent).resolve() in entered:
            folders.clear()
            continue
        entered.add(Path(parent).resolve())
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(parent) / name for name in sorted(names) if not name.startswith("."))


def _drop_about(files: list[Path]) -> list[Path]:
    """Drop texts about a corpus, unless there is nothing else."""
    return [file for file in files if not ABOUT.match(file.name)] or files


def _is_file(file: Path) -> bool:
    """Whether this is a file; raises CorpusError for a broken link, since a shard is missing."""
    if file.is_symlink() and not is_there(Path(os.path.realpath(file))):
        raise CorpusError(
            f"{file}: is a link to {file.readlink()}, which does not exist. Fetch the file, or "
            "remove the link."
        )
    return file.is_file()


def _drop_duplicates(files: list[Path]) -> list[Path]:
    """Drop files that are links to others in the list.

    Raises CorpusError if a file stands beside a compressed copy of itself.
    """
    by_target: dict[Path, Path] = {}
    by_name: dict[Path, Path] = {}
    for file in files:
        if by_target.setdefault(file.resolve(), file) != file:
            continue
        plain = file.with_suffix("") if file.suffix.lower() in COMPRESSIONS else file
        other = by_name.setdefault(plain, file)
        if other != file:
            raise CorpusError(
                f"{file}: seems to be a copy of {other.name} in the same folder. Remove one of "
                "them."
            )
    return list(by_target.values())


def _files_saved_by_datasets(folder: Path) -> list[Path]:
    """Return the files that `Dataset.save_to_disk` wrote.

    Files named `cache-*.arrow`, which `map` leaves in the same folder, are not part of them.
    """
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        names = [str(file["filename"]) for file in state["_data_files"]]
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise CorpusError(f"{folder / 'state.json'}: names no data files ({error}).") from None
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise CorpusError(f"{folder}: lacks {name[:80]!r}, which state.json names.")
    return [folder / name for name in names]


def _files_of_saved_split(folder: Path) -> list[Path]:
    """Return the files of the only split that `DatasetDict.save_to_disk` wrote."""
    splits = sorted(file.parent for file in folder.glob("*/state.json"))
    if len(splits) != 1:
        names = [split.name for split in splits]
        first = "train" if "train" in names or not names else names[0]
        raise CorpusError(
            f"{folder}: contains the splits {names} of a DatasetDict. Name the one to read: "
            f"path: {folder.name}/{first}"
        )
    return _files_saved_by_datasets(splits[0])


def _refuse_held_out(folder: Path, files: list[Path]) -> None:
    """Raise CorpusError for a test or validation split among others: do not train on it."""
    relative = [file.relative_to(folder).as_posix() for file in files]
    held_out = [name for name in relative if HELD_OUT.search(name.lower())]
    if held_out and len(held_out) < len(files):
        other = next(name for name in relative if name not in held_out)
        raise CorpusError(
            f"{folder}: contains several splits ({other} and {held_out[0]}). Use a pattern to "
            f"select the files to read, for instance path: {folder.name}/{other}"
        )


def _format(file: Path) -> str | None:
    """Return the format of a file by its ending, ignoring case and compression.

    None means that the format is unknown.
    """
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
        return suffixes[-1] if suffixes and suffixes[-1] in (*ROWS, *PLAIN) else None
    return suffixes[-1] if suffixes and suffixes[-1] in (*ROWS, *TABLES, *PLAIN) else None


# -- reading one -----------------------------------------------------------------------------------


def _texts_of_file(file: Path, field: str) -> Iterator[str]:
    kind, n_null = _format(file), 0
    try:
        _refuse_pointer(file)
        if kind in PLAIN:
            with _open_text(file) as text:
                yield from _parts(text, file)
            return
        for row, where in _rows(file, field, str(kind)):
            document = text_in(row, field, where)
            n_null += document is None
            if document is not None:
                yield document
    except UnicodeError as error:
        raise CorpusError(f"{file}: cannot be read as UTF-8 text ({error}).") from error
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise CorpusError(f"{file}: cannot be read ({error}).") from error
    finally:
        warn_of_null_texts(file.name, field, n_null)


def _refuse_pointer(file: Path) -> None:
    """Raise CorpusError for a file that Git LFS has not fetched, of any format."""
    with open(file, "rb") as raw:
        if raw.read(len(LFS_POINTER)) == LFS_POINTER:
            raise CorpusError(f"{file}: is a Git LFS pointer. Fetch the file: git lfs pull.")


def warn_of_null_texts(name: str, field: str, n_null: int) -> None:
    """Warn about rows whose text is null, if there are any."""
    if n_null:
        warn_once(logger, f"{name}: skipped {n_null:,} rows whose {field!r} is null")


def _open_text(file: Path, newline: str | None = None) -> TextIO:
    """Open a text file, compressed or not, and skip a byte order mark."""
    suffix = file.suffix.lower()
    if suffix == ".zst":
        import io

        import pyarrow

        raw = pyarrow.CompressedInputStream(pyarrow.OSFile(str(file)), "zstd")
        return io.TextIOWrapper(raw, encoding="utf-8-sig", newline=newline)
    opener: Any = {".xz": lzma.open, ".gz": gzip.open, ".bz2": bz2.open}.get(suffix, open)
    return opener(  # type: ignore[no-any-return]
        file, "rt", encoding="utf-8-sig", newline=newline
    )


def _lines(text: TextIO, file: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines of a file with their numbers."""
    number = 0
    while line := text.readline(LONGEST_ROW + 1):
        number += 1
        if len(line) > LONGEST_ROW:
            raise CorpusError(
                f"{file}:{number}: the line has more than {LONGEST_ROW:,} characters. Split the "
                "text into documents."
            )
        yield number, line


def _parts(text: TextIO, file: Path) -> Iterator[str]:
    """Yield plain text as one document, or cut at line ends into parts of about LONGEST_TEXT."""
    part: list[str] = []
    n_characters = 0
    for _, line in _lines(text, file):
        if part and n_characters + len(line) > LONGEST_TEXT:
            yield "".join(part)
            part, n_characters = [], 0
        part.append(line)
        n_characters += len(line)
    if part:
        yield "".join(part)


def _rows(file: Path, field: str, kind: str) -> Iterator[tuple[Any, str]]:
    """Yield the rows of a file, each with its name in error messages."""
    if kind in TABLES:
        yield from _table_rows(file, kind)
        return
    if kind in (".csv", ".tsv"):
        with _open_text(file, newline="") as text:
            yield from _csv_rows(text, file, field, "," if kind == ".csv" else "\t")
        return
    with _open_text(file) as text:
        if kind == ".json" and _first_character(file) == "[":
            yield from _array_rows(text, file)
            return
        for number, line in _lines(text, file):
            if line.strip():
                yield _parse(line, f"{file}:{number}"), f"{file}:{number}"


def _first_character(file: Path) -> str:
    """Return the first character of a file that is not white space."""
    with _open_text(file) as text:
        while (character := text.read(1)).isspace():
            pass
    return character


def _array_rows(text: TextIO, file: Path) -> Iterator[tuple[Any, str]]:
    """Yield the elements of a JSON array as they are read."""
    decoder = json.JSONDecoder()
    while text.read(1) != "[":
        pass
    buffer, start, number = "", 0, 1
    while True:
        start = BETWEEN_ROWS.match(buffer, start).end()  # type: ignore[union-attr]
        if buffer[start : start + 1] == "]":
            _refuse_more(buffer[start + 1 :], text, file)
            return
        where = f"{file}: row {number}"
        try:
            row, start = decoder.raw_decode(buffer, start)
        except json.JSONDecodeError as error:
            more = text.read(max(CHUNK, len(buffer) - start))
            if not more or len(buffer) - start > LONGEST_ROW:
                raise CorpusError(f"{where}: not a JSON value ({error.msg}).") from None
            buffer, start = buffer[start:] + more, 0
        except (ValueError, RecursionError) as error:
            raise CorpusError(f"{where}: not a JSON value ({error}).") from None
        else:
            yield row, where
            number += 1


def _refuse_more(after: str, text: TextIO, file: Path) -> None:
    """Raise CorpusError for anything but white space after a JSON array: it would be ignored."""
    while after:
        if rest := after.strip():
            raise CorpusError(
                f"{file}: found {rest[:20]!r} after the array. Expected one array, or one row per "
                "line (.jsonl)."
            )
        after = text.read(CHUNK)


def _csv_rows(
    text: TextIO, file: Path, field: str, delimiter: str
) -> Iterator[tuple[Mapping[str, Any], str]]:
    """Yield the rows of a CSV or TSV file; every value stays text."""
    csv.field_size_limit(LONGEST_ROW)  # for the whole process; the default is 131,072
    lines = (line for _, line in _lines(text, file))
    reader = csv.DictReader(lines, delimiter=delimiter, strict=True)
    try:
        names = reader.fieldnames or []
        _refuse_other_columns(file, field, names)
        for row in reader:
            where = f"{file}:{reader.line_num}"
            if None in row:
                raise CorpusError(
                    f"{where}: has more values than the {len(names)} columns. Quote texts that "
                    "contain a separator."
                )
            yield row, where
    except csv.Error as error:
        raise CorpusError(
            f"{file}:{reader.reader.line_num}: not valid CSV ({error}). Quote texts that contain a "
            "separator, and write a quote in them twice."
        ) from None


def _refuse_other_columns(file: Path, field: str, names: Sequence[str]) -> None:
    """Raise CorpusError unless one of the columns of a table is the text."""
    if names and field not in names:
        raise CorpusError(
            f"{file}: no text in field {field!r}; found {list(names)}. Set `text_field`."
        )
    if names.count(field) > 1:
        raise CorpusError(f"{file}: has {names.count(field)} columns {field!r}, expected one.")


def _table_rows(file: Path, kind: str) -> Iterator[tuple[Mapping[str, Any], str]]:
    """Yield the rows of a file in a format that `datasets` reads."""
    import datasets
    from pyarrow import parquet

    try:
        if kind == ".parquet" and parquet.read_metadata(file).num_rows == 0:
            return  # `datasets` would request batches of zero rows
        rows = datasets.load_dataset(
            kind.lstrip("."), data_files=glob.escape(str(file)), split="train", streaming=True
        )
        for number, row in enumerate(rows, start=1):
            yield row, f"{file}: row {number}"
    except CorpusError:
        raise
    except Exception as error:  # `datasets` raises dozens of types for a file it cannot read
        raise CorpusError(f"{file}: `datasets` cannot read it ({error}).") from error


def _parse(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise CorpusError(f"{where}: not a JSON object ({error.msg}).") from None
    except ValueError as error:  # a number with thousands of digits
        raise CorpusError(f"{where}: not a JSON object ({error}).") from None
    except RecursionError:
        raise CorpusError(f"{where}: is nested too deeply.") from None


def text_in(row: Any, field: str, where: str) -> str | None:
    """Return the text of a row, or None if it is null."""
    if not isinstance(row, Mapping) or field not in row:
        found = sorted(map(str, row)) if isinstance(row, Mapping) else type(row).__name__
        raise CorpusError(f"{where}: no text in field {field!r}; found {found}. Set `text_field`.")
    text = row[field]
    if text is None:
        return None
    if not isinstance(text, str):
        raise CorpusError(
            f"{where}: no text in field {field!r}; found a value of type {type(text).__name__} "
            "there. Set `text_field`."
        )
    if not text.isascii() and SURROGATE.search(text):
        raise CorpusError(f"{where}: contains half a character (\\ud800 to \\udfff). Remove it.")
    return text
