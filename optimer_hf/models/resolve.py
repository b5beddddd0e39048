"""Resolve a reference to a directory with config.json, safetensors weights and a tokenizer."""

from pathlib import Path
from typing import Any

from optimer_hf.errors import ModelError
from optimer_hf.files.paths import cache_dir
from optimer_hf.files.reference import AnyPath, Reference, is_there, reference_from_here
from optimer_hf.files.staging import is_half_filled
from optimer_hf.models.hub_answers import checking_answers
from optimer_hf.models.layout import (
    ANY_WEIGHTS,
    FETCHED,
    INDEX,
    PENDING,
    RUNNABLE,
    ResolvedModel,
    has_tokenizer,
    is_delta,
    missing_shards,
    patterns,
    refuse_pickled,
    weight_names,
)
from optimer_hf.models.loader import refuse_code
from optimer_hf.models.packages import packaged_gguf

AnyModel = AnyPath | ResolvedModel  # a model as a caller in Python gives it


def model_from_here(given: AnyModel) -> ResolvedModel:
    """Return a model, an adapter or a vector that a caller names, see `resolve_model`."""
    if isinstance(given, ResolvedModel):
        return given
    return resolve_model(reference_from_here(given))


def vector_reference(given: AnyModel) -> str:
    """Return the reference of a vector that a caller names, for `open_vector`."""
    return str(given.path) if isinstance(given, ResolvedModel) else reference_from_here(given)


def base_from_here(given: AnyModel) -> ResolvedModel:
    """Return a base that a caller names, see `resolve_base`."""
    if isinstance(given, ResolvedModel):
        return given
    return resolve_base(reference_from_here(given))


def resolve_model(text: str, *, may_run_code: bool = False) -> ResolvedModel:
    """Return the local directory of a model, adapter or vector; fetch or convert it if necessary.

    Raises ModelError if the reference leads nowhere, or if the model's configs name code to run
    (unless `may_run_code`, for mergekit).
    """
    resolved = _resolve(text, may_run_code=may_run_code)
    if not may_run_code:
        refuse_code(resolved.path)
    return resolved


def _resolve(text: str, *, may_run_code: bool) -> ResolvedModel:
    ref = Reference(text)
    if ref.package is not None:
        return ResolvedModel(_convert(packaged_gguf(ref.package, cache_dir() / "gguf")), text)
    if ref.path is None:
        return _fetch(ref, may_run_code=may_run_code)
    if not is_there(ref.path):
        raise ModelError(f"{text}: no such file or directory, nor a Hub id of the form org/name.")
    if ref.path.is_dir():
        _refuse_half_moved(ref.path)
        return ResolvedModel(ref.path, ref.path.name)
    if ref.path.suffix == ".gguf":
        return ResolvedModel(_convert(ref.path), ref.path.name)
    raise ModelError(
        f"{text}: expected a directory, a GGUF file or a Hub id, found a "
        f"{ref.path.suffix or 'plain'} file."
    )


def _convert(gguf: Path) -> Path:
    from optimer_hf.models.gguf_conversion import convert_once  # imports torch

    return convert_once(gguf)


def _refuse_half_moved(path: Path) -> None:
    """Refuse a directory with files from two states, since a move into place was stopped."""
    if (path / PENDING / "hub.json").exists():
        raise ModelError(
            f"{path}: an update was stopped half-way, so its files are from two commits. Finish "
            f"it: `optimer pull REPO {path} --update`."
        )
    if is_half_filled(path):
        raise ModelError(
            f"{path}: was stopped while it was moved into place. Run the command that wrote it "
            "again."
        )


def resolve_tokenizer(text: str) -> ResolvedModel:
    """Return the local directory of a model's tokenizer; from the Hub, fetch no weights."""
    ref = Reference(text)
    if ref.path is not None or ref.package is not None:
        return resolve_model(text)
    resolved = _fetch(ref, with_weights=False)
    refuse_code(resolved.path)
    return resolved


def resolve_base(text: str) -> ResolvedModel:
    """Return the local directory of a model to train from, merge into and evaluate.

    Raises ModelError if it has no config or tokenizer, or if it is a delta and not a model.
    """
    resolved = resolve_model(text)
    refuse_other_than_models(resolved)
    if not has_tokenizer(resolved.path):
        cached = f" in the cache at commit {resolved.commit}" if resolved.commit else ""
        raise ModelError(
            f"{text}: has no tokenizer{cached}. Save the model's tokenizer in the same directory"
            f"{', or fetch the rest of the repository' if cached else ''}."
        )
    return resolved


def refuse_other_than_models(resolved: ResolvedModel) -> None:
    """Raise ModelError for an adapter, a delta, or a directory without a config."""
    path, text = resolved.path, resolved.reference
    if (path / "adapter_config.json").exists():
        if (path / "model.safetensors").exists() or (path / f"model{INDEX}").exists():
            raise ModelError(
                f"{text}: has an adapter_config.json beside the weights of a whole model, and "
                "transformers would put that adapter on top. Take the files of the adapter out of "
                "the directory."
            )
        raise ModelError(f"{text}: is an adapter, not a model. Merge it into its base first.")
    if not (path / "config.json").exists():
        raise ModelError(f"{text}: not a model directory (it has no config.json).")
    if is_delta(path):
        raise ModelError(f"{text}: is a delta, not a model. Merge it into its base first.")


