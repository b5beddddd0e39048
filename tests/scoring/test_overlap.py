"""Overlap between training text and evaluation items: against a naive search, in several scripts,
and as a person runs it.
"""

import gzip
import json
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from optimer_hf.cli import main
from optimer_hf.corpus.config import CorpusConfig
from optimer_hf.errors import CorpusError, EvaluationError
from optimer_hf.scoring.objective import Objective
from optimer_hf.scoring.overlap import SHORTEST, check_overlap, find_overlaps, units

ENGLISH = (
    "A farmer sold seventeen baskets of ripe apples at the market before noon, then walked home."
)
JAPANESE = "駅前の小さな本屋では、毎週土曜日に子ども向けの読み聞かせ会が開かれている。"
CHINESE = "老师说，明天早上八点我们在学校门口集合，然后一起坐车去博物馆参观。"  # noqa: RUF001
THAI = "ภาษาไทยเขียนติดกันโดยไม่เว้นวรรคระหว่างคำ"
MIXED = "この関数 def read_file は、引数 path のファイルを UTF-8 で読み、行のリストを返す。"

TASK = """
task: quiz
dataset_path: json
dataset_kwargs: {data_files: {test: quiz.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices.text}}"
doc_to_target: label
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
metadata: {version: 1}
"""


def write_texts(path: Path, texts, field: str = "text") -> Path:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({field: text}) + "\n" for text in texts)
    return path


def write_yaml(path: Path, data) -> Path:
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    return path


@pytest.fixture
def overlaps(tmp_path):
    """Return a function corpus texts, item texts -> the overlaps of one term."""

    def find(documents: list[str], items: list[str], **options):
        corpus = CorpusConfig(path=write_texts(tmp_path / "corpus.jsonl", documents))
        (term,) = find_overlaps([corpus], {"term": items}, **options)
        return term

    return find


def found_in(term) -> list[int]:
    return [each.item for each in term.overlaps]


# -- units -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The cat's  HAT,\n(red)!", ["the", "cat", "s", "hat", "red"]),
        ("Straße ΟΔΟΣ", ["strasse", "οδοσ"]),
        ("snake_case = f(x1) + 3.5", ["snake", "case", "f", "x1", "3", "5"]),
        ("東京タワー、行った。", list("東京タワー行った")),
        ("时时刻刻々〇", list("时时刻刻々〇")),
        ("ＡＢＣ１２ ﾊﾞｽ", ["abc12", "バ", "ス"]),  # noqa: RUF001
        ("機械learningの本2冊", ["機", "械", "learning", "の", "本", "2", "冊"]),
        ("한국어 문장", ["한국어", "문장"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("co\u00adop\u200bera\u200dtion", ["cooperation"]),
        ("cafe\u0301", ["caf\u00e9"]),
        ("ไทย ลาว ខ្មែរ မြန်မာ 𠮷", list("ไทยลาวខ្មែរမြန်မာ𠮷")),
        ("🙂 -- ¿?", []),
    ],
)
def test_units_are_words_or_characters_of_scripts_without_spaces(text, expected):
    assert units(text) == expected


# -- what is found ---------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [ENGLISH, JAPANESE, CHINESE, THAI, MIXED])
def test_an_item_inside_a_longer_document_is_found_in_every_script(overlaps, text):
    others = [other for other in (ENGLISH, JAPANESE, CHINESE, THAI, MIXED) if other != text]
    term = overlaps(["nothing", f"Before it 前。{text} After it 後。"], [*others, text])
    assert found_in(term) == [4]
    assert term.share == 1 / 5
    (only,) = term.overlaps
    assert (only.corpus, only.document) == ("corpus.jsonl", 2)
    assert only.ngram == " ".join(units(text)[:13])


def test_case_punctuation_and_spacing_hide_nothing(overlaps):
    shouted = ENGLISH.upper().replace(" ", " -- ")
    wrapped = JAPANESE.replace("、", "\n").replace("土曜日", "「土曜日」")
    assert found_in(overlaps([shouted, wrapped], [ENGLISH, JAPANESE])) == [0, 1]


def test_the_same_words_in_another_order_are_no_overlap(overlaps):
    words = ENGLISH.split()
    term = overlaps([" ".join(sorted(words))], [ENGLISH])
    assert found_in(term) == []
    assert term.share == 0


