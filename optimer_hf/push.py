"""A vector, recipe or merged model to the Hub.

A push is one commit on top of the head it has looked at, so that a reader sees the old state or the
new one, and two people who push at once cannot overwrite each other unseen. Files that are there
already travel no second time, also after a kill.
"""

import hashlib
import logging
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    RepoFile,
    constants,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from optimer_hf import card
from optimer_hf.checkpoint import weight_files
from optimer_hf.errors import HubError
from optimer_hf.files import Reference, sha256_file
from optimer_hf.publish import (
    CARD,
    Kind,
    Publication,
    is_allowed,
    kind_of,
    local_vectors,
    publication,
)
from optimer_hf.recipe import Lock
from optimer_hf.remote import TRIES, described_input, explained, git_blob, licence_of, tried

logger = logging.getLogger(__name__)
MOST_FILES = 250  # of one commit


@dataclass(frozen=True)
class Push:
    """What a push did, or would do (`commit` None): files and their sizes in bytes."""

    repo_id: str
    kind: Kind
    sent: dict[str, int]
    unchanged: tuple[str, ...]
    deleted: tuple[str, ...]
    card: str
    commit: str | None = None
    pull_request: str | None = None
    vectors: tuple["Push", ...] = ()


def push(
    directory: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    tag: str | None = None,
    licence: str | None = None,
    vectors: bool = False,
    dry_run: bool = False,
) -> Push:
    """Push a vector, recipe or merged model, recognised by its metadata, in one commit.

    `private` None leaves the choice to the account; `revision` is a branch, made when it is
    missing; `tag` is set last. `vectors` pushes the local vectors of a recipe first, each to
    `<repo_id>-<name>`, and pins the recipe to them. Raises HubError, with what to do, before
    anything is sent where that is possible.
    """
    if create_pr and tag is not None:
        raise HubError(
            "--tag with --create-pr: a proposal has no tag yet. Tag it once it is merged."
        )
    with explained(repo_id):
        validate_repo_id(repo_id)
        if repo_id.count("/") != 1:
            raise HubError(f"{repo_id!r}: expected a repository as name/repository.")
        target = _Target(HfApi(token=token), repo_id, revision, private)
        paths = _vectors_to_push(directory) if vectors else {}
        foreseen = {name: f"{repo_id}-{name}@{'0' * 40}" for name in paths}
        found = publication(directory, foreseen)
        _refuse_other_kind(target, found)
        metadata = _metadata(target, found, licence, foreseen.values())
        pushes: dict[str, Push] = {}
        for name, path in paths.items():
            options = {"private": private, "token": token, "licence": licence, "dry_run": dry_run}
            pushes[name] = push(path, f"{repo_id}-{name}", **options)  # type: ignore[arg-type]
        if paths and not dry_run:
            pinned = {name: f"{each.repo_id}@{each.commit}" for name, each in pushes.items()}
            found = publication(directory, pinned)
            metadata = _metadata(target, found, licence)
        request = _Request(found, metadata, commit_message, create_pr, tag, dry_run)
        done = _commit(target, request)
    return replace(done, vectors=tuple(pushes.values()))


def _vectors_to_push(directory: Path) -> dict[str, Path]:
    """Return the local vectors of a recipe; raise HubError unless they are the locked ones."""
    if not (directory / "recipe.yaml").exists():
        raise HubError(f"{directory}: --vectors belongs to a recipe, and it has no recipe.yaml.")
    paths = local_vectors(directory)
    lock = Lock.read(directory / "recipe.lock.json")
    for name, path in paths.items():
        if not path.is_dir() or weight_files(path) != lock.vectors.get(name):
            raise HubError(
                f"{directory / 'recipe.yaml'}: vectors.{name}: the weights in {path} are not the "
                "locked ones. Write the recipe again."
            )
    return paths


