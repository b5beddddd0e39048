"""Documents: streamed by datasets, and shuffled with a buffer."""

from hypothesis import given
from hypothesis import strategies as st

from optimer_hf.corpus.config import CorpusConfig
from optimer_hf.corpus.documents import read_documents, shuffle


@given(st.integers(0, 60), st.integers(1, 20), st.integers(0, 3))
def test_shuffling_loses_and_repeats_no_text_and_a_seed_fixes_the_order(n, buffer_size, seed):
    texts = [str(i) for i in range(n)]
    result = list(shuffle(texts, seed, buffer_size))
    assert sorted(result) == sorted(texts)
    assert result == list(shuffle(texts, seed, buffer_size))


def test_shuffling_changes_the_order_and_another_seed_gives_another():
    texts = [str(i) for i in range(100)]
    assert texts != list(shuffle(texts, 0)) != list(shuffle(texts, 1))


def test_shuffling_reads_one_text_ahead_of_its_buffer():
    n_read = 0

    def texts():
        nonlocal n_read
        for n_read in range(1, 1001):
            yield str(n_read)

    stream = shuffle(texts(), 0, 10)
    for n_yielded in range(1, 6):
        next(stream)
        assert n_read == 10 + n_yielded


def test_a_data_set_takes_the_arguments_of_load_dataset(tmp_path):
    (tmp_path / "a.csv").write_text("text\nfirst\n")
    (tmp_path / "b.csv").write_text("text\nsecond\n")
    for files in ("./a.csv", ["./b.csv"], {"train": "./a.csv", "other": ["./b.csv"]}):
        config = CorpusConfig.model_validate(
            {"dataset": "csv", "name": "default", "data_files": files},
            context={"folder": tmp_path},
        )
        assert config.dataset_config == "default"
        assert list(read_documents(config)) == (["second"] if files == ["./b.csv"] else ["first"])


def test_shuffling_keeps_few_characters_in_memory():
    held, most = 0, 0

    def source():
        nonlocal held, most
        for number in range(200):
            text = chr(97 + number % 26) * (1 + number % 90)
            held += len(text)
            most = max(most, held)
            yield text

    shuffled = []
    for text in shuffle(source(), seed=1, buffer_size=50, n_characters=300):
        held -= len(text)
        shuffled.append(text)
    assert sorted(shuffled) == sorted(chr(97 + n % 26) * (1 + n % 90) for n in range(200))
    assert most <= 300 + 2 * 90
