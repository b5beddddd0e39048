"""Push a vector, a recipe or a merged model to the Hub.

A push is one commit on top of the head that it has read. So a reader sees either the old state or
the new one, and two people who push at once cannot overwrite each other unnoticed. Files that have
arrived are not sent again, not even after a kill.
"""

import logging
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from httpx2 import TransportError
from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    EvalResult,
    HfApi,
    ModelInfo,
    RepoFile,
    constants,
)
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from optimer_hf.errors import HubError
from optimer_hf.files.reading import parse_yaml
from optimer_hf.files.reference import AnyPath, Reference
from optimer_hf.hub import card
from optimer_hf.hub.access import NO_TOKEN, check_access
from optimer_hf.hub.client import (
    TRIES,
    describe_input,
    explaining_errors,
    licence_of,
    retry,
    values_in_card,
)
from optimer_hf.hub.local_inputs import (
    BASE,
    NOT_YET,
    Placed,
    assume_on_hub,
    find_on_hub,
    local_inputs,
)
from optimer_hf.hub.publication import (
    CARD,
    BaseModel,
    Kind,
    Publication,
    choose_files,
    is_allowed,
    is_legal,
    is_same,
    is_weights,
    kind_of,
    n_bytes_of,
)
from optimer_hf.hub.readers import describe_uses
from optimer_hf.hub.uploads import base_of, find_earlier_uploads, uploads_of
from optimer_hf.merging.mergekit_pool import mergekit_command
from optimer_hf.models.hub_answers import checking_answers
from optimer_hf.recipes.record import LOCK, MERGE_CONFIG, VANILLA_CONFIG, Lock, Recipe
from optimer_hf.report.captions import (
    CAPTIONS,
    CARD_FIGURES,
    REPORT,
    Captions,
    dark_file,
    light_file,
)
from optimer_hf.vectors.record import VectorFile

logger = logging.getLogger(__name__)


MOST_FILES = 250  # in one commit


@dataclass(frozen=True)
class Push:
    """What a push did, or would do if `commit` is None. `sent` maps files to sizes in bytes.
    `readers` says what others can do with the repository at `url`. `unchecked` says what a dry run
    could not ask the Hub, or cannot know yet.
    """

    repo_id: str
    kind: Kind
    sent: dict[str, int]
    unchanged: tuple[str, ...]
    deleted: tuple[str, ...]
    card: str
    url: str = ""
    readers: tuple[str, ...] = ()
    unchecked: tuple[str, ...] = ()
    commit: str | None = None
    pull_request: str | None = None
    vectors: tuple["Push", ...] = ()


def push(
    directory: AnyPath,
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
    at: Mapping[str, str] | None = None,
    dry_run: bool = False,
) -> Push:
    """Push a vector, a recipe or a merged model to the Hub in one commit, and return what was sent.
    Its metadata tells which of them a directory contains.

    `private` None leaves the choice to the account. `revision` is a branch, created if it is
    missing. `tag` is set last. `licence` None takes that of the card on the Hub, or of the inputs.
    `vectors` pushes the local base and vectors of a recipe first, each to `<repo_id>-<name>`, and
    pins the recipe to them. `at` maps the names of local inputs (`base`, or a vector) to Hub
    repositories that have the same weights, which are compared by sha256. `dry_run` sends nothing,
    and needs no Hub: what only a Hub can tell is then named as not checked. Raises HubError that
    says what to do, before anything is sent where that is possible.
    """
    if create_pr:
        _refuse_beside_pull_request(tag, vectors)
    folder = Path(directory)
    options = _Options(private, licence, commit_message, create_pr, tag, dry_run)
    with explaining_errors(repo_id, proposes=create_pr):
        validate_repo_id(repo_id)
        if repo_id.count("/") != 1:
            raise HubError(f"{repo_id!r}: expected a repository as OWNER/NAME.")
        target = _Repository(HfApi(token=token), repo_id, revision)
        _warn_of_unbuilt(folder / LOCK)
        if (vectors or at) and not (folder / "recipe.yaml").exists():
            raise HubError(
                f"{folder}: has no recipe.yaml, and --vectors and --at go with a recipe."
            )
        logger.info("push: asking the Hub about %s", repo_id)
        if dry_run:
            target = replace(target, silence=_find_silence(target))
        unknown = _check_access(target, options)
        placed = _place_inputs(target, folder, at) if at else {}
        if vectors:
            done = _push_with_inputs(folder, target, options, placed)
        else:
            done = _push_alone(folder, target, options, placed)
    unchecked = list(done.unchecked)
    if unknown is not None and dry_run:
        unchecked.append(f"whether you may write to {target.namespace!r} ({unknown})")
    if at and _is_unreachable(target):
        unchecked.append(f"whether {', '.join(at.values())} have the weights of {', '.join(at)}")
    return replace(done, unchecked=tuple(unchecked))


