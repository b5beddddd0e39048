"""Training corpora + the items of objectives -> which items share an n-gram with the training text.

An overlap is 13 consecutive units in common (Brown et al. 2020, arXiv 2005.14165, appendix C). A
unit is a word, or one character of a script without spaces; case, punctuation and Unicode
compatibility forms do not matter. Only the n-grams of the items are in memory, so a corpus may be
larger than that. All items in the hash range of a term are checked, even those that its `limit`
leaves out.
"""

import re
import unicodedata
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import compress, count
from typing import Any

from optimer_hf.corpus.config import CorpusConfig
from optimer_hf.corpus.documents import read_documents
from optimer_hf.errors import CorpusError
from optimer_hf.files.text import markdown_table
from optimer_hf.progress import Meter
from optimer_hf.scoring.items import indices_within
from optimer_hf.scoring.objective import Objective, Term
from optimer_hf.scoring.tasks import load_tasks

N = 13
SHORTEST = 8  # units; the smallest n of Brown et al.
# scripts without spaces, by the beginning of their characters' Unicode names
UNSPACED = re.compile("CJK|IDEOGRAPHIC|BOPOMOFO|HIRAGANA|KATAKANA|THAI |LAO |KHMER|MYANMAR")
Ngram = tuple[str, ...]


@dataclass(frozen=True)
class Overlap:
    """An item and the first training document that shares an n-gram with it."""

    item: int  # from 0, as lm-eval's doc_id
    ngram: str
    corpus: str
    document: int  # from 1, in file order


@dataclass(frozen=True)
class TermOverlap:
    """The items of one term that share an n-gram with the training text."""

    term: str
    n_items: int
    n_too_short: int
    overlaps: list[Overlap]

    @property
    def share(self) -> float:
        """Share of overlapping items among all items, with those too short to be checked."""
        return len(self.overlaps) / max(self.n_items, 1)


class _UnitTable(dict[int, str]):
    """A table for str.translate, after which str.split gives the units; fills itself on demand."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        category = unicodedata.category(character)
        unit = f" {character} " if UNSPACED.match(unicodedata.name(character, "")) else character
        other = "" if category == "Cf" else " "  # soft hyphens and joiners do not end a word
        self[code] = unit if category[0] in "LMN" else other  # letters, marks and numbers
        return self[code]


_UNITS = _UnitTable()


def units(text: str) -> list[str]:
    """Return the words of a text, or its characters in scripts without spaces; no punctuation."""
    return unicodedata.normalize("NFKC", text).casefold().translate(_UNITS).split()


def windows(sequence: Sequence[str], length: int) -> Iterator[Ngram]:
    """Yield every run of `length` consecutive units."""
    return zip(*(sequence[start:] for start in range(length)), strict=False)


def ngrams(text: str, n: int) -> set[Ngram]:
    """Return the n-grams of an item; a short item as a whole, and a very short one not at all."""
    own = units(text)
    return set(windows(own, min(n, len(own)))) if len(own) >= min(n, SHORTEST) else set()


def item_texts(term: Term, task: Any) -> list[str]:
    """Return the text of each item of a loaded lm-eval task. For a text file, that is the text
    field; for other tasks, all strings of a row, nested ones too, joined by line breaks.
    """
    rows = task.eval_docs
    return ["\n".join(_strings(row[term.text_field] if term.text else row)) for row in rows]


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | Sequence):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _strings(part)


def check_overlap(
    corpora: Sequence[CorpusConfig], objectives: Mapping[str, Objective], *, n: int = N
) -> list[TermOverlap]:
    """Look for the items of all terms in the corpora; the result calls a term `objective: label`.

    Raises EvaluationError for a task that cannot be loaded, before any corpus is read, and
    CorpusError for a corpus that cannot be read or holds no text.
    """
    texts: dict[str, list[str]] = {}
    numbers: dict[str, list[int]] = {}
    for name, objective in objectives.items():
        tasks = load_tasks([objective])
        for term in objective.scored_terms:
            if term.function is not None:  # only the function knows its items
                continue
            title, task = f"{name}: {term.label}", tasks[term.task_key]
            numbers[title] = indices_within(task, term.hash_range, objective.split_by)
            every = item_texts(term, task)
            texts[title] = [every[number] for number in numbers[title]]
    return [
        replace(
            each,
            overlaps=[replace(one, item=numbers[each.term][one.item]) for one in each.overlaps],
        )
        for each in find_overlaps(corpora, texts, n=n)
    ]


def find_overlaps(
    corpora: Sequence[CorpusConfig], texts: Mapping[str, Sequence[str]], *, n: int = N
) -> list[TermOverlap]:
    """Look for items, given as texts by term, in the corpora; report each item once."""
    owners: dict[Ngram, list[tuple[str, int]]] = {}
    n_too_short = dict.fromkeys(texts, 0)
    for term, items in texts.items():
        for item, text in enumerate(items):
            grams = ngrams(text, n)
            n_too_short[term] += not grams
            for gram in grams:
                owners.setdefault(gram, []).append((term, item))
    overlaps: dict[str, dict[int, Overlap]] = {term: {} for term in texts}
    for corpus, document, gram in _find_shared(corpora, owners):
        for term, item in owners[gram]:
            overlaps[term].setdefault(item, Overlap(item, " ".join(gram), corpus, document))
    return [
        TermOverlap(term, len(texts[term]), n_too_short[term], [each[i] for i in sorted(each)])
        for term, each in overlaps.items()
    ]


def _find_shared(
    corpora: Sequence[CorpusConfig], wanted: Collection[Ngram]
) -> Iterator[tuple[str, int, Ngram]]:
    """Yield corpus, number of the document, and n-gram, wherever a wanted n-gram occurs."""
    lengths = {len(gram) for gram in wanted}
    shortest = min(lengths, default=1)
    beginnings = {gram[:shortest] for gram in wanted}  # one pass, in C, finds all lengths
    with Meter("check overlap", len(corpora), "corpora") as meter:
        for corpus in corpora:
            number = n_units = 0
            for number, text in enumerate(read_documents(corpus), start=1):
                own = units(text)
                n_units += len(own)
                is_start = map(beginnings.__contains__, windows(own, shortest))
                for start in compress(count(), is_start):
                    for length in lengths:
                        gram = tuple(own[start : start + length])
                        if gram in wanted:
                            yield corpus.name, number, gram
            if n_units == 0:
                raise CorpusError(
                    f"{corpus.name}: holds no text, so nothing would be checked. Give the corpus "
                    "that the vector was trained on."
                )
            meter.advance(1, f"{number:,} documents of {corpus.name}")


def to_markdown(terms: Sequence[TermOverlap]) -> str:
    """Return a Markdown table of how many items of each term overlap."""
    header = ["term", "items", "overlapping", "share", "too short"]
    rows = [
        [
            term.term,
            f"{term.n_items:,}",
            f"{len(term.overlaps):,}",
            f"{100 * term.share:.2f} %",
            f"{term.n_too_short:,}",
        ]
        for term in terms
    ]
    return markdown_table(header, rows)
