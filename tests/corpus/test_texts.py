"""Texts of local files, whoever wrote them: read as they stand, or refused with file and row."""

import bz2
import csv
import gzip
import io
import json
import lzma
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, load_from_disk

from optimer_hf.corpus import texts as texts_module
from optimer_hf.corpus.config import CorpusConfig
from optimer_hf.corpus.documents import read_documents
from optimer_hf.errors import CorpusError
from tests.support.corpora import write_jsonl


@pytest.mark.parametrize(
    ("name", "opener"), [("a.jsonl", open), ("a.jsonl.xz", lzma.open), ("a.jsonl.gz", gzip.open)]
)
def test_jsonl_is_read_in_file_order_whatever_its_compression(tmp_path, name, opener):
    texts = ["first", "zweitens ü", "日本語\nzwei Zeilen"]
    with opener(tmp_path / name, "wt", encoding="utf-8") as file:
        file.write("\n\n".join(json.dumps({"text": text}) for text in texts))
    assert list(read_documents(CorpusConfig(path=tmp_path / name))) == texts


@pytest.mark.parametrize(
    ("name", "opener"), [("a.txt", open), ("a.md", open), ("a.txt.gz", gzip.open)]
)
def test_plain_text_is_one_document(tmp_path, name, opener):
    with opener(tmp_path / name, "wt", encoding="utf-8") as file:
        file.write("line one\n\nline two\n")
    assert list(read_documents(CorpusConfig(path=tmp_path / name))) == ["line one\n\nline two\n"]


def test_text_field_selects_another_field(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ["x", "y"], field="content")
    assert list(read_documents(CorpusConfig(path=tmp_path / "a.jsonl", text_field="content"))) == [
        "x",
        "y",
    ]


def test_a_csv_file_gives_the_texts_of_its_column(tmp_path):
    (tmp_path / "a.csv").write_text("text,n\nhello,1\nworld,2\n")
    assert list(read_documents(CorpusConfig(path=tmp_path / "a.csv"))) == ["hello", "world"]


def test_a_csv_file_without_the_text_field_is_an_error_that_names_the_fields(tmp_path):
    (tmp_path / "a.csv").write_text("body,n\nhello,1\n")
    with pytest.raises(
        CorpusError, match=r"a\.csv: no text in field 'text'; found \['body', 'n'\]"
    ):
        list(read_documents(CorpusConfig(path=tmp_path / "a.csv")))


def test_a_missing_file_of_any_kind_is_named(tmp_path):
    for name in ("gone.jsonl", "gone.txt", "gone.csv"):
        with pytest.raises(CorpusError, match=name.replace(".", r"\.")):
            list(read_documents(CorpusConfig(path=tmp_path / name)))


def test_a_malformed_line_is_named_by_file_and_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n\n{"text": \n')
    with pytest.raises(CorpusError, match=r"a\.jsonl:3: not a JSON object"):
        list(read_documents(CorpusConfig(path=tmp_path / "a.jsonl")))


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ('{"body": "x", "id": 1}', r"\['body', 'id'\]"),
        ('{"text": 3}', "a value of type int there"),
        ('["x"]', "list"),
    ],
)
def test_a_line_without_the_text_field_is_named_with_what_was_found(tmp_path, line, found):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n' + line + "\n")
    with pytest.raises(
        CorpusError, match=rf"a\.jsonl:2: no text in field 'text'; found {found}. Set `text_field`"
    ):
        list(read_documents(CorpusConfig(path=tmp_path / "a.jsonl")))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.xz", "a.txt"])
def test_a_file_of_another_format_than_its_name_says_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"\xff\xfe\x00 neither UTF-8 nor compressed")
    with pytest.raises(CorpusError, match=name.replace(".", r"\.")):
        list(read_documents(CorpusConfig(path=tmp_path / name)))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"text": "a\\ud800b"}', r"a\.jsonl:1: contains half a character"),
        ("a.jsonl", "[" * 10**5, r"a\.jsonl:1: is nested too deeply"),
        ("a.foo", "x", r"a\.foo: found a file that ends in '\.foo'\. Expected \.jsonl"),
        ("a.parquet.gz", "x", r"found a file that ends in '\.gz'\. Expected \.jsonl"),
        ("a.zst", "x", r"found a file that ends in '\.zst'\. Expected \.jsonl"),
        ("a.parquet", "x", r"a\.parquet: `datasets` cannot read it"),
    ],
)
def test_text_that_no_tokenizer_accepts_and_unknown_formats_are_refused(
    tmp_path, name, text, message
):
    (tmp_path / name).write_text(text)
    with pytest.raises(CorpusError, match=message):
        list(read_documents(CorpusConfig(path=tmp_path / name)))