def _push_alone(
    folder: Path, target: "_Repository", options: "_Options", placed: Mapping[str, Placed]
) -> Push:
    publication, info = choose_files(folder, placed), target.fetch_info()
    _refuse_other_visibility(target, info, options.private)
    _check(target, info, publication, options)
    _announce(target, publication, options)
    return _commit(target, publication, options)


def _place_inputs(target: "_Repository", folder: Path, at: Mapping[str, str]) -> dict[str, Placed]:
    if _is_unreachable(target):
        return assume_on_hub(local_inputs(folder), at)
    return find_on_hub(target.api, local_inputs(folder), at)


def _refuse_beside_pull_request(tag: str | None, vectors: bool) -> None:
    if tag is not None:
        raise HubError(
            "--tag with --create-pr: a pull request has no tag. Tag the commit once it is merged."
        )
    if vectors:
        raise HubError(
            "--vectors with --create-pr: a pull request is for one repository. Push each vector "
            "first."
        )


def _warn_of_unbuilt(lock: Path) -> None:
    if lock.exists() and not Lock.read(lock).output:
        logger.warning(
            "%s: records no built model, so nobody can verify theirs. Run `optimer build %s OUT` "
            "before you push.",
            lock,
            lock.parent,
        )


@dataclass(frozen=True)
class _Options:
    """The options of one push."""

    private: bool | None
    licence: str | None
    message: str | None
    create_pr: bool
    tag: str | None
    dry_run: bool


def _announce(target: "_Repository", publication: Publication, options: _Options) -> None:
    """Say where a push goes and what readers will be able to do, before anything is sent."""
    if not options.dry_run:
        uses = "\n".join(f"  {line}" for line in describe_uses(publication, target.repo_id))
        logger.info("%s will hold this %s. Readers\n%s", target.url, publication.kind, uses)


# -- a recipe and what it takes from this machine --------------------------------------------------


def _push_with_inputs(
    directory: Path, target: "_Repository", options: _Options, placed: dict[str, Placed]
) -> Push:
    """Check the recipe and its local inputs. Then send the base, then the vectors, then the recipe
    pinned to them. Inputs that are `placed` on the Hub already are not sent.
    """
    info = target.fetch_info()
    is_private = bool(options.private if info is None else info.private)
    if target.silence is None:
        api, repo_id = target.api, target.repo_id
        placed = find_earlier_uploads(api, directory, repo_id, is_private=is_private) | placed
    uploads = uploads_of(directory, target.repo_id, placed)
    targets = {n: replace(target, repo_id=u.repo_id, revision=None) for n, u in uploads.items()}
    places = {**placed, **{name: upload.place for name, upload in uploads.items()}}
    publication = choose_files(directory, places)
    base = base_of(Recipe.read(directory / "recipe.yaml"), places)
    parts = {name: each.publication(target.repo_id, base) for name, each in uploads.items()}
    foreseen = [each.place.reference for each in uploads.values()]
    options = _check_parts(target, targets, publication, parts, options, foreseen)
    pushes: dict[str, Push] = {}
    part_options = replace(options, message=None, tag=None)
    for name, upload in uploads.items():  # the base comes first
        part = upload.publication(target.repo_id, base)
        pushes[name] = _commit(targets[name], part, part_options, foreseen)
        if not options.dry_run:
            places[name] = upload.at_commit(pushes[name].commit)
            base = places[name].reference if name == BASE else base
    if not options.dry_run:
        publication, foreseen = choose_files(directory, places, publication.evidence), []
    done = _commit(target, publication, options, foreseen)
    return replace(done, vectors=tuple(pushes.values()))