def test_thirteen_units_in_common_are_an_overlap_and_twelve_are_none(overlaps):
    words = units(ENGLISH)
    for n, expected in ((13, [0]), (12, [])):
        assert found_in(overlaps([" ".join(words[1 : 1 + n]) + " etc"], [ENGLISH])) == expected
    assert found_in(overlaps([" ".join(words[1:13])], [ENGLISH], n=12)) == [0]


def test_words_at_the_end_of_one_document_and_the_start_of_the_next_are_not_joined(overlaps):
    words = ENGLISH.split()
    assert found_in(overlaps([" ".join(words[:8]), " ".join(words[8:])], [ENGLISH])) == []


def test_an_item_that_occurs_often_is_reported_once_where_it_is_first(tmp_path):
    first = CorpusConfig(path=write_texts(tmp_path / "a.jsonl", ["x", "y"]))
    second = CorpusConfig(path=write_texts(tmp_path / "b.jsonl.gz", ["x", ENGLISH, ENGLISH * 2]))
    (term,) = find_overlaps([first, second, second], {"term": [ENGLISH]})
    assert [(o.corpus, o.document) for o in term.overlaps] == [("b.jsonl.gz", 2)]


def test_an_item_of_two_terms_is_reported_for_both(tmp_path):
    corpus = CorpusConfig(path=write_texts(tmp_path / "a.jsonl", [ENGLISH]))
    terms = find_overlaps([corpus], {"a": [ENGLISH], "b": [CHINESE, ENGLISH]})
    assert [(t.term, found_in(t)) for t in terms] == [("a", [0]), ("b", [1])]


# -- short items -----------------------------------------------------------------------------------


def test_an_item_shorter_than_n_is_looked_for_as_a_whole(overlaps):
    short = "one two three four five six seven eight"
    assert found_in(overlaps([f"zero {short} nine"], [short])) == [0]
    assert found_in(overlaps([short.replace("four", "for")], [short])) == []
    assert found_in(overlaps([short.removesuffix(" eight")], [short])) == []


def test_items_of_fewer_than_eight_units_are_counted_as_too_short(overlaps):
    items = ["one two three four five six seven", "", "短い問題です", ENGLISH]
    term = overlaps([" ".join(items)], items)
    assert (found_in(term), term.n_too_short, term.n_items) == ([3], 3, 4)


def test_a_small_n_checks_items_of_that_many_units(overlaps):
    term = overlaps(["a b c d"], ["b c d", "b c"], n=3)
    assert (found_in(term), term.n_too_short) == ([0], 1)


# -- the law ---------------------------------------------------------------------------------------

WORDS = st.lists(st.sampled_from(["a", "b", "12", "語", "の", "ü"]), max_size=24)


def contains(document: list[str], run: list[str]) -> bool:
    starts = range(len(document) - len(run) + 1)
    return any(document[start : start + len(run)] == run for start in starts)


def naively_overlaps(item: list[str], documents: list[list[str]], n: int) -> bool:
    length = min(n, len(item))
    if length < min(n, SHORTEST):
        return False
    runs = [item[start : start + length] for start in range(len(item) - length + 1)]
    return any(contains(document, run) for document in documents for run in runs)


@given(st.lists(WORDS, min_size=1, max_size=5), st.lists(WORDS, max_size=5), st.integers(1, 13))
def test_exactly_the_items_a_naive_search_finds_are_found(
    tmp_path_factory, documents, items, n: int
):
    path = tmp_path_factory.getbasetemp() / "law.jsonl"
    write_texts(path, ["some text", *(", ".join(document).upper() for document in documents)])
    (term,) = find_overlaps(
        [CorpusConfig(path=path)], {"term": [" ".join(item) for item in items]}, n=n
    )
    expected = [i for i, item in enumerate(items) if naively_overlaps(item, documents, n)]
    assert found_in(term) == expected
    for each in term.overlaps:
        assert contains(documents[each.document - 2], each.ngram.split())


@given(st.data(), WORDS.filter(lambda words: len(words) >= 13), WORDS, WORDS)
def test_an_item_with_n_consecutive_units_of_a_document_is_always_found(
    tmp_path_factory, data, document, before, after
):
    start = data.draw(st.integers(0, len(document) - 13))
    item = " ".join([*before, *document[start : start + 13], *after])
    path = tmp_path_factory.getbasetemp() / "always.jsonl"
    corpus = CorpusConfig(path=write_texts(path, [" ".join(document)]))
    (term,) = find_overlaps([corpus], {"term": [item]})
    assert found_in(term) == [0]