def test_a_truncated_archive_is_an_error_that_names_it(tmp_path):
    whole = lzma.compress(json.dumps({"text": "x" * 1000}).encode())
    (tmp_path / "a.jsonl.xz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CorpusError, match=r"a\.jsonl\.xz"):
        list(read_documents(CorpusConfig(path=tmp_path / "a.jsonl.xz")))


def test_a_number_of_thousands_of_digits_is_refused_with_its_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": "b", "n": ' + "1" * 5000 + "}\n")
    with pytest.raises(CorpusError, match=r"a\.jsonl:2: not a JSON object"):
        list(read_documents(CorpusConfig(path=path)))


# -- other people's files --------------------------------------------------------------------------

UNTIDY = [
    "2024-01-01",
    "12:30",
    "1e5",
    "NA",
    "null",
    "true",
    "007",
    'with "quotes", a comma\tand a tab',
    "two\nlines",
    "日本語",
]


def as_rows(kind: str, rows: list[dict[str, str | None]]) -> str:
    """Return rows in a text format."""
    if kind in (".jsonl", ".ndjson"):
        return "".join(json.dumps(row) + "\n" for row in rows)
    if kind == ".json":
        return json.dumps(rows, indent=1)
    text = io.StringIO()
    writer = csv.DictWriter(text, ["n", "text"], delimiter="," if kind == ".csv" else "\t")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write_any(path: Path, text: str) -> Path:
    """Write a text, compressed as the name says."""
    data, kind = text.encode(), path.suffix.lower()
    if kind == ".zst":
        half = len(data) // 2  # two frames, as parallel compressors write them
        data = b"".join(pa.compress(x, "zstd", asbytes=True) for x in (data[:half], data[half:]))
    packed = {".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress}.get(kind, bytes)
    path.write_bytes(packed(data))
    return path


def texts(path: Path, **settings) -> list[str]:
    return list(read_documents(CorpusConfig(path=path, **settings)))


@pytest.mark.parametrize("compression", ["", ".gz", ".xz", ".bz2", ".zst", ".GZ"])
@pytest.mark.parametrize("kind", [".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".JSONL"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_text_is_read_as_it_stands_in_the_file(tmp_path, kind, compression, mark):
    rows = [{"n": str(number), "text": text} for number, text in enumerate(UNTIDY)]
    path = write_any(tmp_path / f"a{kind}{compression}", mark + as_rows(kind.lower(), rows))
    assert texts(path) == UNTIDY


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "A.PARQUET"])
def test_tables_give_the_texts_of_their_column(tmp_path, name):
    table = pa.table({"n": list(range(len(UNTIDY) + 1)), "text": [*UNTIDY, None]})
    if name.endswith(".arrow"):
        with pa.ipc.new_stream(tmp_path / name, table.schema) as writer:
            writer.write_table(table)
    else:
        pq.write_table(table, tmp_path / name)
    assert texts(tmp_path / name) == UNTIDY


@pytest.mark.parametrize("kind", [".jsonl", ".json"])
def test_rows_whose_text_is_null_are_left_out_and_counted(tmp_path, kind, caplog):
    rows = [{"text": "a"}, {"text": None}, {"text": "b"}, {"text": None}]
    path = write_any(tmp_path / f"nulls{tmp_path.name}{kind}", as_rows(kind, rows))
    assert texts(path) == ["a", "b"]
    assert f"{path.name}: skipped 2 rows whose 'text' is null" in caplog.text


def test_a_json_array_is_read_element_by_element_across_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(texts_module, "CHUNK", 7)
    rows = [{"text": "x" * n} for n in range(40)]
    for indent in (None, 2):
        (tmp_path / "a.json").write_text(" \n" + json.dumps(rows, indent=indent) + "\n")
        assert texts(tmp_path / "a.json") == [row["text"] for row in rows]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", '[{"text": "a"}, {"text": ', r"a\.json: row 2: not a JSON value"),
        ("a.json", '[{"text": "a"}', r"a\.json: row 2: not a JSON value"),
        ("a.json", '["a"]', r"a\.json: row 1: no text in field 'text'; found str"),
        ("a.json", '{"text":\n "a"}', r"a\.json:1: not a JSON object"),
        ("a.jsonl", '{"text": "' + "x" * 200 + '"}', r"a\.jsonl:1: the line has more than 100"),
        ("a.json", '[{"text": "' + "x" * 300 + '"}]', r"a\.json: row 1: not a JSON value"),
        (
            "a.csv",
            'text\n"' + "x" * 50 + "\n" + "x" * 60,
            r"a\.csv:3: not valid CSV \(field larger",
        ),
        ("a.csv", 'text\n"x', r"a\.csv:2: not valid CSV \(unexpected end"),
        ("a.txt", "short\n" + "x" * 200, r"a\.txt:2: the line has more than 100"),
    ],
)
def test_damaged_and_endless_rows_are_named(tmp_path, monkeypatch, name, text, message):
    monkeypatch.setattr(texts_module, "LONGEST_ROW", 100)
    monkeypatch.setattr(texts_module, "CHUNK", 10)
    (tmp_path / name).write_text(text)
    with pytest.raises(CorpusError, match=message):
        texts(tmp_path / name)