def _check_parts(
    target: "_Repository",
    targets: Mapping[str, "_Repository"],
    publication: Publication,
    parts: Mapping[str, Publication],
    options: _Options,
    foreseen: Collection[str],
) -> _Options:
    """Ask the Hub about a recipe and its parts, and return the options for them: they get the
    visibility of the recipe, whose repository is created last. Raises HubError for what cannot be
    published.
    """
    info = target.fetch_info()
    infos = {name: each.fetch_info() for name, each in targets.items()}
    _refuse_other_visibility(target, info, options.private)
    for name, each in targets.items():
        _refuse_other_visibility(each, infos[name], options.private)
    _check(target, info, publication, options, foreseen)
    options = options if info is None else replace(options, private=info.private)
    for name, each in targets.items():
        there = infos[name]
        if there is not None and there.private and not options.private:
            raise HubError(
                f"{each.repo_id}: is private, so others could not build a public recipe. Push with "
                "--private, or make it public."
            )
        _check(each, there, parts[name], options, foreseen)
    _announce(target, publication, options)
    if options.dry_run:
        return options
    return replace(options, private=target.create_if_missing(options.private).private)


def _check(
    target: "_Repository",
    info: ModelInfo | None,
    publication: Publication,
    options: _Options,
    foreseen: Collection[str] = (),
) -> None:
    """Render the card as it would be now, so that whatever cannot be published is refused before
    anything is sent.
    """
    metadata, existing = _card_metadata(target, info, publication, options, foreseen)
    _render_card(target.repo_id, publication, metadata, existing)


# -- the repository --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Silence:
    """Why the Hub says nothing about the repository of a dry run; `is_total`: nor about inputs."""

    reason: str
    is_total: bool


def _find_silence(target: "_Repository") -> _Silence | None:
    """Ask the Hub once about a repository, and return why it does not answer if it does not."""
    try:
        with checking_answers():
            target.api.model_info(target.repo_id)
    except OfflineModeIsEnabled:
        return _Silence("HF_HUB_OFFLINE is set", is_total=True)
    except (TransportError, ConnectionError):
        return _Silence("the Hub cannot be reached", is_total=True)
    except HfHubHTTPError as error:
        if error.response.status_code == 401 and not isinstance(error, GatedRepoError):
            return _Silence(NO_TOKEN, is_total=False)
    return None


def _check_access(target: "_Repository", options: _Options) -> str | None:
    """Raise HubError if the account may not write to a repository. Return why the Hub does not say
    that, if it answers other questions.
    """
    if target.silence is not None:
        return None
    exists = target.fetch_info() is not None
    unknown = check_access(target.api, target.repo_id, proposes=options.create_pr, exists=exists)
    if unknown == NO_TOKEN and not options.dry_run:
        raise HubError(
            f"{target.repo_id}: the token is wrong or missing (401). Log in with `hf auth login`."
        )
    return unknown


def _is_unreachable(target: "_Repository") -> bool:
    return target.silence is not None and target.silence.is_total


def _unchecked(
    target: "_Repository",
    publication: Publication,
    foreseen: Collection[str],
    licence: str | None,
) -> Iterator[str]:
    """Yield what a dry run would have asked the Hub, but for inputs that are to be uploaded.
    `licence` is the one that was given. Commits that nobody knows yet come first.
    """
    awaited = [x.partition("@")[0] for x in publication.inputs if x.endswith(f"@{NOT_YET}")]
    if awaited:
        names = ", ".join(awaited)
        yield f"the commits of {names}, for which the card has {NOT_YET} until the push"
    if target.silence is None:
        return
    why = target.silence.reason
    yield f"whether {target.repo_id} is new, and you may write to it ({why})"
    inputs = ", ".join(x.partition("@")[0] for x in publication.inputs if x not in foreseen)
    if target.silence.is_total and inputs:
        yield f"whether others can see {inputs}, and under which licences ({why})"
    if target.silence.is_total and licence is None:
        yield (
            "which licence the card names: without --license, that of the card on the Hub, or of "
            f"the inputs; a push that finds none is refused ({why})"
        )


