"""Make the data files of this folder from rows {"text", "source", "doc"}: `python build.py CORPORA
BENCHMARKS`.

CORPORA holds `<domain>.train.jsonl.xz` and `<domain>.heldout.jsonl.xz`, BENCHMARKS the items of
benchmarks. Only sources that may be passed on are taken (README.md beside this file); `fetch.py`
makes more training text. Every document goes whole into one of train, search and test, chosen by
the hash of its name (a chapter is a document of the novel). Search and test items are the
beginnings of passages, about 60 tokens each, drawn from as many documents as there are, that share
no 13-gram with the training files.
"""

import hashlib
import json
import lzma
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from optimer_hf.scoring.overlap import N, Ngram, ngrams

HERE = Path(__file__).parent
Row = dict[str, Any]

SOURCES = {
    "ja": {"wagahai"},
    "zh": {"china-law"},
    "math": {"math-4500"},
    "code": {"algorithms", "more_itertools", "boltons", "networkx", "toolz"},
    "en": {"wikipedia"},
}
SHARE_ALIKE = {"ja-handbook": "ja", "zh-handbook": "zh"}  # train only, in files of their own
ITEM_CHARACTERS = {"ja": 90, "zh": 100, "math": 200, "code": 220, "en": 270}
ITEM_BYTES = 120
N_ITEMS = 300
HELD_OUT = {"zh": 0.12, "math": 0.08, "code": 0.1, "en": 0.5}  # share of search, and of test
CHAPTERS = {"ch02": "search", "ch10": "test"}
START = {  # where a passage may begin: a sentence, a problem, a paragraph
    "ja": r"(?<=[。\n])(?=[^。」\n])|(?<=」)(?=「)",
    "zh": r"(?<=[。\n])(?=[^。\n])",
    "math": r"\A",
    "code": r"(?<=\n)(?=\S)|(?<=\n\n)(?=.)",
    "en": r"\A",
}


def place(text: str) -> float:
    """Return a number in [0, 1) that depends on the text only."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) / 2**32


def split_of(domain: str, doc: str) -> str:
    """Return the split a whole document belongs to."""
    if domain == "ja":
        return CHAPTERS.get(doc, "train")
    at, share = place(doc), HELD_OUT[domain]
    return "search" if at < share else "test" if at < 2 * share else "train"


def passages(domain: str, text: str) -> Iterator[str]:
    """Yield the beginnings of passages that do not overlap."""
    size, end = ITEM_CHARACTERS[domain], 0
    for start in (0, *(match.start() for match in re.finditer(START[domain], text))):
        passage = text[start : start + size].strip()
        if start >= end and len(passage) > 0.9 * size and len(passage.encode()) >= ITEM_BYTES:
            yield passage
            end = start + size


def items(domain: str, rows: Iterable[Row], trained: set[Ngram]) -> list[Row]:
    """Return N_ITEMS passages, as few of each document as will do, in the order of documents."""
    by_doc: dict[str, dict[str, Row]] = defaultdict(dict)
    for row in rows:
        for passage in passages(domain, row["text"]):
            if not ngrams(passage, N) & trained:
                by_doc[row["doc"]][passage] = row | {"text": passage}
    ranked = [
        (rank, place(text), row)
        for found in by_doc.values()
        for rank, (text, row) in enumerate(sorted(found.items(), key=lambda item: place(item[0])))
    ]
    chosen = [row for _, _, row in sorted(ranked, key=lambda item: item[:2])[:N_ITEMS]]
    return sorted(chosen, key=lambda row: (row["source"], row["doc"], place(row["text"])))


def read(path: Path) -> list[Row]:
    """Return the rows of a compressed JSONL file."""
    with lzma.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def write(name: str, rows: Iterable[Row]) -> None:
    """Write a compressed JSONL file beside this one."""
    with lzma.open(HERE / f"{name}.jsonl.xz", "wt", encoding="utf-8", preset=9) as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def build_domain(corpora: Path, domain: str) -> None:
    """Write the train, search and test files of one domain."""
    split: dict[str, list[Row]] = defaultdict(list)
    names = [f"{domain}.{part}.jsonl.xz" for part in ("train", "heldout")]
    rows = [row for name in names for row in read(corpora / name)]
    rows.sort(key=lambda row: place(row["doc"] + row["text"]))
    for row in rows:
        if row["source"] in SOURCES[domain]:
            split[split_of(domain, row["doc"])].append(row)
    files = {f"{domain}.train": split["train"]} if domain != "en" else {}
    for name in (name for name, of in SHARE_ALIKE.items() if of == domain):
        files[f"{name}.train"] = [row for row in rows if row["source"] == "debian-handbook"]
    trained: set[Ngram] = set()
    for found in files.values():
        trained.update(*(ngrams(row["text"], N) for row in found))
    for half in ("search", "test"):
        files[f"{domain}.{half}"] = items(domain, split[half], trained)
    if domain == "en":  # general text for `replay:`, from the paragraphs that are no items
        held_out = [row for half in ("search", "test") for row in files[f"{domain}.{half}"]]
        docs = {row["doc"] for row in held_out}
        seen: set[Ngram] = set().union(*(ngrams(row["text"], N) for row in held_out))
        files[f"{domain}.train"] = [
            row
            for row in (*split["search"], *split["test"])
            if row["doc"] not in docs and not ngrams(row["text"], N) & seen
        ]
    for name, found in files.items():
        write(name, found)


def worked(row: Row) -> Row:
    """Return a word problem with its solution in plain words: no calculator marks, no last line."""
    solution = re.sub(r"<<.*?>>", "", row["answer"]).split("####")[0].strip()
    return {"question": row["question"], "solution": solution, "target": row["target"]}


def build_benchmarks(folder: Path) -> None:
    """Write the two halves of every benchmark; a problem and its translations are in one half."""
    problems = read(folder / "gsm8k.jsonl.xz")
    found: dict[str, list[tuple[str, Row]]] = {  # (what decides the half, item)
        "gsm8k": [(row["question"], worked(row)) for row in problems],
        "humaneval": [
            (row["prompt"], {"prompt": row["prompt"], "solution": row["canonical_solution"]})
            for row in read(folder / "humaneval.jsonl.xz")
        ],
        "mbpp": [
            (
                row["text"],
                {
                    "question": row["text"],
                    "test": row["test_list"][0],
                    "solution": row["code"].replace("\r\n", "\n").strip(),
                },
            )
            for row in read(folder / "mbpp.jsonl.xz")
        ],
    }
    for name in ("gsm_symbolic_eng", "gsm_symbolic_jpn", "gsm_symbolic_zho"):
        rows = read(folder / f"{name}.jsonl.xz")
        found[name] = [(problems[row["id_orig"]]["question"], worked(row)) for row in rows]
    for name in ("arc_easy", "arc_challenge"):
        found[name] = [(row["query"], row) for row in read(folder / f"{name}.jsonl.xz")]
    for name, rows in found.items():
        rows.sort(key=lambda item: place(item[0]))
        for half in ("search", "test"):
            items = [row for key, row in rows if (place(key) < 0.5) == (half == "search")]
            write(f"benchmarks/{name}.{half}", items)


def main(corpora: Path, benchmarks: Path) -> None:
    """Build everything."""
    for domain in SOURCES:
        build_domain(corpora, domain)
    (HERE / "benchmarks").mkdir(exist_ok=True)
    build_benchmarks(benchmarks)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