# -- terms of an objective -------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """A folder with an lm-eval task, a held-out text, and corpora with and without overlap."""
    rows = [
        {
            "id": 7,
            "question": "Which of these is it?",
            "choices": {"text": ["no", "never"]},
            "label": 0,
        },
        {"id": 8, "question": "Say it.", "choices": {"text": ["no", ENGLISH]}, "label": 1},
    ]
    lines = [json.dumps(row) + "\n" for row in rows]
    (tmp_path / "quiz.jsonl").write_text("".join(lines), encoding="utf-8")
    (tmp_path / "quiz.yaml").write_text(TASK, encoding="utf-8")
    write_texts(tmp_path / "held-out.jsonl", [CHINESE, JAPANESE], field="body")
    write_texts(tmp_path / "dirty.jsonl.gz", ["clean", f"He said: {ENGLISH}", JAPANESE])
    (tmp_path / "clean.txt").write_text("Nothing that anybody asks.", encoding="utf-8")
    objective = {
        "include_path": ".",
        "limit": 1,
        "terms": [{"task": "quiz", "metric": "acc"}],
        "constraints": [
            {
                "name": "ja",
                "text": "held-out.jsonl",
                "text_field": "body",
                "max_relative_to_base": 0.1,
            }
        ],
    }
    write_yaml(tmp_path / "objective.yaml", objective)
    return tmp_path


def test_all_strings_of_all_items_count_whatever_the_limit_and_constraints_too(folder):
    objective = Objective.model_validate(
        yaml.safe_load((folder / "objective.yaml").read_text()), context={"folder": folder}
    )
    corpus = CorpusConfig(path=folder / "dirty.jsonl.gz")
    quiz, ja = check_overlap([corpus], {"mine": objective})
    assert (quiz.term, quiz.n_items, quiz.n_too_short) == ("mine: quiz", 2, 1)
    assert [(o.item, o.document) for o in quiz.overlaps] == [(1, 2)]
    assert (ja.term, found_in(ja)) == ("mine: ja", [1])


def test_of_a_text_file_only_the_scored_field_counts(tmp_path):
    row = {"text": CHINESE, "source": ENGLISH}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    corpus = CorpusConfig(path=write_texts(tmp_path / "b.jsonl", [ENGLISH]))
    objective = Objective.model_validate({"terms": [{"text": tmp_path / "a.jsonl"}]})
    (term,) = check_overlap([corpus], {"mine": objective})
    assert found_in(term) == []


def test_a_text_that_does_not_exist_is_named_before_a_corpus_is_read(folder):
    objective = Objective.model_validate(
        {"terms": [{"text": "/none.jsonl"}]}, context={"folder": folder}
    )
    with pytest.raises(EvaluationError, match=r"/none\.jsonl: no such file"):
        check_overlap([CorpusConfig(path=folder / "none.jsonl")], {"mine": objective})


@pytest.mark.parametrize("content", ["", '{"text": "..."}\n'])
def test_a_corpus_without_text_is_refused_as_it_would_pass_unseen(tmp_path, content):
    (tmp_path / "a.jsonl").write_text(content, encoding="utf-8")
    with pytest.raises(CorpusError, match=r"a\.jsonl: holds no text, so nothing would be checked"):
        find_overlaps([CorpusConfig(path=tmp_path / "a.jsonl")], {"term": [ENGLISH]})


# -- the command -----------------------------------------------------------------------------------


