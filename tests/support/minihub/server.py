"""HTTP face of minihub (aiohttp). Routes, shapes and error headers follow huggingface_hub 2.4.0's client code."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import os
import re
import secrets
import struct
import threading
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote

import yaml
from aiohttp import web

from .cas import Cas
from .store import (
    REGULAR_MAX,
    TYPES,
    HubError,
    Repo,
    Store,
    check_ignored,
    lfs_pointer,
    now,
)

TYPE_OF = {f"{t}s": t for t in TYPES}
NAME_RE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
CHUNK = 1 << 20


@dataclass
class Fault:
    """Answer `status` to the next `times` requests whose 'METHOD /path' matches `pattern`."""

    pattern: str
    status: int = 500
    times: int = 1
    headers: dict = field(default_factory=dict)
    body: str = "injected fault"
    drop: bool = False  # close the connection instead of answering
    after_bytes: int | None = None  # for downloads: send this many bytes, then cut the line
    stall: float = 0.0  # ... or, with after_bytes, hang for this many seconds first


@dataclass
class Rec:
    method: str
    path: str
    query: str
    status: int
    auth: str | None
    headers: dict
    bytes_in: int = 0
    bytes_out: int = 0


class HubServer:
    """with HubServer(tmp_path) as hub: HF_ENDPOINT=hub.endpoint ..."""

    def __init__(
        self,
        root,
        *,
        host="127.0.0.1",
        port=0,
        cdn_host="localhost",
        xet=True,
        page=1000,
        multipart_over: int | None = None,
        redirect_small=True,
        users: dict | None = None,
    ):
        self.root = Path(root)
        self.store, self.cas = Store(self.root), Cas(self.root / "cas")
        self.host, self.port, self.cdn_host = host, port, cdn_host
        self.xet, self.page, self.multipart_over, self.redirect_small = (
            xet,
            page,
            multipart_over,
            redirect_small,
        )
        # token -> {"name", "fullname", "orgs": {org: role}, "groups": {org: {group: role}},
        # "role": "write"|"read"}
        self.tokens = users or {
            "hf_alice_write": {"name": "alice", "orgs": {"acme": "admin"}, "role": "write"},
            "hf_alice_read": {"name": "alice", "orgs": {"acme": "admin"}, "role": "read"},
            "hf_bob_write": {"name": "bob", "orgs": {}, "role": "write"},
        }
        self.key = secrets.token_bytes(16)
        self.faults: list[Fault] = []
        self.log: list[Rec] = []
        self.leaks: list[str] = []  # hub tokens seen on CDN / CAS requests
        self._uploads: dict[str, dict] = {}
        self._loop = self._thread = self._runner = None

    # ------------------------------------------------------------------ lifecycle
    @property
    def endpoint(self):
        return f"http://{self.host}:{self.port}"

    @property
    def cdn(self):
        return f"http://{self.cdn_host}:{self.port}"

    def __enter__(self):
        ready, err = threading.Event(), []

        def run():
            self._loop = asyncio.new_event_loop()
            asyncio.set_event_loop(self._loop)
            try:
                self._loop.run_until_complete(self._start())
            except Exception as e:
                err.append(e)
            ready.set()
            if not err:
                self._loop.run_forever()

        self._thread = threading.Thread(target=run, daemon=True, name="minihub")
        self._thread.start()
        ready.wait()
        if err:
            raise err[0]
        return self

    def __exit__(self, *a):
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)

    async def _start(self):
        app = web.Application(client_max_size=4 << 30)
        app.router.add_route("*", "/{tail:.*}", self.entry)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        site = web.TCPSite(self._runner, self.host, self.port)
        await site.start()
        self.port = site._server.sockets[0].getsockname()[1]
        if self.cdn_host == "localhost":  # the CDN is a *different origin* of the same process
            for fam_host in ("::1",):
                try:
                    await web.TCPSite(self._runner, fam_host, self.port).start()
                except OSError:
                    pass

    # ------------------------------------------------------------------ entry point
    def inject(self, pattern, status=500, times=1, **kw) -> Fault:
        f = Fault(pattern, status, times, **kw)
        self.faults.append(f)
        return f

    def calls(self, pattern) -> list[Rec]:
        return [r for r in self.log if re.search(pattern, f"{r.method} {r.path}")]

    async def entry(self, req: web.Request):
        raw = req.rel_url.raw_path
        segs = [unquote(s) for s in raw.strip("/").split("/")]
        rec = Rec(
            req.method,
            raw,
            req.rel_url.raw_query_string,
            0,
            req.headers.get("Authorization"),
            dict(req.headers),
        )
        self.log.append(rec)
        req["rec"], req["segs"] = rec, segs
        rid = (
            req.headers.get("X-Request-Id")
            or req.headers.get("X-Amzn-Trace-Id")
            or str(uuid.uuid4())
        )
        try:
            for f in list(self.faults):
                if re.search(f.pattern, f"{req.method} {raw}") and f.times > 0:
                    if f.after_bytes is not None:
                        req["cut"] = f
                        break
                    f.times -= 1
                    await req.read()
                    if f.drop:
                        req.transport.abort()
                        raise web.HTTPInternalServerError()
                    raise HubError(f.status, f.body, headers=f.headers)
            resp = await self.route(req, segs)
        except HubError as e:
            resp = self.error(e)
        except web.HTTPException as e:
            rec.status = e.status
            raise
        except (ValueError, KeyError, json.JSONDecodeError) as e:
            resp = self.error(HubError(400, f"{type(e).__name__}: {e}"))
        rec.status = resp.status
        if not resp.prepared:
            resp.headers.setdefault("X-Request-Id", rid)
        return resp

    @staticmethod
    def error(e: HubError):
        h = {"X-Error-Message": e.message.replace("\n", " ")[:1000], **e.headers}
        if e.code:
            h["X-Error-Code"] = e.code
        return web.json_response(e.body or {"error": e.message}, status=e.status, headers=h)

    # ------------------------------------------------------------------ auth
    def user(self, req, required=False):
        h = req.headers.get("Authorization")
        if h is None:
            if required:
                raise HubError(401, "Invalid username or password.")
            return None
        tok = h[7:] if h.startswith("Bearer ") else None
        if h.startswith("Basic "):  # git / git-lfs
            tok = base64.b64decode(h[6:]).decode().split(":", 1)[1]
        u = self.tokens.get(tok)
        if u is None:
            raise HubError(401, "Invalid credentials in Authorization header")
        return u

    @staticmethod
    def owns(u, ns):
        if not u or u["name"] == ns or ns not in u.get("orgs", {}):
            return bool(u) and u["name"] == ns
        roles = {u["orgs"][ns], *u.get("groups", {}).get(ns, {}).values()}
        return roles != {"read"}

    def repo(self, req, typ, rid, write=False) -> Repo:
        u = self.user(req)
        r = self.store.get(typ, rid)
        if r is None or (r.meta["private"] and not self.owns(u, r.id.split("/")[0])):
            raise HubError(401 if u is None else 404, "Repository not found", "RepoNotFound")
        if (
            r.meta.get("gated")
            and "resolve" in req["segs"]
            and not self.owns(u, r.id.split("/")[0])
        ):
            raise HubError(
                401 if u is None else 403,
                f"Access to model {r.id} is restricted and you are not in the authorized list.",
                "GatedRepo",
            )
        if write:
            if u is None:
                raise HubError(401, "Invalid username or password.")
            if u["role"] != "write":
                raise HubError(
                    403, "Forbidden: you must use a write token to upload to a repository."
                )
            if not self.owns(u, r.id.split("/")[0]):
                raise HubError(
                    403,
                    "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request",
                )
        return r

    def sign(self, *parts) -> str:
        return hmac.new(self.key, "\0".join(map(str, parts)).encode(), hashlib.sha256).hexdigest()[
            :32
        ]

    # ------------------------------------------------------------------ routing
    async def route(self, req, s):
        m = req.method
        if s[0] == "_cdn":
            return await self.cdn_get(req, s)
        if s[0] == "_lfs":
            return await self.lfs_io(req, s)
        if s[0] == "cas":
            return await self.cas_route(req, s[1:])
        if s[0] == "api":
            return await self.api(req, m, s[1:])
        # [datasets|spaces|kernels/]ns/name/...
        typ, rest = (TYPE_OF[s[0]], s[1:]) if s[0] in TYPE_OF and s[0] != "models" else ("model", s)
        if len(rest) >= 2 and rest[1].endswith(".git"):
            return await self.git_route(req, typ, f"{rest[0]}/{rest[1][:-4]}", rest[2:])
        if len(rest) >= 5 and rest[2] in ("resolve", "raw"):
            return await self.resolve(req, typ, f"{rest[0]}/{rest[1]}", rest[3], "/".join(rest[4:]))
        if len(rest) >= 4 and rest[1] == "resolve":
            return await self.resolve(req, typ, rest[0], rest[2], "/".join(rest[3:]))
        if len(rest) >= 3 and rest[2:4] == ["info", "refs"]:
            return await self.git_route(req, typ, f"{rest[0]}/{rest[1]}", rest[2:])
        if len(rest) == 3 and rest[2] in ("git-upload-pack", "git-receive-pack"):
            return await self.git_route(req, typ, f"{rest[0]}/{rest[1]}", rest[2:])
        raise HubError(404, "Sorry, we can't find the page you are looking for.")

    async def api(self, req, m, s):
        th = asyncio.to_thread
        head = s[0]
        if head == "whoami-v2":
            u = self.user(req, True)
            return web.json_response(
                {
                    "type": "user",
                    "id": u["name"],
                    "name": u["name"],
                    "fullname": u.get("fullname", u["name"].title()),
                    "isPro": False,
                    "orgs": [
                        {
                            "type": "org",
                            "id": o,
                            "name": o,
                            "fullname": u.get("org_names", {}).get(o, o),
                            "roleInOrg": r,
                            "resourceGroups": [
                                {"id": group, "name": group, "role": role}
                                for group, role in u.get("groups", {}).get(o, {}).items()
                            ],
                        }
                        for o, r in u.get("orgs", {}).items()
                    ],
                    "auth": {
                        "type": "access_token",
                        "accessToken": {"displayName": "minihub", "role": u["role"]},
                    },
                }
            )
        if head == "validate-yaml":
            return await self.validate_yaml(req)
        if head == "repos":
            return await self.repos_api(req, m, s[1])
        if head == "agent-harnesses":
            return web.json_response({"standardEnvVars": [], "harnesses": {}})
        if head == "resolve-cache":
            typ = TYPE_OF[s[1]]
            return await self.resolve(
                req, typ, f"{s[2]}/{s[3]}", s[4], "/".join(s[5:]), cached=True
            )
        if head not in TYPE_OF:
            raise HubError(404, "Not found")
        typ, s = TYPE_OF[head], s[1:]
        if not s or s == [""]:
            return await th(self.list_repos, req, typ)
        OPS = {
            "revision",
            "tree",
            "paths-info",
            "refs",
            "commits",
            "preupload",
            "commit",
            "branch",
            "tag",
            "discussions",
            "xet-read-token",
            "xet-write-token",
            "settings",
            "super-squash",
            "lfs-files",
            "auth-check",
            "resolve",
            "like",
        }
        if len(s) == 1 or (s[1] in OPS and len(s) > 1):  # canonical single-segment id
            rid, op, a = s[0], (s[1] if len(s) > 1 else ""), s[2:]
        else:
            rid, op, a = f"{s[0]}/{s[1]}", (s[2] if len(s) > 2 else ""), s[3:]
        if op in ("", "revision"):
            return await th(self.repo_info, req, typ, rid, a[0] if a else None)
        if op == "tree":
            return await th(self.tree, req, typ, rid, a[0], "/".join(a[1:]))
        if op == "paths-info":
            return await th(self.paths_info, req, typ, rid, a[0], (await req.read()).decode())
        if op == "refs":
            r = self.repo(req, typ, rid)
            return web.json_response(await th(r.refs, req.query.get("include_prs") == "1"))
        if op == "commits":
            return await th(self.commits, req, typ, rid, a[0])
        if op == "preupload":
            return await th(self.preupload, req, typ, rid, a[0], await req.json())
        if op == "commit":
            return await th(self.commit, req, typ, rid, a[0], await req.read())
        if op == "branch":
            return await th(self.branch, req, m, typ, rid, "/".join(a), await req.text())
        if op == "tag":
            return await th(self.tag, req, m, typ, rid, "/".join(a), await req.text())
        if op == "settings":
            r = self.repo(req, typ, rid, write=True)
            p = await req.json()
            if "visibility" in p:
                r.meta["private"] = p["visibility"] != "public"
            if "gated" in p:
                r.meta["gated"] = p["gated"]
            r.save()
            return web.json_response({"private": r.meta["private"], "gated": r.meta["gated"]})
        if op == "auth-check":
            r = self.repo(req, typ, rid, write=a == ["write"])
            if r.meta.get("gated") and not self.owns(self.user(req), r.id.split("/")[0]):
                raise HubError(403, f"Access to model {r.id} is restricted.", "GatedRepo")
            return web.json_response({})
        if op in ("xet-read-token", "xet-write-token"):
            return await th(self.xet_token, req, typ, rid, op.split("-")[1], unquote("/".join(a)))
        if op == "discussions":
            return await th(self.discussions, req, m, typ, rid, a, await req.text())
        raise HubError(404, "Not found")

    # ------------------------------------------------------------------ repos
    async def repos_api(self, req, m, verb):
        u = self.user(req, True)
        p = await req.json()
        if u["role"] != "write":
            raise HubError(
                403,
                "You don't have the rights to create a model under this namespace"
                if verb == "create"
                else "Forbidden: write token required",
            )
        if verb == "move":
            return await asyncio.to_thread(self.move, req, p)
        typ = p.get("type") or "model"
        rid = f"{p.get('organization') or u['name']}/{p['name']}"
        if verb == "create":
            if not self.owns(u, rid.split("/")[0]):
                raise HubError(
                    403,
                    f'You don\'t have the rights to create a {typ} under the namespace "{rid.split("/")[0]}"',
                )
            if (
                not NAME_RE.fullmatch(p["name"])
                or "--" in p["name"]
                or ".." in p["name"]
                or p["name"].endswith(".git")
            ):
                raise HubError(400, "Invalid repo name")
            url = self.web_url(typ, rid)
            with self.store.lock:
                if self.store.get(typ, rid):
                    raise HubError(
                        409,
                        f"You already created this {typ} repo",
                        body={"error": f"You already created this {typ} repo", "url": url},
                    )
                default_private = u.get("default_private", {}).get(rid.split("/")[0], False)
                private = (
                    p.get("visibility") in ("private", "protected")
                    if p.get("visibility")
                    else default_private
                )
                await asyncio.to_thread(self.store.create, typ, rid, private, u["name"])
            return web.json_response({"url": url, "name": rid, "id": uuid.uuid4().hex[:24]})
        if verb == "delete":
            r = self.repo(req, typ, rid, write=True)
            await asyncio.to_thread(self.store.delete, r)
            return web.Response(text="OK")
        raise HubError(404, "Not found")

    def move(self, req, p):
        r = self.repo(req, p.get("type", "model"), p["fromRepo"], write=True)
        if (r.type, p["toRepo"].lower()) in self.store.repos:
            raise HubError(409, f"A {r.type} repository called {p['toRepo']} already exists")
        self.store.move(r, p["toRepo"])
        return web.json_response({})

    def web_url(self, typ, rid):
        return f"{self.endpoint}/{'' if typ == 'model' else typ + 's/'}{rid}"

    async def validate_yaml(self, req):
        p = await req.json()
        txt = p["content"].replace("\r\n", "\n").lstrip("\ufeff").lstrip()
        errs, warns = [], []
        mm = re.match(r"---\n(.*?)\n?---(\n|$)", txt, re.S)
        if not mm:
            warns.append(
                {
                    "message": "empty or missing yaml metadata in repo card (https://huggingface.co/docs/hub/model-cards#model-card-metadata)"
                }
            )
        else:
            try:
                y = yaml.safe_load(mm[1]) or {}
                errs += self.card_errors(y)
            except yaml.YAMLError as e:
                errs.append({"message": f"bad YAML: {str(e)[:200]}"})
        return web.json_response({"errors": errs, "warnings": warns}, status=400 if errs else 200)

    @staticmethod
    def card_errors(y):
        errs = []

        def bad(k, what):
            errs.append({"message": f'"{k}" {what}'})

        if not isinstance(y, dict):
            return [{"message": "metadata must be an object"}]
        if "model-index" in y and not isinstance(y["model-index"], list):
            bad("model-index", "must be an array")
        for k in ("tags", "datasets", "language", "base_model", "metrics"):
            v = y.get(k)
            if v is not None and not (
                isinstance(v, str) or (isinstance(v, list) and all(isinstance(x, str) for x in v))
            ):
                bad(k, "must be a string or an array of strings")
        rel = y.get("base_model_relation")
        if rel is not None and rel not in ("finetune", "adapter", "quantized", "merge"):
            bad("base_model_relation", "must be one of [finetune, adapter, quantized, merge]")
        for b in (
            [y["base_model"]] if isinstance(y.get("base_model"), str) else y.get("base_model") or []
        ):
            if isinstance(b, str) and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", b):
                bad(
                    "base_model",
                    f'with value "{b}" is not valid. Use a model id from https://hf.co/models.',
                )
        return errs

    # ------------------------------------------------------------------ info
    def card(self, r: Repo, commit):
        txt = (r.read(commit, "README.md") or b"").decode("utf-8", "replace").replace("\r\n", "\n")
        mm = re.match(r"\s*---\n(.*?)\n---(\n|$)", txt, re.S)
        try:
            y = yaml.safe_load(mm[1]) if mm else None
        except yaml.YAMLError:
            y = None
        return y if isinstance(y, dict) else None

    def info(self, r: Repo, rev=None, blobs=False, want=None):
        commit = r.resolve(rev or "main")
        files = [e for e in r.tree(commit, recursive=True) if e.kind == "blob"]
        names = {e.path for e in files}
        card = self.card(r, commit)
        sib = []
        for e in files:
            d = {"rfilename": e.path}
            if blobs:
                d["blobId"] = e.oid
                d["size"] = e.lfs[1] if e.lfs else e.size
                if e.lfs:
                    d["lfs"] = {"sha256": e.lfs[0], "size": e.lfs[1], "pointerSize": e.lfs[2]}
            sib.append(d)
        as_list = lambda v: [v] if isinstance(v, str) else list(v or [])  # noqa: E731
        tags, out = [], {}
        c = card or {}
        bases = as_list(c.get("base_model"))
        rel = c.get("base_model_relation")
        if bases and not rel:
            rel = (
                "adapter"
                if "adapter_config.json" in names
                else "quantized"
                if any(n.endswith(".gguf") for n in names)
                else "merge"
                if len(bases) > 1
                else "finetune"
            )
        lib = c.get("library_name")
        config = None
        if "config.json" in names:
            try:
                config = json.loads(r.read(commit, "config.json") or b"null")
            except ValueError:
                config = None
        if lib is None and "adapter_config.json" in names:
            lib = "peft"
        elif lib is None and config and "architectures" in config:
            lib = "transformers"
        if r.type == "model":
            tags += [lib] if lib else []
            if any(n.endswith(".safetensors") for n in names):
                tags.append("safetensors")
            if any(n.endswith(".gguf") for n in names):
                tags.append("gguf")
            if config and config.get("model_type"):
                tags.append(config["model_type"])
        tags += as_list(c.get("tags"))
        tags += as_list(c.get("language"))
        for d in as_list(c.get("datasets")):
            tags.append(f"dataset:{d}")
        for b in bases:
            tags += [f"base_model:{b}", f"base_model:{rel}:{b}"]
        if c.get("license"):
            tags.append(f"license:{c['license']}")
        if "model-index" in c:
            tags.append("model-index")
        tags.append("region:us")
        first = r.log(commit)
        out = {
            "_id": hashlib.md5(r.id.encode()).hexdigest()[:24],
            "id": r.id,
            "author": r.id.split("/")[0],
            "sha": commit,
            "lastModified": first[0]["date"].replace("+00:00", ".000Z") if first else now(),
            "createdAt": r.meta["createdAt"],
            "private": r.meta["private"],
            "gated": r.meta["gated"],
            "disabled": False,
            "downloads": r.meta["downloads"],
            "likes": r.meta["likes"],
            "tags": list(dict.fromkeys(tags)),
            "siblings": sib,
            "usedStorage": sum(e.lfs[1] if e.lfs else e.size for e in files),
        }
        if card is not None:
            out["cardData"] = json.loads(json.dumps(card, default=str))
            if c.get("pipeline_tag"):
                out["pipeline_tag"] = c["pipeline_tag"]
            if "model-index" in c:
                out["model-index"] = c["model-index"]
        if r.type == "model":
            out["modelId"] = r.id
            if lib:
                out["library_name"] = lib
            if config:
                out["config"] = {
                    k: config[k] for k in ("architectures", "model_type") if k in config
                }
            st = self.safetensors_params(r, files)
            if st:
                out["safetensors"] = st
            if bases:
                out["baseModels"] = {
                    "relation": rel,
                    "models": [
                        {"_id": hashlib.md5(b.encode()).hexdigest()[:24], "id": b} for b in bases
                    ],
                }
            ev = []
            for e in files:
                if re.fullmatch(r"\.eval_results/[^/]+\.ya?ml", e.path):
                    try:
                        for row in yaml.safe_load(r.blob(e.oid)) or []:
                            ev.append(
                                {
                                    "filename": e.path,
                                    "verified": False,
                                    "data": json.loads(json.dumps(row, default=str)),
                                }
                            )
                    except Exception as x:
                        ev.append({"filename": e.path, "error": str(x)[:200]})
            if ev:
                out["evalResults"] = ev
        if want:
            out = {k: v for k, v in out.items() if k in set(want) | {"_id", "id"}}
        else:
            out.pop("baseModels", None)
            out.pop("evalResults", None)
        return out

    def safetensors_params(self, r, files):
        from math import prod

        counts = {}
        for e in files:
            if e.path.endswith(".safetensors") and e.lfs and "/" not in e.path:
                try:
                    with self.open_lfs(e.lfs[0]) as f:
                        n = struct.unpack("<Q", f.read(8))[0]
                        if n > 25_000_000:
                            return None
                        for k, t in json.loads(f.read(n)).items():
                            if k != "__metadata__":
                                counts[t["dtype"]] = counts.get(t["dtype"], 0) + prod(t["shape"])
                except Exception:
                    return None
        return {"parameters": counts, "total": sum(counts.values())} if counts else None

    def repo_info(self, req, typ, rid, rev):
        r = self.repo(req, typ, rid)
        if rid.lower() != r.id.lower():  # renamed repo
            raise web.HTTPTemporaryRedirect(req.rel_url.raw_path.replace(rid, r.id))
        want = req.query.getall("expand", []) + req.query.getall("expand[]", [])
        return web.json_response(
            self.info(r, rev, req.query.get("blobs", "").lower() == "true", want)
        )

    def list_repos(self, req, typ):
        q, u = req.query, self.user(req)
        rows = []
        for r in self.store.repos.values():
            if r.type != typ or (r.meta["private"] and not self.owns(u, r.id.split("/")[0])):
                continue
            if q.get("author") and r.id.split("/")[0] != q["author"]:
                continue
            if q.get("search") and q["search"].lower() not in r.id.lower():
                continue
            d = self.info(r)
            if not set(q.getall("filter", [])) <= set(d["tags"]):
                continue
            if q.get("full") is None:
                d.pop("siblings")
            if q.get("cardData") is None:
                d.pop("cardData", None)
            rows.append(d)
        key = {"downloads": "downloads", "likes": "likes", "createdAt": "createdAt"}.get(
            q.get("sort", ""), "lastModified"
        )
        rows.sort(key=lambda d: d[key], reverse=True)
        return self.paged(req, rows, int(q.get("limit") or self.page))

    def paged(self, req, rows, size):
        start = int(req.query.get("cursor") or 0)
        h = {}
        if start + size < len(rows):
            url = req.rel_url.update_query({"cursor": str(start + size)})
            h["Link"] = f'<{self.endpoint}{url}>; rel="next"'
        return web.json_response(rows[start : start + size], headers=h)

    def entry_json(self, r, e, commit=None, expand=False):
        if e.kind == "tree":
            d = {"type": "directory", "oid": e.oid, "size": 0, "path": e.path}
        else:
            d = {
                "type": "file",
                "oid": e.oid,
                "size": e.lfs[1] if e.lfs else e.size,
                "path": e.path,
            }
            if e.lfs:
                d["lfs"] = {"oid": e.lfs[0], "size": e.lfs[1], "pointerSize": e.lfs[2]}
                if self.xet and e.lfs[0] in self.cas.by_sha:
                    d["xetHash"] = self.cas.by_sha[e.lfs[0]]
        if expand:
            out = (
                r.git("log", "-1", "--format=%H%x01%s%x01%aI", commit, "--", e.path)
                .decode()
                .strip()
                .split("\x01")
            )
            d["lastCommit"] = {
                "id": out[0],
                "title": out[1],
                "date": out[2].replace("+00:00", ".000Z"),
            }
            if e.kind == "blob":
                d["securityFileStatus"] = {
                    "status": "safe",
                    "avScan": {"status": "safe"},
                    "pickleImportScan": None,
                }
        return d

    def tree(self, req, typ, rid, rev, path):
        r = self.repo(req, typ, rid)
        c = r.resolve(rev)
        expand = req.query.get("expand", "").lower() == "true"
        rows = [
            self.entry_json(r, e, c, expand)
            for e in r.tree(c, path, req.query.get("recursive", "").lower() == "true")
        ]
        return self.paged(req, rows, 50 if expand else self.page)

    def paths_info(self, req, typ, rid, rev, body):
        r = self.repo(req, typ, rid)
        c = r.resolve(rev)
        if "json" in req.content_type:
            p = json.loads(body)
            paths, expand = p["paths"], p.get("expand")
        else:
            q = parse_qs(body)
            paths, expand = q.get("paths", []), q.get("expand", ["false"])[0].lower() == "true"
        if len(paths) > 1000:
            raise HubError(413, "too many parameters")
        out = [
            self.entry_json(r, e, c, expand) for e in (r.stat(c, p.rstrip("/")) for p in paths) if e
        ]
        return web.json_response(out)

    def commits(self, req, typ, rid, rev):
        r = self.repo(req, typ, rid)
        rows = r.log(r.resolve(rev))
        for x in rows:
            x["date"] = x["date"].replace("+00:00", ".000Z")
            if req.query.get("expand[]") == "formatted":
                x["formatted"] = {"title": x["title"], "message": x["message"]}
        return self.paged(req, rows, 50)

    # ------------------------------------------------------------------ upload
    def preupload(self, req, typ, rid, rev, p):
        pr = req.query.get("create_pr") == "1"
        r = self.repo(req, typ, rid, write=not pr)
        if pr:
            self.user(req, True)
        if len(p["files"]) > 256:
            raise HubError(413, "too many files")
        c = r.resolve(rev)
        ign = p.get("gitIgnore")
        if ign is None:
            ign = (r.read(c, ".gitignore") or b"").decode("utf-8", "replace")
        ignored = check_ignored(ign, [f["path"] for f in p["files"]])
        existing = {e.path: e for e in r.tree(c, recursive=True)}
        out = []
        for f in p["files"]:
            sample = base64.b64decode(f["sample"])
            lfs = r.is_lfs_path(c, f["path"]) or f["size"] > REGULAR_MAX or b"\0" in sample
            d = {
                "path": f["path"],
                "uploadMode": "lfs" if lfs else "regular",
                "shouldIgnore": f["path"] in ignored,
            }
            e = existing.get(f["path"])
            if e is not None and e.kind == "blob":
                d["oid"] = e.lfs[0] if e.lfs else e.oid
            out.append(d)
        return web.json_response({"files": out, "commitOid": c})

    def has_object(self, oid):
        return self.store.lfs_path(oid).exists() or oid in self.cas.by_sha

    def object_size(self, oid):
        p = self.store.lfs_path(oid)
        return p.stat().st_size if p.exists() else self.cas.size(self.cas.by_sha[oid])

    def commit(self, req, typ, rid, rev, body):
        pr = req.query.get("create_pr") == "1"
        r = self.repo(req, typ, rid, write=not pr)
        u = self.user(req, True)
        lines = [json.loads(ln) for ln in body.splitlines() if ln.strip()]
        if not lines or lines[0]["key"] != "header":
            raise HubError(400, "First line must be the commit header")
        hdr = lines[0]["value"]
        if not hdr.get("summary"):
            raise HubError(400, "commit summary is required")
        with r.lock:
            head = r.resolve(rev, branch_only=True)
            parent = hdr.get("parentCommit")
            base = head
            if parent:
                full = (
                    r.git("rev-parse", "--verify", "-q", f"{parent}^{{commit}}", check=False)
                    .decode()
                    .strip()
                )
                if not full:
                    raise HubError(404, f"Invalid parent commit {parent}", "RevisionNotFound")
                if pr:
                    base = full
                elif full != head:
                    raise HubError(
                        412,
                        "The branch was updated since you opened this page. Please refresh and try again.",
                    )
            names = {e.path: e.kind for e in r.tree(base, recursive=True)}
            ops = []
            for ln in lines[1:]:
                v = ln["value"]
                path = v["path"]
                if (
                    not path
                    or path.startswith(("/", "..\\"))
                    or any(x in ("", ".", "..", ".git") for x in path.rstrip("/").split("/"))
                ):
                    raise HubError(422, f"Invalid path {path!r}")
                if ln["key"] == "file":
                    data = (
                        base64.b64decode(v["content"])
                        if v.get("encoding") == "base64"
                        else v["content"].encode()
                    )
                    if len(data) > REGULAR_MAX:
                        raise HubError(413, f"{path} is too large for a regular file; use LFS")
                    ops.append(("add", path, data))
                elif ln["key"] == "lfsFile":
                    if not self.has_object(v["oid"]):
                        raise HubError(
                            400,
                            "Your push was rejected because an LFS pointer pointed to a file that does not exist. "
                            f"Offending file: {path}",
                        )
                    size = self.object_size(v["oid"])
                    if v.get("size") not in (None, size):
                        raise HubError(400, f"size mismatch for {path}: {v['size']} != {size}")
                    ops.append(("add", path, lfs_pointer(v["oid"], size)))
                elif ln["key"] in ("deletedFile", "deletedFolder"):
                    if path.rstrip("/") not in names:
                        raise HubError(
                            404, f"A file with this name doesn't exist: {path}", "EntryNotFound"
                        )
                    ops.append(("del", path.rstrip("/")))
                else:
                    raise HubError(
                        400, "Add a line with the key `lfsFile`, `file` or `deletedFile`"
                    )
            if not ops:
                raise HubError(400, "No operation in commit")
            ops.sort(key=lambda o: o[0] != "del")
            res, ref = {"success": True, "hookOutput": ""}, r.ref_of(rev)
            if pr:
                d = self.new_discussion(
                    r, u, hdr["summary"], hdr.get("description") or "", True, base, ref
                )
                ref = f"refs/pr/{d['num']}"
            oid = r.commit(ref, base, ops, hdr["summary"], hdr.get("description") or "", u["name"])
            if pr:
                d["events"].append(self.event("commit", u, {"subject": hdr["summary"], "oid": oid}))
                d["status"] = "open"
                r.save()
                res["pullRequestUrl"] = f"{self.web_url(typ, r.id)}/discussions/{d['num']}"
            else:
                self.on_pr_commit(r, ref, u, hdr["summary"], oid)
        res["commitOid"], res["commitUrl"] = oid, f"{self.web_url(typ, r.id)}/commit/{oid}"
        return web.json_response(res)

    def on_pr_commit(self, r, ref, u, subject, oid):
        if ref.startswith("refs/pr/"):
            for d in r.meta["discussions"]:
                if d["num"] == int(ref.split("/")[-1]):
                    d["events"].append(self.event("commit", u, {"subject": subject, "oid": oid}))
                    r.save()

    def branch(self, req, m, typ, rid, name, body):
        r = self.repo(req, typ, rid, write=True)
        ref = f"refs/heads/{name}"
        with r.lock:
            if m == "DELETE":
                if name == "main":
                    raise HubError(403, "Cannot delete refs/heads/main")
                if r.ref_of(ref) is None:
                    raise HubError(404, f"Invalid rev id: {name}", "RevisionNotFound")
                r.git("update-ref", "-d", ref)
                return web.json_response({})
            p = json.loads(body or "{}")
            if r.ref_of(ref):
                raise HubError(409, f"Reference {ref} already exists")
            if r.git("check-ref-format", ref, check=False) is None or name.startswith("refs/"):
                raise HubError(400, "Invalid branch name")
            r.git("update-ref", ref, r.resolve(p.get("startingPoint") or "main"))
        return web.json_response({"success": True}, status=201)

    def tag(self, req, m, typ, rid, arg, body):
        r = self.repo(req, typ, rid, write=True)
        u = self.user(req, True)
        with r.lock:
            if m == "DELETE":
                if r.ref_of(f"refs/tags/{arg}") is None:
                    raise HubError(404, f"Invalid rev id: {arg}", "RevisionNotFound")
                r.git("tag", "-d", arg)
                return web.json_response({})
            p = json.loads(body)
            if r.ref_of(f"refs/tags/{p['tag']}"):
                raise HubError(409, f"Tag reference {p['tag']} already exists")
            args = (
                ["tag"]
                + (["-a", "-m", p["message"]] if p.get("message") else [])
                + ["--", p["tag"], r.resolve(arg)]
            )
            who = {
                f"GIT_{k}_{v}": x
                for k in ("AUTHOR", "COMMITTER")
                for v, x in (
                    ("NAME", u["name"]),
                    ("EMAIL", f"{u['name']}@users.noreply.huggingface.co"),
                )
            }
            r.git(*args, env=who)
        return web.json_response({"success": True}, status=201)

    # ------------------------------------------------------------------ LFS
    async def git_route(self, req, typ, rid, rest):
        if rest == ["info", "lfs", "objects", "batch"]:
            return await asyncio.to_thread(self.lfs_batch, req, typ, rid, await req.json())
        return await self.git_http(req, typ, rid, rest)

    def lfs_batch(self, req, typ, rid, p):
        up = p["operation"] == "upload"
        r = self.store.get(typ, rid)
        u = self.user(req)
        if up and r is not None and not (u and self.owns(u, r.id.split("/")[0])):
            self.repo(
                req, typ, rid
            )  # PR uploads by non-owners are allowed for any authenticated user
            if u is None:
                raise HubError(
                    401,
                    "Authentication required",
                    headers={"WWW-Authenticate": 'Basic realm="hub"'},
                )
        r = self.repo(req, typ, rid)
        if up and u["role"] != "write":
            raise HubError(403, "Forbidden: you must use a write token to upload to a repository.")
        objs = []
        multipart = "multipart" in p.get("transfers", []) and self.multipart_over is not None
        for o in p["objects"]:
            oid, size = o["oid"], o["size"]
            d = {"oid": oid, "size": size, "authenticated": True}
            if not re.fullmatch(r"[0-9a-f]{64}", oid):
                d["error"] = {"code": 422, "message": "invalid oid"}
            elif up and not self.has_object(oid):
                verify = {
                    "href": f"{self.endpoint}/_lfs/verify/{typ}/{r.id}",
                    "header": {"Authorization": req.headers.get("Authorization", "")},
                }
                if multipart and size > self.multipart_over:
                    n = -(-size // self.multipart_over)
                    uid = secrets.token_hex(8)
                    self._uploads[uid] = {"oid": oid, "n": n, "etags": {}}
                    hdr = {"chunk_size": str(self.multipart_over)}
                    for i in range(1, n + 1):
                        hdr[str(i)] = (
                            f"{self.cdn}/_lfs/part/{uid}/{i}?sig={self.sign('part', uid, i)}"
                        )
                    d["actions"] = {
                        "upload": {
                            "href": f"{self.endpoint}/_lfs/complete/{uid}?sig={self.sign('done', uid)}",
                            "header": hdr,
                        },
                        "verify": verify,
                    }
                else:
                    d["actions"] = {
                        "upload": {
                            "href": f"{self.cdn}/_lfs/put/{oid}?sig={self.sign('put', oid)}"
                        },
                        "verify": verify,
                    }
            elif not up:
                if self.has_object(oid):
                    d["actions"] = {"download": {"href": self.cdn_url(oid, oid)}}
                else:
                    d["error"] = {"code": 404, "message": "Object does not exist"}
            objs.append(d)
        return web.json_response(
            {
                "transfer": "multipart" if multipart else "basic",
                "objects": objs,
                "hash_algo": "sha256",
            },
            content_type="application/vnd.git-lfs+json",
        )

    async def lfs_io(self, req, s):
        kind, sig = s[1], req.query.get("sig")
        if kind != "verify":
            self.watch_leak(req, "lfs storage")
        if kind == "put" and req.method == "PUT":
            if sig != self.sign("put", s[2]):
                raise HubError(403, "SignatureDoesNotMatch")
            tmp = self.store.tmpfile()
            with open(tmp, "wb") as f:
                async for b in req.content.iter_chunked(CHUNK):
                    f.write(b)
                    req["rec"].bytes_in += len(b)
            await asyncio.to_thread(self.store.lfs_put, s[2], tmp)
            return web.Response(headers={"ETag": '"x"'})
        if kind == "part" and req.method == "PUT":
            up = self._uploads.get(s[2])
            if up is None or sig != self.sign("part", s[2], s[3]):
                raise HubError(403, "SignatureDoesNotMatch")
            data = await req.read()
            req["rec"].bytes_in += len(data)
            etag = hashlib.md5(data).hexdigest()
            up["etags"][int(s[3])] = (etag, data)
            return web.Response(headers={"ETag": f'"{etag}"'})
        if kind == "complete":
            up = self._uploads.get(s[2])
            p = await req.json()
            want = [(i, f'"{up["etags"][i][0]}"') for i in range(1, up["n"] + 1)]
            if [(x["partNumber"], x["etag"]) for x in p["parts"]] != want or p["oid"] != up["oid"]:
                raise HubError(400, "InvalidPart")
            tmp = self.store.tmpfile()
            tmp.write_bytes(b"".join(up["etags"][i][1] for i in range(1, up["n"] + 1)))
            await asyncio.to_thread(self.store.lfs_put, up["oid"], tmp)
            return web.json_response({})
        if kind == "verify":
            p = await req.json()
            self.user(req, True)
            if not self.has_object(p["oid"]):
                raise HubError(404, "Object not found")
            if self.object_size(p["oid"]) != p["size"]:
                raise HubError(422, "size mismatch")
            return web.json_response({})
        raise HubError(404, "Not found")

    def watch_leak(self, req, where):
        h = req.headers.get("Authorization", "")
        if h.removeprefix("Bearer ") in self.tokens:
            self.leaks.append(f"{where}: {req.method} {req.path}")

    # ------------------------------------------------------------------ download
    def cdn_url(self, oid, name):
        return (
            f"{self.cdn}/_cdn/{oid}?sig={self.sign('get', oid)}&response-content-disposition="
            + quote(f"inline; filename*=UTF-8''{quote(name)}; filename=\"{name}\";", safe="")
        )

    async def resolve(self, req, typ, rid, rev, path, cached=False):
        r = self.repo(req, typ, rid)
        if rid.lower() != r.id.lower():
            raise web.HTTPTemporaryRedirect(req.rel_url.raw_path_qs.replace(rid, r.id))
        commit = await asyncio.to_thread(r.resolve, rev)
        e = await asyncio.to_thread(r.stat, commit, path)
        if e is None or e.kind != "blob":
            raise HubError(404, "Entry not found", "EntryNotFound", {"X-Repo-Commit": commit})
        name = path.rsplit("/", 1)[-1]
        h = {
            "X-Repo-Commit": commit,
            "Accept-Ranges": "bytes",
            "Access-Control-Expose-Headers": "X-Repo-Commit,X-Request-Id,X-Error-Code,X-Error-Message,X-Total-Count,ETag,Link,"
            "Accept-Ranges,Content-Range,X-Linked-Size,X-Linked-ETag,X-Xet-Hash",
        }
        if name in ("config.json", "recipe.yaml", "adapter_config.json") and req.method == "GET":
            r.meta["downloads"] += 1
        if e.lfs:
            oid, size, _ = e.lfs
            url = self.cdn_url(oid, name)
            h |= {"X-Linked-Size": str(size), "X-Linked-Etag": f'"{oid}"', "Location": url}
            if self.xet and oid in self.cas.by_sha:
                xh = self.cas.by_sha[oid]
                h["X-Xet-Hash"] = xh
                h["Link"] = (
                    f'<{self.endpoint}/api/{typ}s/{r.id}/xet-read-token/{commit}>; rel="xet-auth", '
                    f'<{self.cdn}/cas/v1/reconstructions/{xh}>; rel="xet-reconstruction-info"'
                )
            return web.Response(status=302, headers=h, text=f"Found. Redirecting to {url}")
        if (
            self.redirect_small and not cached
        ):  # the Hub answers 307 to a relative, commit-addressed cache url
            h["Location"] = (
                f"/api/resolve-cache/{typ}s/{r.id}/{commit}/{quote(path)}?etag={quote(chr(34) + e.oid + chr(34))}"
            )
            h |= {"X-Linked-Size": str(e.size), "X-Linked-Etag": f'"{e.oid}"'}
            return web.Response(status=307, headers=h)
        h |= {
            "ETag": f'"{e.oid}"',
            "Content-Disposition": f"inline; filename*=UTF-8''{quote(name)}; filename=\"{name}\";",
        }
        data = await asyncio.to_thread(r.blob, e.oid)
        ctype = (
            "text/plain; charset=utf-8" if b"\0" not in data[:512] else "application/octet-stream"
        )
        h["Content-Type"] = ctype
        return await self.send(req, h, len(data), lambda a, b: data[a:b])

    async def cdn_get(self, req, s):
        self.watch_leak(req, "cdn")
        oid = s[1]
        if req.query.get("sig") != self.sign("get", oid):
            raise HubError(403, "AccessDenied")
        path = await asyncio.to_thread(self.materialize, oid)
        f = open(path, "rb")

        def rd(a, b):
            f.seek(a)
            return f.read(b - a)

        try:
            return await self.send(
                req,
                {
                    "ETag": f'"{oid}"',
                    "Accept-Ranges": "bytes",
                    "Content-Type": "application/octet-stream",
                },
                path.stat().st_size,
                rd,
            )
        finally:
            f.close()

    async def send(self, req, headers, size, read):
        a, b, status = 0, size, 200
        rng = req.headers.get("Range")
        if rng:
            mm = re.fullmatch(r"bytes=(\d*)-(\d*)", rng)
            if not mm:
                raise HubError(416, "bad range", headers={"Content-Range": f"bytes */{size}"})
            if mm[1]:
                a, b = int(mm[1]), min(int(mm[2]) + 1 if mm[2] else size, size)
            else:
                a = max(size - int(mm[2]), 0)
            if a >= size:
                raise HubError(
                    416,
                    "Requested range not satisfiable",
                    headers={"Content-Range": f"bytes */{size}"},
                )
            status = 206
            headers["Content-Range"] = f"bytes {a}-{b - 1}/{size}"
        headers["Content-Length"] = str(b - a)
        if req.method == "HEAD":
            return web.Response(status=status, headers=headers)
        resp = web.StreamResponse(status=status, headers=headers)
        await resp.prepare(req)
        cut = req.get("cut")
        if cut:
            cut.times -= 1
        pos = a
        while pos < b:
            n = min(CHUNK, b - pos)
            if cut and cut.times >= 0:
                n = min(n, cut.after_bytes - (pos - a))
                if n <= 0:
                    await asyncio.sleep(
                        0.05 + cut.stall
                    )  # let what was written reach the peer, then cut the line
                    if req.transport:
                        req.transport.close()
                    break
            await resp.write(await asyncio.to_thread(read, pos, pos + n))
            pos += n
            req["rec"].bytes_out += n
        req["rec"].status = status
        return resp

    def open_lfs(self, oid):
        return open(self.materialize(oid), "rb")

    def materialize(self, oid: str) -> Path:
        """Plain bytes of an object: from the LFS store, else rebuilt from Xet with the real hf_xet and sha256-checked."""
        p = self.store.lfs_path(oid)
        if p.exists():
            return p
        if oid not in self.cas.by_sha:
            raise HubError(404, "Object not found")
        import hf_xet

        fh = self.cas.by_sha[oid]
        tmp = self.store.tmpfile()
        tok = self.cas_token("read")
        with hf_xet.XetSession().new_file_download_group(
            endpoint=f"{self.endpoint}/cas", token=tok[0], token_expiry_unix_secs=tok[1]
        ) as g:
            g.start_download_file(hf_xet.XetFileInfo(fh, self.cas.size(fh)), str(tmp))
        self.store.lfs_put(oid, tmp)
        return p

    # ------------------------------------------------------------------ Xet
    def cas_token(self, scope, ttl=3600):
        exp = int(time.time()) + ttl
        return f"xet_{scope}_{exp}_{self.sign('xet', scope, exp)}", exp

    def xet_token(self, req, typ, rid, scope, rev):
        if not self.xet:
            raise HubError(404, "Xet storage is not enabled")
        pr = req.query.get("create_pr") == "1" or rev == "None"
        r = self.repo(req, typ, rid, write=scope == "write" and not pr)
        if scope == "write":
            self.user(req, True)
        if not pr:
            r.resolve(rev)
        tok, exp = self.cas_token(scope)
        url = f"{self.cdn}/cas"
        return web.json_response(
            {"accessToken": tok, "exp": exp, "casUrl": url},
            headers={
                "X-Xet-Cas-Url": url,
                "X-Xet-Access-Token": tok,
                "X-Xet-Token-Expiration": str(exp),
            },
        )

    async def cas_route(self, req, s):
        self.watch_leak(req, "cas")
        m, th = req.method, asyncio.to_thread
        if s[0] != "v1":
            raise HubError(404, "not served: fall back to v1")
        if s[1] == "xorb-data":
            if req.query.get("sig") != self.sign("xorb", s[2]):
                raise HubError(403, "AccessDenied")
            self.cas.stats["xorb_gets"] += 1
            p = self.cas.xorb_path(s[2])
            data = await th(p.read_bytes)
            return await self.send(
                req, {"Content-Type": "application/octet-stream"}, len(data), lambda a, b: data[a:b]
            )
        mm = re.fullmatch(
            r"Bearer xet_(read|write)_(\d+)_(\w+)", req.headers.get("Authorization", "")
        )
        if not mm or mm[3] != self.sign("xet", mm[1], int(mm[2])) or int(mm[2]) < time.time():
            raise HubError(401, "invalid xet token")
        if m == "POST" and mm[1] != "write":
            raise HubError(403, "write scope required")
        if s[1] == "xorbs" and m == "POST":
            data = await req.read()
            req["rec"].bytes_in = len(data)
            return web.json_response({"was_inserted": await th(self.cas.put_xorb, s[3], data)})
        if s[1] == "xorbs" and m == "HEAD":
            p = self.cas.xorb_path(s[3])
            if not p.exists():
                raise HubError(404, "not found")
            return web.Response(headers={"Content-Length": str(p.stat().st_size)})
        if s[1] == "shards" and m == "POST":
            data = await req.read()
            req["rec"].bytes_in = len(data)
            await th(self.cas.put_shard, data)
            return web.json_response({"result": 1})
        if s[1] == "chunks":
            raise HubError(404, "chunk not tracked")
        if s[1] == "reconstructions" and m == "GET":
            if s[2] not in self.cas.files:
                raise HubError(404, "file not found")
            a = b = None
            if req.headers.get("Range"):
                g = re.fullmatch(r"bytes=(\d+)-(\d*)", req.headers["Range"])
                a, b = int(g[1]), int(g[2]) if g[2] else None
            out = await th(self.cas.reconstruct, s[2], a, b, f"{self.cdn}/cas/v1/xorb-data")
            if out is None:
                raise HubError(416, "range not satisfiable")
            for xorb, lst in out["fetch_info"].items():
                for x in lst:
                    x["url"] += f"?sig={self.sign('xorb', xorb)}"
            return web.json_response(out)
        raise HubError(404, "not found")

    # ------------------------------------------------------------------ discussions / PRs
    def event(self, typ, u, data):
        return {
            "id": uuid.uuid4().hex[:24],
            "type": typ,
            "createdAt": now(),
            "author": {"name": u["name"]},
            "data": data,
        }

    def new_discussion(self, r, u, title, desc, is_pr, base=None, target="refs/heads/main"):
        num = len(r.meta["discussions"]) + 1
        d = {
            "num": num,
            "title": title,
            "author": {"name": u["name"]},
            "createdAt": now(),
            "status": "draft" if is_pr else "open",
            "isPullRequest": is_pr,
            "target": target,
            "events": [
                self.event(
                    "comment",
                    u,
                    {
                        "edited": False,
                        "hidden": False,
                        "latest": {
                            "raw": desc,
                            "html": "",
                            "updatedAt": now(),
                            "author": {"name": u["name"]},
                        },
                    },
                )
            ],
        }
        if is_pr:
            r.git("update-ref", f"refs/pr/{num}", base or r.resolve("main"))
        r.meta["discussions"].append(d)
        r.save()
        return d

    def dview(self, r, d, full=False):
        out = {k: d[k] for k in ("num", "title", "author", "createdAt", "status", "isPullRequest")}
        out["repo"] = {"name": r.id, "type": r.type}
        if full:
            out["events"] = d["events"]
            if d["isPullRequest"]:
                out["changes"] = {
                    "base": d["target"],
                    **({"mergeCommitId": d["merge"]} if d.get("merge") else {}),
                }
                out["filesWithConflicts"] = []
                out["diff"] = r.git(
                    "diff", f"{d['target']}...refs/pr/{d['num']}", check=False
                ).decode("utf-8", "replace")
        return out

    def discussions(self, req, m, typ, rid, a, body):
        r = self.repo(req, typ, rid)
        ds = r.meta["discussions"]
        if not a and m == "GET":
            q = req.query
            rows = [
                d
                for d in reversed(ds)
                if q.get("type", "all") == "all"
                or (q["type"] == "pull_request") == d["isPullRequest"]
            ]
            if q.get("status") == "open":
                rows = [d for d in rows if d["status"] in ("open", "draft")]
            if q.get("status") == "closed":
                rows = [d for d in rows if d["status"] in ("closed", "merged")]
            if q.get("author"):
                rows = [d for d in rows if d["author"]["name"] == q["author"]]
            p = int(q.get("p", 0))
            return web.json_response(
                {
                    "count": len(rows),
                    "start": p * 10,
                    "discussions": [self.dview(r, d) for d in rows[p * 10 : p * 10 + 10]],
                }
            )
        u = self.user(req, m != "GET")
        with r.lock:
            if not a:
                p = json.loads(body)
                d = self.new_discussion(
                    r, u, p["title"], p.get("description", ""), bool(p.get("pullRequest"))
                )
                return web.json_response(
                    {
                        "num": d["num"],
                        "pullRequest": d["isPullRequest"],
                        "url": f"{self.web_url(typ, r.id)}/discussions/{d['num']}",
                    }
                )
            if not a[0].isdigit() or not 1 <= int(a[0]) <= len(ds):
                raise HubError(404, "Discussion not found")
            d = ds[int(a[0]) - 1]
            if len(a) == 1:
                return web.json_response(self.dview(r, d, True))
            p = json.loads(body or "{}") or {}
            if a[1] == "comment":
                e = self.event(
                    "comment",
                    u,
                    {
                        "edited": False,
                        "hidden": False,
                        "latest": {
                            "raw": p["comment"],
                            "html": "",
                            "updatedAt": now(),
                            "author": {"name": u["name"]},
                        },
                    },
                )
                res = {"newMessage": e}
            elif a[1] == "title":
                e = self.event("title-change", u, {"from": d["title"], "to": p["title"]})
                d["title"] = p["title"]
                res = {"newTitle": e}
            elif a[1] == "status":
                e = self.event("status-change", u, {"status": p["status"]})
                d["status"] = p["status"]
                res = {"newStatus": e}
            elif a[1] == "merge":
                self.repo(req, typ, rid, write=True)
                if d["status"] == "draft":
                    raise HubError(400, "Cannot merge a draft pull request")
                pr, base = r.resolve(f"refs/pr/{d['num']}"), r.resolve(d["target"])
                tree = (
                    r.git("merge-tree", "--write-tree", base, pr, check=False)
                    .decode()
                    .split("\n")[0]
                )
                if not tree:
                    raise HubError(409, "Merge conflict")
                who = {
                    f"GIT_{k}_{v}": x
                    for k in ("AUTHOR", "COMMITTER")
                    for v, x in (("NAME", u["name"]), ("EMAIL", "x@x"))
                }
                oid = (
                    r.git(
                        "commit-tree",
                        tree,
                        "-p",
                        base,
                        "-p",
                        pr,
                        "-m",
                        f"{d['title']} (#{d['num']})",
                        env=who,
                    )
                    .decode()
                    .strip()
                )
                r.git("update-ref", d["target"], oid, base)
                d["status"], d["merge"] = "merged", oid
                e = self.event("status-change", u, {"status": "merged"})
                res = {}
            else:
                raise HubError(404, "Not found")
            d["events"].append(e)
            r.save()
            return web.json_response(res)

    # ------------------------------------------------------------------ git smart http (plain `git clone` / `git push`)
    async def git_http(self, req, typ, rid, rest):
        r = self.store.get(typ, rid)
        push = rest[-1] == "git-receive-pack" or req.query.get("service") == "git-receive-pack"
        try:
            u = self.user(req)
            if (r is None or r.meta["private"] or push) and u is None:
                raise HubError(401, "Authentication required")
        except HubError as e:
            if e.status == 401:
                return web.Response(
                    status=401, headers={"WWW-Authenticate": 'Basic realm="hub"'}, text=e.message
                )
            raise
        r = self.repo(req, typ, rid, write=push)
        body = await req.read()
        env = {
            **os.environ,
            "GIT_PROJECT_ROOT": str(r.path),
            "GIT_HTTP_EXPORT_ALL": "1",
            "PATH_INFO": "/" + "/".join(rest),
            "REQUEST_METHOD": req.method,
            "QUERY_STRING": req.query_string,
            "CONTENT_TYPE": req.headers.get("Content-Type", ""),
            "CONTENT_LENGTH": str(len(body)),
            "REMOTE_USER": u["name"] if u else "",
            "HTTP_CONTENT_ENCODING": req.headers.get("Content-Encoding", ""),
            "GIT_PROTOCOL": req.headers.get("Git-Protocol", ""),
        }
        p = await asyncio.create_subprocess_exec(
            "git", "http-backend", stdin=-1, stdout=-1, stderr=-1, env=env
        )
        out, err = await p.communicate(body)
        head, _, data = out.partition(b"\r\n\r\n")
        hs, status = {}, 200
        for ln in head.decode().split("\r\n"):
            k, _, v = ln.partition(": ")
            if k.lower() == "status":
                status = int(v.split()[0])
            elif k:
                hs[k] = v
        return web.Response(status=status, headers=hs, body=data)