@dataclass(frozen=True)
class _Repository:
    """A repository to push to. If there is a `silence`, the Hub is not asked about it."""

    api: HfApi
    repo_id: str
    revision: str | None
    silence: _Silence | None = None

    @property
    def url(self) -> str:
        """The page of the repository."""
        return f"{self.api.endpoint}/{self.repo_id}"

    @property
    def namespace(self) -> str:
        return self.repo_id.partition("/")[0]

    @property
    def branch(self) -> str:
        return self.revision or constants.DEFAULT_REVISION

    def fetch_info(self) -> ModelInfo | None:
        """Return what the Hub says about the branch, or about the default branch if that one is
        missing. None: there is no repository yet, as far as the Hub says.
        """
        if self.silence is not None:
            return None
        for revision in (self.revision, None):
            request = partial(self.api.model_info, self.repo_id, revision=revision)
            try:
                return retry(request)
            except GatedRepoError:
                raise
            except RevisionNotFoundError:
                continue
            except RepositoryNotFoundError as error:
                if error.response.status_code == 401:
                    raise
                return None
        return None

    def create_if_missing(self, private: bool | None) -> ModelInfo:
        """Return what the Hub says about the repository, which is created if it is missing."""
        info = self.fetch_info()
        if info is None:
            retry(partial(self.api.create_repo, self.repo_id, private=private, exist_ok=True))
            info = self.fetch_info()
        if info is None:
            raise HubError(f"{self.repo_id}: was created, but is not there. Push again.")
        return info

    def create_branch_if_missing(self) -> None:
        """Create the branch unless it exists."""
        if self.revision is not None and not self.revision.startswith("refs/"):
            retry(partial(self.api.create_branch, self.repo_id, branch=self.branch, exist_ok=True))

    def list_files(self, revision: str) -> dict[str, RepoFile]:
        """Return file name -> entry (size, blob_id, lfs) at a revision."""
        entries = retry(
            lambda: list(self.api.list_repo_tree(self.repo_id, revision=revision, recursive=True))
        )
        return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}

    def read_card(self, commit: str | None) -> str | None:
        """Return the card at a commit, or None if there is none."""
        try:
            path = retry(lambda: self.api.hf_hub_download(self.repo_id, CARD, revision=commit))
        except RemoteEntryNotFoundError:
            return None
        return Path(path).read_text(encoding="utf-8")


def _refuse_other_content(target: _Repository, info: ModelInfo, publication: Publication) -> None:
    """Raise HubError if a repository contains something else."""
    names = [file.rfilename for file in info.siblings or []]
    there = kind_of(names)
    if there is not None and there != publication.kind:
        raise HubError(
            f"{target.repo_id}: contains a {there}, and this is a {publication.kind}. Give another "
            "repository."
        )
    foreign = [name for name in names if is_allowed(publication.kind, name) and not is_legal(name)]
    if publication.kind == "base" and foreign and _has_same_weights(target, info, publication):
        return
    if there is None and foreign:
        raise HubError(
            f"{target.repo_id}: contains another model ({', '.join(foreign[:3])} ...), which this "
            f"{publication.kind} would replace. Give another repository."
        )


def _has_same_weights(target: _Repository, info: ModelInfo, publication: Publication) -> bool:
    """Whether a repository has the weights of a publication and no others."""
    there = {n: file for n, file in target.list_files(str(info.sha)).items() if is_weights(n)}
    here = {name: data for name, data in publication.files.items() if is_weights(name)}
    return there.keys() == here.keys() and all(
        is_same(data, there[name]) for name, data in here.items()
    )