def test_a_large_plain_text_is_cut_at_line_ends_and_nothing_is_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(texts_module, "LONGEST_TEXT", 50)
    lines = [f"line {number}\n" for number in range(30)]
    (tmp_path / "a.txt").write_text("".join(lines))
    documents = texts(tmp_path / "a.txt")
    assert "".join(documents) == "".join(lines)
    assert all(len(part) <= 50 and part.endswith("\n") for part in documents)


def test_a_small_archive_of_a_long_text_is_read_in_parts(tmp_path):
    with gzip.open(tmp_path / "a.txt.gz", "wt") as file:
        for _ in range(64):
            file.write(("x" * 1023 + "\n") * 1024)
    tracemalloc.start()
    n_characters = sum(map(len, read_documents(CorpusConfig(path=tmp_path / "a.txt.gz"))))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert n_characters == 64 * 2**20
    assert peak < 32 * 2**20


def test_a_folder_and_a_pattern_give_their_shards_in_the_order_of_their_names(tmp_path):
    folder = tmp_path / "shards"
    (folder / "more").mkdir(parents=True)
    for name in ("b.jsonl", "a.jsonl.gz", "more/c.JSONL"):
        kind = ".jsonl"
        write_any(folder / name, as_rows(kind, [{"text": name}]) if kind else "")
    write_any(folder / "README.md", "what it is")
    write_any(folder / ".hidden.jsonl", "damaged")
    assert sorted(texts(folder)) == ["a.jsonl.gz", "b.jsonl", "more/c.JSONL"]
    assert texts(folder / "*.jsonl*") == ["a.jsonl.gz", "b.jsonl"]
    assert texts(folder / "**" / "*.[Jj]*") == ["a.jsonl.gz", "b.jsonl", "more/c.JSONL"]


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(tmp_path):
    write_any(tmp_path / "a[1].jsonl", as_rows(".jsonl", [{"text": "a"}]))
    assert texts(tmp_path / "a[1].jsonl") == ["a"]


def test_a_data_set_saved_by_datasets_is_read_whole(tmp_path):
    Dataset.from_dict({"text": ["a", "b"]}).save_to_disk(tmp_path / "saved")
    assert texts(tmp_path / "saved") == ["a", "b"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "no shards in this folder"),
        (["notes.pdf"], "no shards in this folder"),
        (["a.jsonl", "b.csv"], r"several formats \(\.csv, \.jsonl\)\. Use a pattern to select"),
        (["train-0.jsonl", "test-0.jsonl"], r"several splits \(train-0\.jsonl and test-0\.jsonl"),
        (["data/a.jsonl", "validation/a.jsonl"], "several splits"),
    ],
)
def test_a_folder_that_is_not_a_single_corpus_is_refused(tmp_path, names, message):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_any(tmp_path / name, "")
    with pytest.raises(CorpusError, match=message):
        texts(tmp_path)


@pytest.fixture
def linked(tmp_path):
    """A folder with a shard, a link to it, a link to a folder of shards and one to itself."""
    folder = tmp_path / "linked"
    (tmp_path / "elsewhere").mkdir()
    folder.mkdir()
    write_any(folder / "a.jsonl", as_rows(".jsonl", [{"text": "a"}]))
    write_any(tmp_path / "elsewhere" / "b.jsonl", as_rows(".jsonl", [{"text": "b"}]))
    (folder / "again.jsonl").symlink_to(folder / "a.jsonl")
    (folder / "more").symlink_to(tmp_path / "elsewhere")
    (folder / "self").symlink_to(folder)
    return folder


@pytest.mark.parametrize("pattern", ["", "**/*.jsonl"])
def test_every_shard_that_links_lead_to_is_read_once(linked, pattern):
    assert texts(linked / pattern) == ["a", "b"]


@pytest.mark.parametrize("pattern", ["", "*.jsonl"])
def test_a_link_to_a_shard_that_is_not_there_is_refused(linked, pattern):
    (linked / "z.jsonl").symlink_to("nowhere")
    with pytest.raises(CorpusError, match=r"z\.jsonl: is a link to nowhere, which does not exist"):
        texts(linked / pattern)