def optimer(*arguments, status: int):
    result = CliRunner().invoke(main, ["check-overlap", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == status, result.output
    return result


def test_the_command_prints_a_table_and_examples_and_exits_with_1_on_overlap(folder, monkeypatch):
    monkeypatch.chdir(folder)
    result = optimer("clean.txt", "objective.yaml", "dirty.jsonl.gz", status=1)
    assert result.stdout.splitlines()[:4] == [
        "| term | items | overlapping | share | too short |",
        "| --- | --- | --- | --- | --- |",
        "| objective.yaml: quiz | 2 | 1 | 50.00 % | 1 |",
        "| objective.yaml: ja | 2 | 1 | 50.00 % | 0 |",
    ]
    start = "objective.yaml: quiz: item 1 and document 2 of dirty.jsonl.gz: a farmer sold"
    assert start in result.stderr


def test_without_overlap_the_command_exits_with_0(folder):
    result = optimer(folder / "clean.txt", folder / "objective.yaml", status=0)
    assert "| 2 | 0 | 0.00 % | 1 |" in result.stdout


def test_json_holds_every_overlap(folder):
    result = optimer(
        folder / "dirty.jsonl.gz", folder / "objective.yaml", "--format", "json", status=1
    )
    quiz, ja = json.loads(result.stdout)
    assert (quiz["n_items"], quiz["n_too_short"], quiz["share"]) == (2, 1, 0.5)
    assert ja["overlaps"] == [
        {
            "item": 1,
            "ngram": " ".join(units(JAPANESE)[:13]),
            "corpus": "dirty.jsonl.gz",
            "document": 3,
        }
    ]


def test_n_and_text_field_reach_the_check(folder):
    near = write_texts(folder / "near.jsonl", ["He sold seventeen baskets of figs."], field="body")
    arguments = [near, folder / "objective.yaml", "--text-field", "body"]
    optimer(*arguments, status=0)
    optimer(*arguments, "--n", 4, status=1)


def test_a_study_is_checked_with_its_sealed_test_against_the_corpora_of_its_training(folder):
    write_texts(folder / "search.jsonl", [CHINESE])
    write_texts(folder / "test.jsonl", [ENGLISH, CHINESE])
    study = {
        "base_model": "a/b",
        "vectors": {"w": {"source": "a/w"}},
        "objective": {"terms": [{"text": "search.jsonl"}]},
        "test": {"terms": [{"name": "search", "text": "test.jsonl"}]},
    }
    train = {"name": "w", "base_model": "a/b", "corpus": {"path": "dirty.jsonl.gz"}}
    mixture = [
        {"path": "clean.txt", "share": 0.5},
        {"path": "search.jsonl", "share": 0.5},
    ]
    mixed = {"name": "m", "base_model": "a/b", "mixture": mixture, "max_tokens": 100}
    files = [
        write_yaml(folder / f"{name}.yaml", data)
        for name, data in (("study", study), ("train", train), ("mixed", mixed))
    ]
    result = optimer(*files[:2], status=1)
    assert "study.yaml objective: search | 1 | 0 | 0.00 % | 0 |" in result.stdout
    assert "study.yaml test: search | 2 | 1 | 50.00 % | 0 |" in result.stdout
    result = optimer(files[0], files[2], status=1)
    assert "study.yaml objective: search | 1 | 1 | 100.00 % | 0 |" in result.stdout


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["objective.yaml"], "found no corpus among the files. Add a JSONL or text file"),
        (
            ["clean.txt"],
            "found no objective among the files. Add an objective.yaml or a study.yaml",
        ),
        (["quiz.yaml", "clean.txt"], "quiz.yaml: found the fields dataset_kwargs, dataset_path"),
        (["objective.yaml", "none.jsonl"], "none.jsonl: no such file"),
        (["objective.yaml", "held-out.jsonl"], "no text in field 'text'; found ['body']"),
    ],
)
def test_what_cannot_be_checked_is_an_error_with_its_fix(folder, monkeypatch, files, message):
    monkeypatch.chdir(folder)
    result = optimer(*files, status=1)
    assert result.stderr.startswith("error: ") and message in result.stderr
    assert result.stdout == ""


def test_only_the_items_of_a_hash_range_are_checked_and_each_in_one_half(tmp_path):
    texts = [f"{ENGLISH} {number}" for number in range(12)]
    held_out = write_texts(tmp_path / "held.jsonl", texts)
    corpus = CorpusConfig(path=write_texts(tmp_path / "corpus.jsonl", texts[:1]))
    halves = {
        name: Objective.model_validate({"terms": [{"text": str(held_out), "hash_range": part}]})
        for name, part in {"low": [0.0, 0.5], "high": [0.5, 1.0]}.items()
    }
    low, high = check_overlap([corpus], halves)
    items = [each.item for term in (low, high) for each in term.overlaps]
    assert sorted(items) == list(range(12)) and low.n_items + high.n_items == 12
    assert low.overlaps and high.overlaps