def _refuse_other_visibility(
    target: _Repository, info: ModelInfo | None, private: bool | None
) -> None:
    if info is not None and private is not None and private != info.private:
        is_now, option = ("private", "--public") if info.private else ("public", "--private")
        raise HubError(
            f"{target.repo_id}: is {is_now}, and {option} was given. A push does not change that; "
            "change it in the settings of the repository."
        )


# -- the card --------------------------------------------------------------------------------------


def _card_metadata(
    target: _Repository,
    info: ModelInfo | None,
    publication: Publication,
    options: _Options,
    foreseen: Collection[str] = (),
) -> tuple[dict[str, Any], str | None]:
    """Return the metadata of the new card, and the card that is there now.

    Asks the Hub about the repository and about every input except the `foreseen` ones, which are
    not there yet. Raises HubError for anything that cannot be published there.
    """
    if info is not None:
        _refuse_other_content(target, info, publication)
    existing = target.read_card(info.sha) if info is not None else None
    is_private = bool(info.private if info is not None else options.private)
    unseen = publication.inputs if _is_unreachable(target) else foreseen
    origins = _read_origins(target.api, publication, is_private, unseen)
    relation, results = "merge", list[EvalResult]()
    if isinstance(publication.record, VectorFile):
        relation = card.RELATIONS[publication.record.kind]
        datasets = card.datasets_of(publication.record.corpus)
        origins = replace(origins, datasets=tuple(datasets))
    elif isinstance(publication.record, Recipe):
        results = _sealed_results(publication.record)
    licence = options.licence  # nobody else can say if the Hub does not
    if not _is_unreachable(target):
        licence = _choose_licence(target.repo_id, existing, origins, options.licence)
    return card.metadata_of(
        publication.kind, relation, licence, origins, _name_of(target.repo_id), results
    ), existing


def _read_origins(
    api: HfApi, publication: Publication, is_private: bool, foreseen: Collection[str]
) -> card.Origins:
    """Return what the cards of the inputs say. Raises HubError for a private input of a public
    work.
    """
    base = next(iter(publication.inputs), None)  # a base has no inputs
    idle = _unused_sources(publication.record)
    licences: dict[str, str | None] = {}
    base_models, datasets, languages = [], [], []
    for text in publication.inputs:
        ref = Reference(text)
        if ref.package is not None:
            licences[text] = None
            continue
        is_merged = text != publication.lender and text not in idle
        if is_merged:
            base_models.append(ref.repo[0])
        if text in foreseen:
            continue
        there = describe_input(api, ref)
        if there.private and not is_private:
            raise HubError(
                f"{text}: is private, so others could not build a public {publication.kind}. Push "
                "with --private, or make the input public."
            )
        licences[text] = licence_of(there)
        if text != base and is_merged:  # the card of the base says what the base was made of
            datasets += values_in_card(there, "datasets")
            languages += values_in_card(there, "language")
    return card.Origins(licences, tuple(base_models), tuple(datasets), tuple(languages))


def _unused_sources(record: VectorFile | Recipe | BaseModel) -> set[str]:
    """Return the references of the vectors with weight 0, which a merge does not contain."""
    if not isinstance(record, Recipe):
        return set()
    vectors = record.vectors.values()
    return {vector.source for vector in vectors if not vector.is_used}


def _choose_licence(
    repo_id: str, existing: str | None, origins: card.Origins, given: str | None
) -> str:
    """Return the licence that was given, or that of the card on the Hub, or the strictest of the
    inputs.
    """
    strictest = card.strictest_licence(origins.licences)
    stays = card.split_card(existing or "")[0].get("license")
    chosen = given or stays or strictest
    if not chosen:
        listed = ", ".join(f"{name}: {known or '?'}" for name, known in origins.licences.items())
        raise HubError(
            f"{repo_id}: the inputs do not determine the licence{f' ({listed})' * bool(listed)}. "
            "Give it: --license apache-2.0, gemma, ..."
        )
    if strictest is not None and str(chosen).lower() != strictest:
        where = "--license" if given else "its card"
        logger.warning(
            "%s: %s says %s, but its inputs are under %s", repo_id, where, chosen, strictest
        )
    return str(chosen)


