"""A vector, recipe or merged model from the Hub.

A pull resolves the revision to a commit once, takes the files of an allow-list, and believes their
sha256, not the transfer. What was pulled stays at its commit until an update is asked for.
"""

import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id
from pydantic import ValidationError

from optimer_hf.errors import HubError
from optimer_hf.files import (
    ATOMIC_PREFIX,
    Reference,
    VersionedFile,
    require_empty,
    sha256_file,
    staged_directory,
)
from optimer_hf.publish import (
    ALLOWED,
    CARD,
    LARGEST_TEXT,
    PICKLES,
    WEIGHTS,
    Kind,
    check_pulled,
    is_allowed,
    kind_of,
)
from optimer_hf.recipe import RecipeFile
from optimer_hf.remote import described, described_input, explained, git_blob, licence_of, tried

logger = logging.getLogger(__name__)
RECORD = "hub.json"


@dataclass(frozen=True)
class Input:
    """A base model or vector of a pulled recipe, as the Hub describes it; sizes in bytes."""

    reference: str
    n_bytes: int | None
    licence: str | None
    gated: bool


@dataclass(frozen=True)
class Pull:
    """What was pulled and to where; `moved` says what an update changed."""

    repo_id: str
    commit: str
    kind: Kind
    path: Path
    files: tuple[str, ...]
    inputs: tuple[Input, ...] = ()
    moved: tuple[str, ...] = ()


class PulledFile(VersionedFile):
    """hub.json: where a pulled directory came from."""

    repo_id: str
    revision: str | None
    commit: str
    files: dict[str, str]


def pull(
    repo_id: str,
    out: Path | None = None,
    *,
    revision: str | None = None,
    token: str | None = None,
    update: bool = False,
) -> Pull:
    """Pull a vector, recipe or merged model to `out` (default: the name of the repository).

    `repo_id` may carry the revision (`org/name@rev`, `hf://`). The revision is resolved to a commit
    once; every file is compared with the sha256 (small ones: git's sha1) that the Hub lists. A
    directory that was pulled before stays at its commit unless `update` is given. Raises HubError
    before anything is written to `out`.
    """
    ref = Reference(repo_id)
    name, given = ref.repo
    revision = revision or given
    target = out or Path(name.rpartition("/")[2])
    with explained(name):
        validate_repo_id(name)
        if constants.is_offline_mode():
            return _pull_offline(name, revision, target)
        api = HfApi(token=token)
        info = described(api, name, revision)
        name = info.id
        listed = {file.rfilename: file for file in info.siblings or []}
        kind = _kind_of_remote(name, listed)
        _refuse_oversized(name, kind, listed)
        wanted = [file for file in listed if is_allowed(kind, file) or file == CARD]
        before = _pulled_before(target, name, info.sha, update)
        snapshot = _snapshot(name, (revision, info.sha), wanted, token)
        for file in wanted:
            _check_content(name, snapshot / file, listed[file])
        return _finish(api, (name, revision, info.sha), kind, snapshot, wanted, target, before)


def _snapshot(
    repo_id: str, revisions: tuple[str | None, str], names: list[str], token: str | None
) -> Path:
    """Return the cached files of a commit, fetched under the name that was asked for, so that the
    cache answers to that name offline.
    """
    path = Path()
    for revision in revisions:
        request = partial(
            snapshot_download, repo_id, revision=revision, allow_patterns=names, token=token
        )
        path = Path(tried(request))
        if path.name == revisions[1]:
            break
    return path


def _kind_of_remote(repo_id: str, names: Mapping[str, Any]) -> Kind:
    kind = kind_of(list(names))
    if kind is not None:
        return kind
    has_weights = any(Path(name).match(WEIGHTS) for name in names)
    if not has_weights and any(Path(name).match(pattern) for pattern in PICKLES for name in names):
        raise HubError(
            f"{repo_id}: holds pickled weights only, which can run code when they are read. Ask "
            "its author for safetensors."
        )
    raise HubError(
        f"{repo_id}: found neither vector.json nor recipe.yaml, so this is no vector, recipe or "
        "merge of optimer-hf. `hf download` fetches any repository."
    )


def _refuse_oversized(repo_id: str, kind: Kind, listed: Mapping[str, Any]) -> None:
    for name, file in listed.items():
        if is_allowed(kind, name) and not Path(name).match(WEIGHTS) and file.size > LARGEST_TEXT:
            raise HubError(
                f"{repo_id}: {name} has {file.size} bytes, expected at most {LARGEST_TEXT}."
            )


def _check_content(repo_id: str, path: Path, file: Any) -> None:
    """Raise HubError unless a downloaded file is what the Hub lists; a bad one leaves the cache."""
    if file.lfs is not None:
        is_right = sha256_file(path.resolve()) == file.lfs.sha256
    else:
        is_right = git_blob(path.read_bytes()) == file.blob_id
    if not is_right:
        path.resolve().unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        raise HubError(
            f"{repo_id}: {path.name} was damaged on its way: its sha256 is not the one the Hub "
            "lists. It was removed from the cache; pull again."
        )


