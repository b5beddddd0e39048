"""Make the data files of this folder from rows {"text", "source", "doc"}: `python build.py CORPORA
BENCHMARKS`.

CORPORA holds `<domain>.train.jsonl.xz` and `<domain>.heldout.jsonl.xz`, BENCHMARKS
`arc_easy.jsonl.xz`. Only sources that may be passed on are taken (README.md beside this file).
Every document goes whole into one of train, search and test, chosen by the hash of its name; search
and test items are the beginnings of passages, about 100 tokens each.
"""

import hashlib
import json
import lzma
import sys
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
SOURCES = {
    "ja": {"wagahai"},
    "zh": {"china-law"},
    "math": {"math-4500"},
    "code": {"algorithms", "more_itertools", "boltons", "networkx", "toolz"},
    "en": {"wikipedia"},
}
ITEM_CHARACTERS = {"ja": 160, "zh": 160, "math": 330, "code": 360, "en": 450}
TRAIN_CHARACTERS = {"ja": 130_000, "zh": 130_000, "math": 300_000, "code": 300_000}
N_ITEMS = 64
N_CHAPTERS_HELD_OUT = {"search": {"ch03"}, "test": {"ch05"}}


def rows(folder: Path, name: str) -> Iterator[dict[str, str]]:
    """Yield the rows of one compressed JSONL file."""
    with lzma.open(folder / f"{name}.jsonl.xz", "rt", encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def place(text: str) -> float:
    """Return a number in [0, 1) that depends on the text only."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) / 2**32


def split_of(domain: str, doc: str) -> str:
    """Return the split a whole document belongs to; the novel is split by chapter."""
    if domain == "ja":
        return next(
            (split for split, chapters in N_CHAPTERS_HELD_OUT.items() if doc in chapters), "train"
        )
    at = place(doc)
    held_out = 0.5 if domain == "en" else 0.15
    return "search" if at < held_out else "test" if at < 2 * held_out else "train"


def passages(domain: str, text: str) -> Iterator[str]:
    """Yield passages of a document, at most four, spread over it; problems and short texts once."""
    size = ITEM_CHARACTERS[domain]
    if domain in ("math", "en"):
        yield text[:size]
        return
    lines = text.split("\n")
    for start in range(0, len(lines), max(1, len(lines) // 4)):
        passage = "\n".join(lines[start:])[:size]
        if len(passage) > 0.8 * size:
            yield passage


def write(name: str, items: list[dict[str, str]]) -> None:
    """Write a compressed JSONL file."""
    with lzma.open(HERE / f"{name}.jsonl.xz", "wt", encoding="utf-8", preset=9) as file:
        for item in items:
            file.write(json.dumps(item, ensure_ascii=False) + "\n")


def build_domain(corpora: Path, domain: str) -> None:
    """Write train, search and test files of one domain."""
    found = [
        row
        for part in ("train", "heldout")
        for row in rows(corpora, f"{domain}.{part}")
        if row["source"] in SOURCES[domain]
    ]
    found.sort(key=lambda row: place(row["doc"] + row["text"][:200]))
    for split in ("search", "test"):
        pool = [row for row in found if split_of(domain, row["doc"]) == split]
        items = [
            {"text": passage, "source": row["source"], "doc": row["doc"]}
            for row in pool
            for passage in passages(domain, row["text"])
            if len(passage.encode()) > 200
        ]
        items.sort(key=lambda item: place(item["text"]))
        write(f"{domain}.{split}", items[:N_ITEMS])
    if domain in TRAIN_CHARACTERS:
        taken, size = [], 0
        for row in found:
            if split_of(domain, row["doc"]) == "train" and size < TRAIN_CHARACTERS[domain]:
                taken.append(row)
                size += len(row["text"])
        write(f"{domain}.train", taken)


def main(corpora: Path, benchmarks: Path) -> None:
    """Build everything."""
    for domain in SOURCES:
        build_domain(corpora, domain)
    questions = sorted(rows(benchmarks, "arc_easy"), key=lambda row: place(row["query"]))
    short = [
        row for row in questions if len(row["query"]) < 160 and max(map(len, row["choices"])) < 60
    ]
    write("arc_easy.search", short[:60])
    write("arc_easy.test", short[60:120])


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