def _name_of(repo_id: str) -> str:
    """Return the name of a repository without its owner."""
    return repo_id.rpartition("/")[2]


def _sealed_results(recipe: Recipe) -> list[EvalResult]:
    sealed = recipe.scores.get("sealed")
    if sealed is None:
        return []
    return card.evaluations(sealed.terms, recipe.metrics, sealed.higher_is_better)


def _render_card(
    repo_id: str, publication: Publication, metadata: Mapping[str, Any], existing: str | None
) -> str:
    facts = card.Facts(
        title=_name_of(repo_id),
        repo_id=repo_id,
        is_model=publication.kind == "model",
        subject=_subject_of(publication),
        figures=_figures_in_card(publication),
        verdict=_captions(publication).verdict if CAPTIONS in publication.files else "",
        has_report=REPORT in publication.files,
    )
    return card.render(metadata, facts, existing)


def _subject_of(publication: Publication) -> VectorFile | card.BaseFacts | card.RecipeFacts:
    record = publication.record
    if isinstance(record, BaseModel):
        return card.BaseFacts(record.recipe)
    if isinstance(record, VectorFile):
        return record
    return card.recipe_facts(
        record,
        publication.text("recipe.yaml").strip(),
        list(_merge_configs(publication)),
        publication.results,
    )


def _merge_configs(publication: Publication) -> Iterator[card.MergeConfig]:
    """Yield the configs for mergekit in a repository, with the commands that run them once it was
    pulled into `merge`.
    """
    if text := publication.text(MERGE_CONFIG).strip():
        title = "Merge config for mergekit with optimer-hf installed"
        yield card.MergeConfig(title, f"optimer merge merge/{MERGE_CONFIG} merged", text)
    if text := publication.text(VANILLA_CONFIG).strip():
        config = parse_yaml(text, VANILLA_CONFIG)
        command = mergekit_command(config, f"merge/{VANILLA_CONFIG}", out="merged")
        yield card.MergeConfig("Merge config for mergekit alone", command, text)


def _captions(publication: Publication) -> Captions:
    return Captions.model_validate_json(publication.text(CAPTIONS))


def _figures_in_card(publication: Publication) -> list[card.Picture]:
    """Return the figures for the card, in the order of the card."""
    if CAPTIONS not in publication.files:
        return []
    texts = _captions(publication).captions
    return [
        card.Picture(
            light_file(name),
            dark_file(name) if dark_file(name) in publication.files else None,
            texts[name],
        )
        for name in CARD_FIGURES
        if name in texts and light_file(name) in publication.files
    ]


# -- the commit ------------------------------------------------------------------------------------


def _commit(
    target: _Repository, publication: Publication, options: _Options, foreseen: Collection[str] = ()
) -> Push:
    """Send what the branch lacks in one commit on its head. Starts again if the head has moved."""
    for _ in range(TRIES):
        info = target.fetch_info() if options.dry_run else target.create_if_missing(options.private)
        text = _render_card(
            target.repo_id,
            publication,
            *_card_metadata(target, info, publication, options, foreseen),
        )
        files = {**publication.files, CARD: text.encode()}
        there = target.list_files(info.sha) if info is not None and info.sha is not None else {}
        done, operations = _changes(target.repo_id, publication.kind, files, there)
        uses = tuple(describe_uses(publication, target.repo_id))
        done = replace(done, card=text, url=target.url, readers=uses)
        if options.dry_run or info is None:
            unchecked = tuple(_unchecked(target, publication, foreseen, options.licence))
            return replace(done, unchecked=unchecked)
        if not options.create_pr:
            target.create_branch_if_missing()
        _refuse_moved_tag(target, options.tag, bool(operations), info.sha)
        if not operations:
            return _set_tag(target, options.tag, replace(done, commit=info.sha))
        if options.create_pr:
            proposed = _find_proposal(target, publication.kind, files, done)
            if proposed is not None:
                return proposed
        message = (
            options.message or f"Upload {publication.kind} {publication.record.name} (optimer-hf)"
        )
        sent = _send(target, operations, message, info.sha, options.create_pr)
        if sent is not None:
            done = replace(done, commit=sent.oid, pull_request=sent.pr_url)
            return _set_tag(target, options.tag, done)
    raise HubError(
        f"{target.repo_id}: others changed {target.branch} {TRIES} times during this push. Nothing "
        "is lost; push again."
    )


