"""Git-backed repository store: real commits through `git fast-import`, one bare repo per Hub repo."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

LFS_EXT = [
    "7z",
    "arrow",
    "avro",
    "bin",
    "bin.*",
    "bz2",
    "ckpt",
    "ftz",
    "gguf",
    "gz",
    "h5",
    "joblib",
    "lz4",
    "mds",
    "mlmodel",
    "model",
    "msgpack",
    "npy",
    "npz",
    "onnx",
    "ot",
    "parquet",
    "pb",
    "pickle",
    "pkl",
    "pt",
    "pth",
    "rar",
    "safetensors",
    "tar",
    "tar.*",
    "tflite",
    "tgz",
    "wasm",
    "xz",
    "zip",
    "zst",
    "*tfevents*",
]
GITATTRIBUTES = (
    "".join(
        f"{'*' if e.startswith('*') else '*.'}{e.lstrip('*') if not e.startswith('*') else e[1:]} filter=lfs diff=lfs merge=lfs -text\n"
        for e in LFS_EXT
    )
    + "saved_model/**/* filter=lfs diff=lfs merge=lfs -text\n"
)
REGULAR_MAX = 10 * 1024 * 1024
POINTER_RE = re.compile(
    rb"\Aversion https://git-lfs\.github\.com/spec/v1\noid sha256:([0-9a-f]{64})\nsize (\d+)\n"
)
SHA_RE = re.compile(r"[0-9a-f]{7,40}")
TYPES = ("model", "dataset", "space", "kernel")


class HubError(Exception):
    def __init__(self, status, message, code=None, headers=None, body=None):
        super().__init__(message)
        self.status, self.message, self.code = status, message, code
        self.headers, self.body = headers or {}, body


def lfs_pointer(oid: str, size: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {size}\n".encode()


def now() -> str:
    return (
        time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime())
        + f".{int(time.time() * 1000) % 1000:03d}Z"
    )


@dataclass
class Entry:
    path: str
    kind: str  # blob | tree
    oid: str
    size: int
    lfs: tuple[str, int, int] | None = None  # sha256, size, pointer size


@dataclass
class Repo:
    type: str
    id: str
    path: Path
    meta: dict
    lock: threading.RLock = field(default_factory=threading.RLock)
    _ptr: dict = field(default_factory=dict)

    # ---- plumbing
    def git(self, *args, input=None, check=True, env=None) -> bytes:
        p = subprocess.run(
            ["git", "-C", str(self.path), *args],
            input=input,
            capture_output=True,
            env={
                **os.environ,
                "GIT_CONFIG_NOSYSTEM": "1",
                "GIT_CONFIG_GLOBAL": "/dev/null",
                **(env or {}),
            },
        )
        if check and p.returncode:
            raise HubError(500, f"git {args[0]}: {p.stderr.decode()[:400]}")
        return p.stdout if check else (p.stdout if not p.returncode else b"")

    def save(self):
        tmp = self.path / "hub-meta.json.tmp"
        tmp.write_text(json.dumps(self.meta))
        os.replace(tmp, self.path / "hub-meta.json")

    # ---- revisions
    def ref_of(self, rev: str) -> str | None:
        cands = [rev] if rev.startswith("refs/") else [f"refs/heads/{rev}", f"refs/tags/{rev}"]
        for ref in cands:
            if self.git("rev-parse", "--verify", "-q", f"{ref}^{{commit}}", check=False):
                return ref
        return None

    def resolve(self, rev: str, branch_only=False) -> str:
        ref = self.ref_of(rev)
        if ref and branch_only and not ref.startswith(("refs/heads/", "refs/pr/")):
            ref = None
        target = ref or (rev if SHA_RE.fullmatch(rev) and not branch_only else None)
        if target and not target.startswith("-"):
            out = (
                self.git("rev-parse", "--verify", "-q", f"{target}^{{commit}}", check=False)
                .decode()
                .strip()
            )
            if out:
                return out
        raise HubError(404, f"Invalid rev id: {rev}", "RevisionNotFound")

    def refs(self, prs=False) -> dict:
        out = {"branches": [], "converts": [], "tags": [], "pullRequests": []}
        fmt = "%(refname)%09%(objectname)%09%(*objectname)"
        for line in self.git("for-each-ref", f"--format={fmt}").decode().splitlines():
            ref, oid, peeled = (line + "\t\t").split("\t")[:3]
            for prefix, key in (
                ("refs/heads/", "branches"),
                ("refs/tags/", "tags"),
                ("refs/pr/", "pullRequests"),
                ("refs/convert/", "converts"),
            ):
                if ref.startswith(prefix):
                    name = ref[len(prefix) :] if key != "pullRequests" else ref
                    out[key].append({"name": name, "ref": ref, "targetCommit": peeled or oid})
        if not prs:
            out.pop("pullRequests")
        out["branches"].sort(key=lambda b: b["name"] != "main")
        return out

    # ---- trees
    def pointer(self, oid: str, size: int):
        if size > 1024 or size < 100:
            return None
        if oid not in self._ptr:
            m = POINTER_RE.match(self.git("cat-file", "blob", oid))
            self._ptr[oid] = (m[1].decode(), int(m[2]), size) if m else None
        return self._ptr[oid]

    def tree(self, commit: str, path: str = "", recursive=False) -> list[Entry]:
        args = ["ls-tree", "-l", "-z"] + (["-r", "-t"] if recursive else [])
        if path:
            typ = self.git("cat-file", "-t", f"{commit}:{path}", check=False).decode().strip()
            if not typ:
                raise HubError(404, f'{path} does not exist on "{commit}"', "EntryNotFound")
            if typ != "tree":
                raise HubError(404, f"{path} is not a directory", "EntryNotFound")
            args += [f"{commit}:{path}"]
        else:
            args += [commit]
        out = []
        for rec in self.git(*args).split(b"\0"):
            if not rec:
                continue
            head, name = rec.split(b"\t", 1)
            _mode, typ, oid, size = head.decode().split()
            full = f"{path}/{name.decode()}" if path else name.decode()
            if typ == "blob":
                out.append(Entry(full, typ, oid, int(size), self.pointer(oid, int(size))))
            elif typ == "tree":
                out.append(Entry(full, typ, oid, 0))
        return out

    def stat(self, commit: str, path: str) -> Entry | None:
        line = self.git(
            "ls-tree", "-l", "-z", "--full-tree", commit, "--", f":(literal){path}", check=False
        )
        line = (
            self.git("ls-tree", "-l", "-z", commit, "--", path, check=False) if not line else line
        )
        if not line:
            return None
        head, name = line.rstrip(b"\0").split(b"\0")[0].split(b"\t", 1)
        _m, typ, oid, size = head.decode().split()
        if typ == "blob":
            return Entry(name.decode(), typ, oid, int(size), self.pointer(oid, int(size)))
        return Entry(name.decode(), typ, oid, 0)

    def blob(self, oid: str) -> bytes:
        return self.git("cat-file", "blob", oid)

    def read(self, commit: str, path: str) -> bytes | None:
        e = self.stat(commit, path)
        return self.blob(e.oid) if e and e.kind == "blob" and not e.lfs else None

    def is_lfs_path(self, commit: str, path: str, _cache={}) -> bool:
        key = (str(self.path), commit)
        if key not in _cache:
            _cache.clear()
            txt = (self.read(commit, ".gitattributes") or b"").decode()
            _cache[key] = [
                (ln.split()[0], "filter=lfs" in ln.split()[1:])
                for ln in txt.splitlines()
                if ln.strip() and not ln.startswith("#")
            ]
        hit = False
        for pat, lfs in _cache[key]:
            target = path if "/" in pat else path.rsplit("/", 1)[-1]
            if fnmatch.fnmatchcase(target, pat.replace("**/", "*")):
                hit = lfs
        return hit

    # ---- commits
    def commit(
        self, ref: str, base: str | None, ops: list, summary: str, description: str, user: str
    ) -> str:
        """ops: ("add", path, bytes) | ("del", path). One `git fast-import` transaction; returns the new oid."""
        who = f"{user} <{user}@users.noreply.huggingface.co> {int(time.time())} +0000"
        msg = (summary + ("\n\n" + description if description else "")).encode()
        buf = [
            b"feature done\n",
            f"commit {ref}\nauthor {who}\ncommitter {who}\ndata {len(msg)}\n".encode(),
            msg,
            b"\n",
        ]
        if base:
            buf.append(f"from {base}\n".encode())

        def q(p):
            return (
                '"' + p.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
            ).encode()

        for op in ops:
            if op[0] == "del":
                buf.append(b"D " + q(op[1]) + b"\n")
            else:
                buf.append(
                    b"M 100644 inline " + q(op[1]) + b"\ndata %d\n" % len(op[2]) + op[2] + b"\n"
                )
        buf.append(b"\ndone\n")
        self.git("fast-import", "--quiet", "--done", "--force", input=b"".join(buf))
        return self.git("rev-parse", ref).decode().strip()

    def log(self, rev: str) -> list[dict]:
        out = self.git("log", "-z", "--format=%H%x01%an%x01%aI%x01%s%x01%b", rev).decode()
        rows = []
        for rec in out.split("\0"):
            if rec.strip():
                h, an, ad, s, b = rec.lstrip("\n").split("\x01")
                rows.append(
                    {
                        "id": h,
                        "title": s,
                        "message": b.strip(),
                        "date": ad,
                        "authors": [{"user": an, "avatar": ""}],
                    }
                )
        return rows


class Store:
    def __init__(self, root: Path):
        self.root = Path(root)
        self.repos: dict[tuple[str, str], Repo] = {}
        self.lfs = self.root / "lfs"
        self.lfs.mkdir(parents=True, exist_ok=True)
        self.lock = threading.RLock()
        self.moved: dict[tuple[str, str], str] = {}
        for meta in self.root.glob("repos/*/*/*.git/hub-meta.json"):
            m = json.loads(meta.read_text())
            self.repos[(m["type"], m["id"].lower())] = Repo(m["type"], m["id"], meta.parent, m)

    def get(self, typ: str, rid: str) -> Repo | None:
        key = (typ, rid.lower())
        return self.repos.get(key) or self.repos.get((typ, self.moved.get(key, "").lower()))

    def create(
        self, typ: str, rid: str, private: bool, user: str, extra: dict | None = None
    ) -> Repo:
        path = self.root / "repos" / f"{typ}s" / f"{rid}.git"
        path.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["git", "init", "-q", "--bare", "-b", "main", str(path)], check=True)
        subprocess.run(["git", "-C", str(path), "config", "http.receivepack", "true"], check=True)
        repo = Repo(
            typ,
            rid,
            path,
            {
                "type": typ,
                "id": rid,
                "private": private,
                "gated": False,
                "createdAt": now(),
                "downloads": 0,
                "likes": 0,
                "discussions": [],
                **(extra or {}),
            },
        )
        repo.commit(
            "refs/heads/main",
            None,
            [("add", ".gitattributes", GITATTRIBUTES.encode())],
            "initial commit",
            "",
            user,
        )
        repo.save()
        self.repos[(typ, rid.lower())] = repo
        return repo

    def delete(self, repo: Repo):
        self.repos.pop((repo.type, repo.id.lower()))
        shutil.rmtree(repo.path)

    def move(self, repo: Repo, new_id: str):
        new = self.root / "repos" / f"{repo.type}s" / f"{new_id}.git"
        new.parent.mkdir(parents=True, exist_ok=True)
        repo.path.rename(new)
        self.repos.pop((repo.type, repo.id.lower()))
        self.moved[(repo.type, repo.id.lower())] = new_id
        repo.path, repo.id = new, new_id
        repo.meta["id"] = new_id
        repo.save()
        self.repos[(repo.type, new_id.lower())] = repo

    # ---- LFS objects (content addressed by sha256)
    def lfs_path(self, oid: str) -> Path:
        return self.lfs / oid[:2] / oid[2:4] / oid

    def lfs_put(self, oid: str, tmp: Path):
        """Verify sha256 and move into place."""
        h = hashlib.sha256()
        with open(tmp, "rb") as f:
            while b := f.read(1 << 20):
                h.update(b)
        if h.hexdigest() != oid:
            os.unlink(tmp)
            raise HubError(422, f"sha256 mismatch: expected {oid}, got {h.hexdigest()}")
        dst = self.lfs_path(oid)
        dst.parent.mkdir(parents=True, exist_ok=True)
        os.replace(tmp, dst)

    def tmpfile(self) -> Path:
        fd, p = tempfile.mkstemp(dir=self.lfs)
        os.close(fd)
        return Path(p)


def check_ignored(gitignore: str, paths: list[str]) -> set[str]:
    """Evaluate .gitignore rules with git itself."""
    if not gitignore.strip() or not paths:
        return set()
    with tempfile.TemporaryDirectory() as d:
        subprocess.run(["git", "init", "-q", d], check=True)
        (Path(d) / ".gitignore").write_text(gitignore)
        p = subprocess.run(
            ["git", "-C", d, "check-ignore", "--no-index", "-z", "--stdin"],
            input="\0".join(paths).encode(),
            capture_output=True,
        )
        return {x for x in p.stdout.decode().split("\0") if x}