@dataclass(frozen=True)
class _Target:
    """A repository as it is when a push begins; `info` None: there is none yet."""

    api: HfApi
    repo_id: str
    revision: str | None
    private: bool | None

    @property
    def branch(self) -> str:
        return self.revision or constants.DEFAULT_REVISION

    def info(self) -> Any:
        """Return what the Hub says of the branch, or of the default one when it is missing."""
        for revision in (self.revision, None):
            request = partial(self.api.model_info, self.repo_id, revision=revision)
            try:
                return tried(request)
            except GatedRepoError:
                raise
            except RevisionNotFoundError:
                continue
            except RepositoryNotFoundError as error:
                if error.response.status_code == 401:
                    raise
                return None
        return None

    def listing(self, commit: str) -> dict[str, Any]:
        """Return file name -> entry (size, blob_id, lfs) at a commit."""
        entries = tried(
            lambda: list(self.api.list_repo_tree(self.repo_id, revision=commit, recursive=True))
        )
        return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}

    def card(self, commit: str) -> str | None:
        """Return the card at a commit."""
        try:
            path = tried(lambda: self.api.hf_hub_download(self.repo_id, CARD, revision=commit))
        except EntryNotFoundError:
            return None
        return Path(path).read_text(encoding="utf-8")


@dataclass(frozen=True)
class _Request:
    """What one push asks for."""

    found: Publication
    metadata: dict[str, Any]
    message: str | None
    create_pr: bool
    tag: str | None
    dry_run: bool


def _refuse_other_kind(target: _Target, found: Publication) -> None:
    info = target.info()
    if info is None:
        return
    there = kind_of([file.rfilename for file in info.siblings or []])
    if there is not None and there != found.kind:
        raise HubError(
            f"{target.repo_id}: holds a {there}, and this is a {found.kind}. Give another "
            "repository."
        )
    if target.private is not None and target.private != info.private:
        is_now, asked = ("private", "--public") if info.private else ("public", "--private")
        raise HubError(
            f"{target.repo_id}: is {is_now}, and {asked} was asked. A push does not change that; "
            "do it in the settings of the repository."
        )


def _metadata(
    target: _Target,
    found: Publication,
    licence: str | None,
    foreseen: Collection[str] = (),
) -> dict[str, Any]:
    """Return the metadata of the card, after a look at every input on the Hub but the `foreseen`
    ones, which are not there yet.
    """
    info = target.info()
    is_private = info.private if info is not None else target.private is True
    references = [ref for ref in map(Reference, found.inputs) if ref.package is None]
    licences: dict[str, str | None] = {
        text: None for text in found.inputs if text.startswith("pypi:")
    }
    for ref in references:
        if ref.text in foreseen:
            continue
        there = described_input(target.api, ref)
        if there.private and not is_private:
            raise HubError(
                f"{ref.text}: is private, so a public {found.kind} could not be built by others. "
                "Push with --private, or make the input public."
            )
        licences[ref.text] = licence_of(there)
    existing = card.split(target.card(info.sha) or "")[0] if info is not None else {}
    strictest = card.strictest_licence(licences)
    chosen = licence or strictest or existing.get("license")
    if licence and strictest and licence.lower() != strictest:
        logger.warning(
            "%s: --license %s, but its inputs are under %s", target.repo_id, licence, strictest
        )
    if not chosen:
        listed = ", ".join(f"{name}: {found or 'unknown'}" for name, found in licences.items())
        raise HubError(
            f"{target.repo_id}: the licence cannot be told from the inputs ({listed}). Say it: "
            "--license apache-2.0, gemma, ..."
        )
    names = [ref.repo[0] for ref in references]
    metadata = card.metadata_of(found.kind, chosen, names, _model_index(found))
    datasets = card.datasets_of(found.vector.corpus) if found.vector is not None else []
    return metadata | ({"datasets": datasets} if datasets else {})


def _model_index(found: Publication) -> dict[str, Any] | None:
    if found.recipe is None or "sealed" not in found.recipe.scores:
        return None
    terms = found.recipe.objective.get("terms", [])
    metrics = {
        str(term.get("name") or term.get("task") or Path(str(term.get("text"))).stem): str(
            term.get("metric", "bits_per_byte")
        )
        for term in terms
    }
    return card.model_index(found.recipe.name, found.recipe.scores["sealed"]["terms"], metrics)


def _card(target: _Target, request: _Request, existing: str | None) -> str:
    found = request.found
    facts: dict[str, Any] = {
        "kind": found.kind,
        "title": found.name,
        "repo_id": target.repo_id,
        "vector": found.vector,
        "recipe": found.recipe,
        "recipe_text": found.text("recipe.yaml").strip(),
        "merge_config": (found.text("mergekit_config.yml") or found.text("optimer.yml")).strip(),
        "figure": "comparison.png" in found.files,
    }
    if found.recipe is not None:
        results = found.text("results.md")
        facts |= card.recipe_facts(found.recipe.weights, found.recipe.ledger, results)
    return card.render(request.metadata, facts, existing)