@pytest.mark.parametrize("pattern", ["", "*.jsonl*"])
def test_a_shard_and_its_compressed_copy_are_refused(tmp_path, pattern):
    for name in ("a.jsonl", "a.jsonl.gz"):
        write_any(tmp_path / name, as_rows(".jsonl", [{"text": "a"}]))
    with pytest.raises(CorpusError, match=r"a\.jsonl\.gz: seems to be a copy of a\.jsonl"):
        texts(tmp_path / pattern)


def test_files_that_map_left_in_a_saved_data_set_are_not_read(tmp_path):
    Dataset.from_dict({"text": ["a", "b"]}).save_to_disk(tmp_path)
    load_from_disk(tmp_path).map(lambda row: {"text": row["text"] + "!"})
    assert len(list(tmp_path.glob("*.arrow"))) == 2
    assert texts(tmp_path) == ["a", "b"]
    (tmp_path / "data-00000-of-00001.arrow").unlink()
    with pytest.raises(CorpusError, match=r"lacks '.*arrow', which state\.json names"):
        texts(tmp_path)


def test_a_saved_dict_of_one_split_is_read_and_one_of_two_is_refused(tmp_path):
    rows = Dataset.from_dict({"text": ["a", "b"]})
    DatasetDict(train=rows).save_to_disk(tmp_path / "one")
    DatasetDict(train=rows, test=rows).save_to_disk(tmp_path / "two")
    assert texts(tmp_path / "one") == ["a", "b"]
    with pytest.raises(CorpusError, match=r"the splits \['test', 'train'\].* path: two/train"):
        texts(tmp_path / "two")
    assert texts(tmp_path / "two" / "train") == ["a", "b"]


def test_an_empty_shard_of_a_table_is_read_as_empty(tmp_path):
    for name, values in (("a", []), ("b", ["x"])):
        pq.write_table(
            pa.table({"text": pa.array(values, pa.string())}), tmp_path / f"{name}.parquet"
        )
    assert texts(tmp_path) == ["x"]


def test_texts_about_a_corpus_of_plain_text_are_left_out(tmp_path):
    for name in ("a.txt", "README.md", "LICENSE.txt"):
        write_any(tmp_path / name, name)
    assert texts(tmp_path) == ["a.txt"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", '[{"text": "a"}]\n[{"text": "b"}]', r"found '\[\{\"text.* after the array"),
        ("a.json", '[{"text": "a"}]' + " " * 3 * 2**20 + "x", "found 'x' after the array"),
        ("a.csv", "n,text\n1,b\n2,Hello, world\n", r"a\.csv:3: has more values than the 2 columns"),
        ("a.csv", "text,text\na,b\n", r"a\.csv: has 2 columns 'text', expected one"),
    ],
)
def test_a_file_that_would_be_read_only_in_part_is_refused(tmp_path, name, text, message):
    with pytest.raises(CorpusError, match=message):
        texts(write_any(tmp_path / name, text))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.csv", "a.parquet", "a.jsonl.gz"])
def test_a_file_that_git_lfs_has_not_fetched_is_named(tmp_path, name):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:a\n")
    with pytest.raises(
        CorpusError, match=rf"{name}: is a Git LFS pointer\. Fetch the file: git lfs"
    ):
        texts(tmp_path / name)


def test_wildcards_in_the_names_of_folders_that_are_there_are_letters(tmp_path):
    folder = tmp_path / "run [1]" / "all*"
    (folder / "deep").mkdir(parents=True)
    write_any(folder / "a.jsonl", '{"text": "x"}\n')
    write_any(folder / "deep" / "b.jsonl", '{"text": "y"}\n')
    assert texts(folder / "*.jsonl") == ["x"]
    assert texts(folder / "**" / "[ab].jsonl") == ["x", "y"]
    with pytest.raises(CorpusError, match=r"c\.jsonl: no such file"):
        texts(folder / "c.jsonl")


def test_a_link_to_a_file_without_an_ending_has_the_format_of_its_own_name(tmp_path, monkeypatch):
    """As the cache of the Hub stores files."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "0123").write_text('{"text": "x"}\n')
    link = tmp_path / "snapshots" / "a.jsonl"
    link.parent.mkdir()
    link.symlink_to("../blobs/0123")
    monkeypatch.chdir(link.parent)
    for given in (link, "a.jsonl", "./../snapshots/a.jsonl"):
        config = CorpusConfig(path=given)
        assert (config.name, list(read_documents(config))) == ("a.jsonl", ["x"])


def test_plain_text_may_have_testing_in_its_name(tmp_path):
    for name in ("guide.md", "install.md", "testing.md"):
        write_any(tmp_path / name, name)
    assert texts(tmp_path) == ["guide.md", "install.md", "testing.md"]


def test_a_pattern_without_a_match_is_refused(tmp_path):
    with pytest.raises(CorpusError, match=r"\*\.jsonl: no file matches this pattern"):
        texts(tmp_path / "*.jsonl")
