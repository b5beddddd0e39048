"""Xet CAS (content-addressed storage) over HTTP: the v1 endpoints of the public Xet protocol.

v2 routes are answered 404, which the reference client treats as "fall back to v1".
"""

from __future__ import annotations

import os
import struct
import tempfile
import threading
from pathlib import Path

BOOKEND = b"\xff" * 32
F_VERIF, F_META = 1 << 31, 1 << 30


def hex_of(h: bytes) -> str:
    """Xet hash -> string: four little-endian u64 words."""
    return "".join(f"{w:016x}" for w in struct.unpack("<4Q", h))


class Cas:
    def __init__(self, root: Path):
        self.root = Path(root)
        (self.root / "xorbs").mkdir(parents=True, exist_ok=True)
        (self.root / "shards").mkdir(parents=True, exist_ok=True)
        self.files: dict[
            str, list[tuple[str, int, int, int]]
        ] = {}  # file hash -> [(xorb, unpacked, start, end)]
        self.by_sha: dict[str, str] = {}  # sha256 -> file hash
        self.offsets: dict[
            str, list[tuple[int, int]]
        ] = {}  # xorb -> [(byte offset, unpacked size)]
        self.lock = threading.RLock()
        self.stats = {
            "xorbs": 0,
            "xorb_bytes": 0,
            "shards": 0,
            "reconstructions": 0,
            "xorb_gets": 0,
        }
        for p in (self.root / "shards").iterdir():
            self.index_shard(p.read_bytes())

    # ---- xorbs
    def xorb_path(self, h: str) -> Path:
        return self.root / "xorbs" / h

    def put_xorb(self, h: str, data: bytes) -> bool:
        with self.lock:
            p = self.xorb_path(h)
            if p.exists():
                return False
            self.chunks_of(data)  # structural validation
            fd, tmp = tempfile.mkstemp(dir=self.root)
            with os.fdopen(fd, "wb") as f:
                f.write(data)
            os.replace(tmp, p)
            self.stats["xorbs"] += 1
            self.stats["xorb_bytes"] += len(data)
            return True

    @staticmethod
    def chunks_of(data: bytes) -> list[tuple[int, int]]:
        out, pos = [], 0
        while pos + 8 <= len(data):
            if data[pos : pos + 7] == b"XETBLOB":  # optional footer
                break
            version = data[pos]
            clen = int.from_bytes(data[pos + 1 : pos + 4], "little")
            ulen = int.from_bytes(data[pos + 5 : pos + 8], "little")
            if version != 0 or data[pos + 4] > 2 or pos + 8 + clen > len(data):
                raise ValueError("malformed xorb")
            out.append((pos, ulen))
            pos += 8 + clen
        out.append((pos, 0))  # sentinel: end of chunk data
        return out

    def xorb_chunks(self, h: str):
        with self.lock:
            if h not in self.offsets:
                self.offsets[h] = self.chunks_of(self.xorb_path(h).read_bytes())
            return self.offsets[h]

    # ---- shards
    def put_shard(self, data: bytes) -> int:
        with self.lock:
            n = self.index_shard(data, check=True)
            p = self.root / "shards" / f"{self.stats['shards']:08d}-{os.urandom(4).hex()}"
            p.write_bytes(data)
            self.stats["shards"] += 1
            return n

    def index_shard(self, data: bytes, check=False) -> int:
        pos, files = 48, []
        while data[pos : pos + 32] != BOOKEND:
            fh, (flags, n) = data[pos : pos + 32], struct.unpack_from("<II", data, pos + 32)
            pos += 48
            segs = []
            for _ in range(n):
                xh, (_f, ul, s, e) = data[pos : pos + 32], struct.unpack_from("<4I", data, pos + 32)
                if check and not self.xorb_path(hex_of(xh)).exists():
                    raise ValueError(f"shard references unknown xorb {hex_of(xh)}")
                segs.append((hex_of(xh), ul, s, e))
                pos += 48
            if flags & F_VERIF:
                pos += 48 * n
            sha = None
            if flags & F_META:
                # the sha256 is carried as an Xet hash: same little-endian word order when printed
                sha = hex_of(data[pos : pos + 32])
                pos += 48
            files.append((hex_of(fh), sha, segs))
        for fh, sha, segs in files:
            self.files[fh] = segs
            if sha:
                self.by_sha[sha] = fh
        return len(files)

    # ---- reconstruction
    def size(self, fh: str) -> int:
        return sum(s[1] for s in self.files[fh])

    def reconstruct(self, fh: str, start: int | None, end: int | None, url: str) -> dict | None:
        """v1 response for bytes [start, end] (inclusive); None when start is past the end."""
        self.stats["reconstructions"] += 1
        total = self.size(fh)
        s = start or 0
        e = min(end if end is not None else total - 1, total - 1)
        if s >= total and total > 0:
            return None
        terms, fetch, pos, offset = [], {}, 0, 0
        for xorb, ul, a, b in self.files[fh]:
            t0, t1 = pos, pos + ul
            pos = t1
            if t1 <= s or t0 > e:
                continue
            ch = self.xorb_chunks(xorb)
            # trim whole chunks outside the range
            cur, a2, b2, first, unpacked = t0, None, a, 0, 0
            for i in range(a, b):
                c0, c1 = cur, cur + ch[i][1]
                cur = c1
                if c1 <= s or c0 > e:
                    continue
                if a2 is None:
                    a2, first = i, c0
                b2 = i + 1
                unpacked += ch[i][1]
            if a2 is None:
                continue
            if not terms:
                offset = s - first
            terms.append(
                {"hash": xorb, "unpacked_length": unpacked, "range": {"start": a2, "end": b2}}
            )
            rng = {
                "range": {"start": a2, "end": b2},
                "url": f"{url}/{xorb}",
                "url_range": {"start": ch[a2][0], "end": ch[b2][0] - 1},
            }
            if rng not in fetch.setdefault(xorb, []):
                fetch[xorb].append(rng)
        return {"offset_into_first_range": offset, "terms": terms, "fetch_info": fetch}