def _commit(target: _Target, request: _Request) -> Push:
    """Send what the branch lacks in one commit on its head; look again when the head has moved."""
    for _ in range(TRIES):
        info = target.info()
        if info is None and not request.dry_run:
            tried(
                lambda: target.api.create_repo(
                    target.repo_id, private=target.private, exist_ok=True
                )
            )
            info = target.info()
        existing = target.card(info.sha) if info is not None else None
        done, operations = _changes(target, request, info, existing)
        if request.dry_run:
            return done
        _refuse_moved_tag(target, request.tag, done, info.sha, bool(operations))
        if not operations:
            return _tagged(target, request.tag, replace(done, commit=info.sha))
        if target.revision and not target.revision.startswith("refs/") and not request.create_pr:
            tried(
                lambda: target.api.create_branch(
                    target.repo_id, branch=target.branch, exist_ok=True
                )
            )
        try:
            commit = _send(target, request, operations, info.sha)
        except HfHubHTTPError as error:
            if error.response.status_code != 412:
                raise
            logger.warning(
                "%s: somebody else pushed to %s meanwhile; looking again",
                target.repo_id,
                target.branch,
            )
            continue
        sent = replace(done, commit=commit.oid, pull_request=commit.pr_url)
        return _tagged(target, request.tag, sent)
    raise HubError(
        f"{target.repo_id}: {target.branch} was changed by others {TRIES} times during this push. "
        "Nothing is lost; push again."
    )


def _send(target: _Target, request: _Request, operations: list[Any], parent: str) -> Any:
    found = request.found
    return tried(
        lambda: target.api.create_commit(
            target.repo_id,
            list(operations),
            commit_message=request.message or f"Upload {found.kind} {found.name} (optimer-hf)",
            revision=target.branch,
            parent_commit=parent,
            create_pr=request.create_pr or None,
        )
    )


def _changes(
    target: _Target, request: _Request, info: Any, existing: str | None
) -> tuple[Push, list[Any]]:
    """Return what differs from the head of a branch, and the operations that make it equal."""
    text = _card(target, request, existing)
    files: dict[str, Path | bytes] = {**request.found.files, CARD: text.encode()}
    there = target.listing(info.sha) if info is not None else {}
    changed = {name: data for name, data in files.items() if not _is_same(data, there.get(name))}
    kind = request.found.kind
    stale = [name for name in there if name not in files and is_allowed(kind, name)]
    if len(changed) + len(stale) > MOST_FILES:
        raise HubError(
            f"{target.repo_id}: {len(changed) + len(stale)} files to change, more than the "
            f"{MOST_FILES} of one commit. Write larger shards (--max-shard-size)."
        )
    operations = [CommitOperationAdd(name, data) for name, data in changed.items()]
    operations += [CommitOperationDelete(name) for name in stale]
    done = Push(
        target.repo_id,
        kind,
        {name: _n_bytes(data) for name, data in changed.items()},
        tuple(name for name in files if name not in changed),
        tuple(stale),
        text,
    )
    return done, operations


def _n_bytes(data: Path | bytes) -> int:
    return len(data) if isinstance(data, bytes) else data.stat().st_size


def _is_same(data: Path | bytes, entry: Any) -> bool:
    if entry is None or entry.size != _n_bytes(data):
        return False
    if entry.lfs is not None:
        found = hashlib.sha256(data).hexdigest() if isinstance(data, bytes) else sha256_file(data)
        return bool(found == entry.lfs.sha256)
    return bool(git_blob(data if isinstance(data, bytes) else data.read_bytes()) == entry.blob_id)


def _refuse_moved_tag(
    target: _Target, tag: str | None, done: Push, head: str, changes: bool
) -> None:
    if tag is None:
        return
    refs = tried(lambda: target.api.list_repo_refs(target.repo_id))
    there = {ref.name: ref.target_commit for ref in refs.tags}.get(tag)
    if there is not None and (changes or there != head):
        raise HubError(
            f"{target.repo_id}: tag {tag!r} is at {there} already, and a tag does not move. Give "
            "another tag."
        )


def _tagged(target: _Target, tag: str | None, done: Push) -> Push:
    if tag is not None and done.commit is not None:
        tried(
            lambda: target.api.create_tag(
                target.repo_id, tag=tag, revision=done.commit, exist_ok=True
            )
        )
    return done