def _send(
    target: _Repository, operations: list[Any], message: str, parent: str | None, create_pr: bool
) -> CommitInfo | None:
    """Return the commit, or None if somebody else was faster."""
    request = partial(
        target.api.create_commit,
        target.repo_id,
        operations,
        commit_message=message,
        revision=target.branch,
        parent_commit=parent,
        create_pr=create_pr or None,
    )
    try:
        return request() if create_pr else retry(request)  # a second pull request would stay
    except HfHubHTTPError as error:
        if error.response.status_code != 412:
            raise
        logger.warning(
            "%s: somebody else has pushed to %s; starting again", target.repo_id, target.branch
        )
        return None


def _changes(
    repo_id: str, kind: Kind, files: Mapping[str, Path | bytes], there: Mapping[str, RepoFile]
) -> tuple[Push, list[CommitOperationAdd | CommitOperationDelete]]:
    """Return what differs from the head of a branch, and the operations that make it the same."""
    changed = {name: data for name, data in files.items() if not is_same(data, there.get(name))}
    stale = [
        name
        for name in there
        if name not in files and is_allowed(kind, name) and not is_legal(name)
    ]
    n_changes = len(changed) + len(stale)
    if n_changes > MOST_FILES:
        raise HubError(
            f"{repo_id}: {n_changes} files have changed, expected at most {MOST_FILES} in one "
            "commit. Write larger shards (--max-shard-size)."
        )
    additions = [CommitOperationAdd(name, data) for name, data in changed.items()]
    deletions = [CommitOperationDelete(name) for name in stale]
    done = Push(
        repo_id,
        kind,
        {name: n_bytes_of(data) for name, data in changed.items()},
        tuple(name for name in files if name not in changed),
        tuple(stale),
        card="",
    )
    return done, [*additions, *deletions]


def _find_proposal(
    target: _Repository, kind: Kind, files: Mapping[str, Path | bytes], done: Push
) -> Push | None:
    """Return the open pull request that already contains these files, or None."""
    proposals = retry(
        lambda: list(
            target.api.get_repo_discussions(
                target.repo_id, discussion_type="pull_request", discussion_status="open"
            )
        )
    )
    for proposal in proposals:
        if proposal.git_reference is None:
            continue
        there = target.list_files(proposal.git_reference)
        if not _changes(target.repo_id, kind, files, there)[1]:
            head = replace(target, revision=proposal.git_reference).fetch_info()
            nothing = replace(done, sent={}, deleted=(), unchanged=tuple(files))
            commit = head.sha if head is not None else None
            return replace(nothing, commit=commit, pull_request=proposal.url)
    return None


def _refuse_moved_tag(
    target: _Repository, tag: str | None, changes: bool, head: str | None
) -> None:
    if tag is None:
        return
    refs = retry(partial(target.api.list_repo_refs, target.repo_id))
    there = {ref.name: ref.target_commit for ref in refs.tags}.get(tag)
    if there is not None and (changes or there != head):
        raise HubError(
            f"{target.repo_id}: tag {tag!r} is already at {there}, and a push does not move tags. "
            "Give another tag."
        )


def _set_tag(target: _Repository, tag: str | None, done: Push) -> Push:
    if tag is not None and done.commit is not None:
        retry(
            lambda: target.api.create_tag(
                target.repo_id, tag=tag, revision=done.commit, exist_ok=True
            )
        )
    return done