def fetch_snapshot(
    ref: Reference,
    *,
    with_weights: bool = True,
    local_files_only: bool = False,
    may_run_code: bool = False,
) -> Path:
    """Return the cached files of a Hub model, and fetch missing ones.

    Only weights files that are read are fetched. Files in the cache at a commit are not requested
    again. Raises the errors of huggingface_hub, and LocalEntryNotFoundError if the cache lacks a
    file and `local_files_only` is set.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    repo_id, revision = ref.repo

    def fetch(**chosen: Any) -> str:
        with checking_answers():
            return str(snapshot_download(repo_id, local_files_only=local_files_only, **chosen))

    beside = {"allow_patterns": patterns(*FETCHED), "ignore_patterns": patterns(*RUNNABLE)}
    path = Path(fetch(revision=revision, **beside))
    if with_weights:
        if not may_run_code:
            refuse_code(path)  # before gigabytes are fetched
        # always include config.json: the client warns if no file matches
        if not (path / "adapter_config.json").exists():
            fetch(revision=path.name, allow_patterns=["model.safetensors", "config.json"])
            wanted = weight_names(path)
        else:
            wanted = [ANY_WEIGHTS]
        if wanted != ["model.safetensors"]:
            fetch(
                revision=path.name,
                allow_patterns=[*wanted, "config.json"],
                ignore_patterns="*/*",  # conversions for other programs
            )
    lacking = missing_files(path, with_weights=with_weights)
    if lacking and local_files_only:
        raise LocalEntryNotFoundError(f"the cache lacks {', '.join(lacking)}")
    return path


def missing_files(path: Path, *, with_weights: bool = True) -> list[str]:
    """Return the files that a model, adapter or vector lacks in a cached snapshot.

    Links whose files have been deleted count as missing.
    """
    lacking = sorted(
        file.name for file in path.iterdir() if file.is_symlink() and not file.exists()
    )
    if not with_weights:
        return lacking or ([] if has_tokenizer(path) else ["tokenizer.json"])
    if (path / "adapter_config.json").exists():
        weights = "adapter_model.safetensors"
    elif is_delta(path):
        weights = "vector.safetensors"
    else:
        weights = "model.safetensors"
        lacking += [] if (path / "config.json").exists() else ["config.json"]
    indices = list(path.glob(f"*{INDEX}"))
    if not any(file.is_file() for file in path.glob(ANY_WEIGHTS)) and not indices:
        lacking.append(weights)
    if not (path / weights).is_file():
        lacking += [file for index in indices if index.is_file() for file in missing_shards(index)]
    return sorted(set(lacking))


def _fetch(
    ref: Reference, *, with_weights: bool = True, may_run_code: bool = False
) -> ResolvedModel:
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        path = fetch_snapshot(ref, with_weights=with_weights, may_run_code=may_run_code)
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        reason = str(error).strip().splitlines()[0]
        if isinstance(error, LocalEntryNotFoundError):
            reason = f"it is not in the cache, and {_why_offline()}."
        raise ModelError(
            f"{ref.text}: cannot be fetched from the Hub ({reason}) Check the name and revision, "
            "log in with `hf auth login`, or give a local directory."
        ) from error
    _refuse_incomplete(ref, path, with_weights=with_weights)
    return ResolvedModel(path, ref.repo[0], path.name)


def _why_offline() -> str:
    from huggingface_hub import constants

    return "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the Hub cannot be reached"


def _refuse_incomplete(ref: Reference, path: Path, *, with_weights: bool) -> None:
    """Raise ModelError if a snapshot lacks files because its download was interrupted."""
    lacking = missing_files(path, with_weights=with_weights)
    if not lacking:
        return
    repo_id = ref.repo[0]
    on_hub = _names_on_hub(repo_id, path.name)
    names = [*on_hub, *(file.name for file in path.iterdir())]
    if with_weights and not any(name.endswith(".safetensors") for name in names):
        refuse_pickled(ref.text, sorted(names))
    if on_hub:  # a file that the repository also lacks is reported where it is needed
        lacking = [name for name in lacking if name in on_hub]
    if not lacking:
        return
    files = ", ".join(lacking[:5]) + (" ..." if lacking[5:] else "")
    raise ModelError(
        f"{ref.text}: the copy of {repo_id} at commit {path.name} in the cache is incomplete: it "
        f"lacks {files}, and {_why_offline()}. Run `hf download {repo_id} --revision {path.name}` "
        "with access to the Hub, or give a local directory."
    )


def _names_on_hub(repo_id: str, commit: str) -> list[str]:
    """Return the files in a repository, or an empty list if the Hub cannot be reached."""
    from httpx2 import HTTPError
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        return sorted(HfApi().list_repo_files(repo_id, revision=commit))
    except (HTTPError, HfHubHTTPError, OfflineModeIsEnabled):
        return []