def _pulled_before(target: Path, repo_id: str, commit: str, update: bool) -> PulledFile | None:
    """Return the record of an earlier pull into a directory; refuse to change it unasked."""
    if not (target / RECORD).exists():
        require_empty(target)
        return None
    before = PulledFile.read(target / RECORD)
    if before.repo_id != repo_id:
        raise HubError(
            f"{target}: was pulled from {before.repo_id}. Give another directory for {repo_id}."
        )
    if before.commit != commit and not update:
        raise HubError(
            f"{target}: was pulled at {before.commit}; {repo_id} is at {commit} now. --update "
            f"takes it and says what moved; {repo_id}@{before.commit} stays."
        )
    return before


def _finish(
    api: HfApi | None,
    source: tuple[str, str | None, str],
    kind: Kind,
    snapshot: Path,
    names: list[str],
    target: Path,
    before: PulledFile | None,
) -> Pull:
    """Check what a snapshot holds and put it in place; hub.json comes last."""
    repo_id, revision, commit = source
    with TemporaryDirectory() as scratch:
        for name in names:  # the small files under their own names, for the messages
            if not Path(name).match(WEIGHTS):
                copy = Path(scratch) / name
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(snapshot / name, copy)
        record = _checked(repo_id, kind, Path(scratch))
    files = {name: sha256_file((snapshot / name).resolve()) for name in names}
    moved = _moved(before, target, commit, files, record) if before is not None else ()
    pulled = PulledFile(repo_id=repo_id, revision=revision, commit=commit, files=files)
    if before is None:
        with staged_directory(target) as staging:
            _copy(snapshot, files, staging)
            pulled.write(staging / RECORD)
    else:
        _copy(snapshot, files, target)
        for name in set(before.files) - set(files):
            (target / name).unlink(missing_ok=True)
        pulled.write(target / RECORD)
    inputs = _inputs(api, record) if api is not None and kind == "recipe" else ()
    return Pull(repo_id, commit, kind, target, tuple(files), inputs, moved)


def _checked(repo_id: str, kind: Kind, directory: Path) -> Any:
    try:
        return check_pulled(kind, directory)
    except (ValidationError, ValueError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise HubError(f"{repo_id}: holds a file that cannot be used ({reason}).") from None


def _copy(snapshot: Path, files: Mapping[str, str], target: Path) -> None:
    for name, sha256 in files.items():
        out = target / name
        if out.is_file() and sha256_file(out) == sha256:
            continue
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = out.with_name(f"{ATOMIC_PREFIX}{out.name}")
        shutil.copyfile(snapshot / name, partial)
        partial.replace(out)


def _moved(
    before: PulledFile, target: Path, commit: str, files: Mapping[str, str], record: Any
) -> tuple[str, ...]:
    """Say what differs between a pulled directory and what is pulled now."""
    if before.commit == commit:
        return ()
    lines = [f"commit: {before.commit} -> {commit}"]
    if isinstance(record, RecipeFile) and (target / "recipe.yaml").exists():
        old = RecipeFile.read(target / "recipe.yaml")
        if old.base_model != record.base_model:
            lines.append(f"base_model: {old.base_model} -> {record.base_model}")
        for name in sorted(old.vectors.keys() | record.vectors.keys()):
            was, now = old.vectors.get(name), record.vectors.get(name)
            if was != now:
                shown = [f"{v.weight:.4g} x {v.source}" if v else "none" for v in (was, now)]
                lines.append(f"vectors.{name}: {shown[0]} -> {shown[1]}")
    names = sorted(before.files.keys() | files.keys())
    changed = [name for name in names if before.files.get(name) != files.get(name)]
    return (*lines, f"files: {', '.join(changed)}")


def _inputs(api: HfApi, recipe: RecipeFile) -> tuple[Input, ...]:
    """Return what building a recipe will fetch."""
    references = [recipe.base_model, *(item.source for item in recipe.vectors.values())]
    found = []
    for text in dict.fromkeys(references):
        ref = Reference(text)
        if ref.package is not None:
            found.append(Input(text, None, None, False))
            continue
        try:
            info = described_input(api, ref)
        except (HubError, HfHubHTTPError) as error:
            logger.warning("%s", error)
            found.append(Input(text, None, None, True))
            continue
        sizes = [file.size or 0 for file in info.siblings or [] if not _is_pickle(file.rfilename)]
        found.append(Input(text, sum(sizes), licence_of(info), bool(info.gated)))
    return tuple(found)


def _is_pickle(name: str) -> bool:
    return any(Path(name).match(pattern) for pattern in PICKLES)


def _pull_offline(repo_id: str, revision: str | None, target: Path) -> Pull:
    """Pull from the cache what was pulled before."""
    try:
        patterns = [CARD, *(pattern for kind in ALLOWED for pattern in ALLOWED[kind])]
        snapshot = Path(
            snapshot_download(
                repo_id, revision=revision, allow_patterns=patterns, local_files_only=True
            )
        )
    except LocalEntryNotFoundError:
        raise HubError(
            f"{repo_id}: is not in the cache, and the Hub is offline (HF_HUB_OFFLINE). Go online "
            "once and pull it."
        ) from None
    names = [str(path.relative_to(snapshot)) for path in snapshot.rglob("*") if path.is_file()]
    kind = _kind_of_remote(repo_id, dict.fromkeys(names))
    wanted = sorted(name for name in names if is_allowed(kind, name) or name == CARD)
    before = _pulled_before(target, repo_id, snapshot.name, update=False)
    source = (repo_id, revision, snapshot.name)
    return _finish(None, source, kind, snapshot, wanted, target, before)
