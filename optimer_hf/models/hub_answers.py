"""Check what a Hub answers before huggingface_hub trusts it.

The client turns the commit ids, etags and file names that a server sends into paths, and writes as
many bytes as arrive. A server that is broken, hostile or not a Hub at all (a captive portal) must
not write outside the cache, fill the disk, or cause a traceback. The checks use the client's own
hooks, so they cover every download, including those by transformers.
"""

import functools
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx2
from huggingface_hub import set_client_factory
from huggingface_hub.utils import _http

from optimer_hf.errors import HubError
from optimer_hf.files.reference import COMMIT
from optimer_hf.files.text import first_line

HASH = re.compile(r"[0-9a-f]{40}([0-9a-f]{24})?")
ETAG = re.compile(r"[\w.+=-]{1,200}")
FILE = re.compile(r"/resolve/[^/]+/(.+)")
LARGEST_ANSWER = 2**26  # bytes of JSON
SLACK = 2**10  # bytes by which a file may exceed its listed size
LIMIT = "optimer_limit"  # a request extension, which redirects inherit

_sizes: dict[tuple[str, str], int] = {}  # (path of a repository at the Hub, file) -> listed size


def guard_hub() -> None:
    """Check all Hub answers from now on, in every client that huggingface_hub creates."""
    plain = _http._GLOBAL_CLIENT_FACTORY
    if not isinstance(plain, functools.partial) or plain.func is not _guard:
        set_client_factory(functools.partial(_guard, plain))


@contextmanager
def checking_answers() -> Iterator[None]:
    """Guard the requests inside; turn the client's errors about invalid answers into HubErrors."""
    from huggingface_hub.errors import HFValidationError

    guard_hub()
    try:
        yield
    except HFValidationError:
        raise
    except (ValueError, TypeError, AssertionError, LookupError, AttributeError) as error:
        raise HubError(
            f"the Hub gave an unusable answer ({first_line(error)}). Check the network "
            "(a login page?) and HF_ENDPOINT."
        ) from error
    except RecursionError:
        raise HubError("the Hub gave an answer that is nested too deeply.") from None


def _guard(plain: Callable[[], httpx2.Client]) -> httpx2.Client:
    client = plain()
    hooks = client.event_hooks
    client.event_hooks = {
        "request": [*hooks["request"], _forbid_compression],
        "response": [*hooks["response"], _check_response],
    }
    return client


def _forbid_compression(request: httpx2.Request) -> None:
    """Request files without compression, since the size of a compressed answer is unknown."""
    if FILE.search(request.url.path):
        request.headers["Accept-Encoding"] = "identity"


def _check_response(response: httpx2.Response) -> None:
    """Raise HubError for an answer that must not reach the client."""
    request = response.request
    limits = request.extensions
    for name in ("x-repo-commit", "etag", "x-linked-etag"):
        value = response.headers.get(name)
        pattern = COMMIT if name == "x-repo-commit" else ETAG
        is_of_file = FILE.search(request.url.path) is not None
        if is_of_file and value is not None and not pattern.fullmatch(_plain_etag(value)):
            raise _unusable_answer(request, f"the header {name}: {value[:80]!r}")
    if "/api/" in request.url.path:
        limits.setdefault(LIMIT, LARGEST_ANSWER)
    elif (size := _listed_size(request.url.path)) is not None:
        limits.setdefault(LIMIT, size + SLACK)
        packed = response.headers.get("content-encoding", "identity")
        if packed != "identity" and response.is_success:
            raise _unusable_answer(request, f"a file compressed with {packed[:20]!r}")
    if LIMIT in limits and request.method == "GET":
        response.stream = _BoundedStream(response.stream, limits[LIMIT], request)
    if request.method == "GET" and "/api/models/" in request.url.path and response.is_success:
        _check_answer(request, response)


def _plain_etag(etag: str) -> str:
    return etag.removeprefix("W/").strip('"')


class _BoundedStream(httpx2.SyncByteStream):
    """A response stream that fails beyond `limit` bytes."""

    def __init__(self, stream: Any, limit: int, request: httpx2.Request) -> None:
        self._stream, self._limit, self._request = stream, limit, request

    def __iter__(self) -> Iterator[bytes]:
        n_bytes = 0
        for chunk in self._stream:
            n_bytes += len(chunk)
            if n_bytes > self._limit:
                raise _unusable_answer(
                    self._request, f"more than the {self._limit:,} bytes expected"
                )
            yield chunk

    def close(self) -> None:
        self._stream.close()


def _listed_size(path: str) -> int | None:
    file = FILE.search(path)
    if file is None:
        return None
    return _sizes.get((path[: file.start()].strip("/"), file[1]))


# -- descriptions and listings ---------------------------------------------------------------------


def _check_answer(request: httpx2.Request, response: httpx2.Response) -> None:
    """Check a repository's description or a page of its file list, and remember the file sizes."""
    try:
        answer = json.loads(response.read())
        repo = re.sub(
            r"/(revision|tree|resolve)/.*", "", request.url.path.partition("/api/models/")[2]
        )
        if "/tree/" in request.url.path:
            files = [(entry["path"], entry) for entry in answer if entry["type"] == "file"]
        elif isinstance(answer, dict) and "siblings" in answer:
            if not COMMIT.fullmatch(answer["sha"]):
                raise ValueError(f"the commit {answer['sha'][:80]!r}")
            files = [(entry["rfilename"], entry) for entry in answer["siblings"]]
        else:
            return
        for name, entry in files:
            _check_file(name, entry)
            if isinstance(entry.get("size"), int):
                _sizes[repo.strip("/"), name] = entry["size"]
    except HubError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _unusable_answer(request, f"{type(error).__name__}: {str(error)[:100]}") from None


def _check_file(name: Any, entry: Any) -> None:
    """Raise ValueError or TypeError for an impossible file entry."""
    parts = name.split("/")
    if not name or len(name) > 1000 or {"", ".", ".."} & {*parts} or "\\" in name or "\0" in name:
        raise ValueError(f"the file name {name[:80]!r}")
    size = entry.get("size")
    if size is not None and (not isinstance(size, int) or size < 0):
        raise ValueError(f"the size {size!r} of {name[:80]!r}")
    lfs = entry.get("lfs") or {}
    hashes = [entry.get("oid"), entry.get("blobId"), entry.get("xetHash"), lfs.get("oid")]
    for value in (*hashes, lfs.get("sha256")):
        if value is not None and not HASH.fullmatch(value.removeprefix("sha256:")):
            raise ValueError(f"the hash {value[:80]!r} of {name[:80]!r}")


def _unusable_answer(request: httpx2.Request, content: str) -> HubError:
    return HubError(
        f"{request.url.host}: found {content} in the answer to {request.url.path[:100]}, which a "
        "Hub would not send. Check the network (a login page?), HF_ENDPOINT and the repository."
    )
