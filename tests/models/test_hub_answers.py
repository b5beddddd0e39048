"""A Hub that lies: nothing is written outside the cache or without end, and one error says why."""

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import close_session, constants

from optimer_hf.errors import OptimerError
from optimer_hf.hub import pull
from optimer_hf.models.resolve import resolve_model

SHA = "a" * 40
CARD = b"# hello\n"
RECIPE = b"name: x\n"


def blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class EvilHub:
    """A Hub with one repository whose answers a test can replace."""

    def __init__(self) -> None:
        self.files = {"README.md": CARD, "recipe.yaml": RECIPE, "config.json": b"{}"}
        self.sha: object = SHA
        self.info: Callable[[dict], object] = lambda info: info
        self.tree: Callable[[list], object] = lambda tree: tree
        self.headers: dict[str, str] = {}
        self.endless = False
        self.n_sent = 0

    def answer(self, path: str) -> bytes | None:
        """Return the body of an API answer, or None for a file."""
        if "/tree/" in path:
            entries = [
                {"type": "file", "path": name, "size": len(data), "oid": blob(data)}
                for name, data in self.files.items()
            ]
            return self._as_bytes(self.tree(entries))
        if path.startswith("/api/models/"):
            siblings = [
                {"rfilename": name, "size": len(data), "blobId": blob(data)}
                for name, data in self.files.items()
            ]
            info = {"id": "org/evil", "modelId": "org/evil", "sha": self.sha, "siblings": siblings}
            info |= {"private": False, "downloads": 0, "tags": [], "likes": 0}
            return self._as_bytes(self.info(info))
        return None

    @staticmethod
    def _as_bytes(answer: object) -> bytes:
        return answer if isinstance(answer, bytes) else json.dumps(answer).encode()


@pytest.fixture
def evil(monkeypatch, tmp_path) -> Iterator[EvilHub]:
    hub = EvilHub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            body = hub.answer(self.path)
            name = self.path.rpartition("/")[2].partition("?")[0]
            data = body if body is not None else hub.files.get(name, b"")
            self.send_response(200)
            if body is None:
                headers = {"ETag": f'"{blob(data)}"', "X-Repo-Commit": SHA} | hub.headers
                for key, value in headers.items():
                    self.send_header(key, value)
            is_endless = hub.endless and body is None and self.command == "GET"
            self.send_header("Connection", "close")
            if not is_endless:
                self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command == "HEAD":
                return
            self.wfile.write(data)
            try:
                while is_endless and hub.n_sent < 200 * 2**20:
                    hub.n_sent += self.wfile.write(b"x" * 65536)
            except OSError:
                pass

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "deep" / "er" / "cache"))
    monkeypatch.setattr("optimer_hf.hub.client.TRIES", 1)
    close_session()
    yield hub
    close_session()
    server.shutdown()
    server.server_close()


def files_outside(tmp_path: Path) -> list[Path]:
    cache = tmp_path / "deep" / "er" / "cache"
    return [p for p in tmp_path.rglob("*") if p.is_file() and not p.is_relative_to(cache)]


DEEP = b'{"siblings":' + b"[" * 100_000
LIES: list[tuple[str, Callable[[EvilHub], object]]] = [
    ("sha", lambda hub: setattr(hub, "sha", "../../../../evilcommit")),
    ("sha", lambda hub: setattr(hub, "sha", "/tmp/optimer-evil")),
    ("sha", lambda hub: setattr(hub, "sha", None)),
    ("sha", lambda hub: setattr(hub, "sha", 17)),
    ("sha", lambda hub: setattr(hub, "sha", "A" * 40)),
    ("info", lambda hub: setattr(hub, "info", lambda _: b"<html>Log in</html>")),
    ("info", lambda hub: setattr(hub, "info", lambda _: b"{broken")),
    ("info", lambda hub: setattr(hub, "info", lambda _: DEEP)),
    ("info", lambda hub: setattr(hub, "info", lambda _: [])),
    ("info", lambda hub: setattr(hub, "info", lambda info: info | {"siblings": 3})),
    ("info", lambda hub: setattr(hub, "info", lambda info: info | {"siblings": [3]})),
    ("info", lambda hub: setattr(hub, "info", lambda i: i | {"siblings": [{"rfilename": 3}]})),
    (
        "info",
        lambda hub: setattr(
            hub, "info", lambda i: i | {"siblings": [{"rfilename": "recipe.yaml", "size": "big"}]}
        ),
    ),
    (
        "info",
        lambda hub: setattr(
            hub, "info", lambda i: i | {"siblings": [{"rfilename": "../recipe.yaml", "size": 1}]}
        ),
    ),
    ("tree", lambda hub: setattr(hub, "tree", lambda _: {"a": 1})),
    ("tree", lambda hub: setattr(hub, "tree", lambda _: b"<html>")),
    (
        "tree",
        lambda hub: setattr(
            hub, "tree", lambda tree: [entry | {"oid": "../../../../../evil"} for entry in tree]
        ),
    ),
    (
        "tree",
        lambda hub: setattr(
            hub, "tree", lambda tree: [entry | {"path": "../../../x"} for entry in tree]
        ),
    ),
    ("tree", lambda hub: setattr(hub, "tree", lambda tree: [e | {"size": -1} for e in tree])),
    ("headers", lambda hub: hub.headers.update({"ETag": '"../../../../../evil"'})),
    ("headers", lambda hub: hub.headers.update({"X-Repo-Commit": "../../../../../evil"})),
]


@pytest.mark.parametrize("use", ["pull", "base"])
@pytest.mark.parametrize(("what", "lie"), LIES)
def test_a_false_answer_is_one_error_and_writes_nothing_outside_the_cache(
    evil, tmp_path, monkeypatch, use, what, lie
):
    lie(evil)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OptimerError) as error:
        if use == "pull":
            pull("org/evil", tmp_path / "out")
        else:
            resolve_model("org/evil")
    assert "\n" not in str(error.value).strip()
    assert "a Hub would not send" in str(error.value) or "an unusable answer" in str(error.value)
    assert files_outside(tmp_path) == []
    assert not Path("/tmp/optimer-evil.json").exists()


@pytest.mark.parametrize("use", ["pull", "base"])
def test_an_endless_file_is_cut_at_its_listed_size(evil, tmp_path, use):
    evil.endless = True
    with pytest.raises(OptimerError, match=r"more than the [\d,]+ bytes expected"):
        if use == "pull":
            pull("org/evil", tmp_path / "out")
        else:
            resolve_model("org/evil")
    written = sum(p.stat().st_size for p in tmp_path.rglob("*") if p.is_file())
    assert written < 2**20
    assert evil.n_sent < 64 * 2**20
