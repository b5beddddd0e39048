"""Text sources -> documents, in file order or shuffled."""

import random
from collections.abc import Iterable, Iterator

from optimer_hf.corpus.config import CorpusConfig
from optimer_hf.corpus.texts import read_texts, text_in, warn_of_null_texts
from optimer_hf.errors import CorpusError

SHUFFLE_BUFFER = 10_000
SHUFFLED_CHARACTERS = 256 * 2**20  # in the buffer at once: a corpus of books may not fit in memory


# -- documents -------------------------------------------------------------------------------------


def read_documents(config: CorpusConfig) -> Iterator[str]:
    """Yield the texts of a corpus in file order.

    Raises a CorpusError that names file and row if something is missing, damaged or malformed, or
    if a row lacks the text field.
    """
    if config.path is not None:
        yield from read_texts(config.path, config.text_field)
    else:
        yield from _stream(config)


def _stream(config: CorpusConfig) -> Iterator[str]:
    import datasets

    n_null = 0
    try:
        rows = datasets.load_dataset(
            str(config.dataset),
            config.dataset_config,
            data_files=config.data_files,
            split=config.split,
            streaming=True,
        )
        for row in rows:
            text = text_in(row, config.text_field, config.name)
            n_null += text is None
            if text is not None:
                yield text
    except CorpusError:
        raise
    except (
        Exception
    ) as error:  # `datasets` raises dozens of types for a missing or unreadable data set
        raise CorpusError(f"{config.name}: `datasets` cannot read it ({error}).") from error
    finally:
        warn_of_null_texts(config.name, config.text_field, n_null)


def shuffle(
    texts: Iterable[str],
    seed: int,
    buffer_size: int = SHUFFLE_BUFFER,
    n_characters: int = SHUFFLED_CHARACTERS,
) -> Iterator[str]:
    """Yield texts in random order, using a buffer.

    The buffer holds at most `buffer_size` texts and `n_characters` characters. A single longer
    text passes through it alone.
    """
    rng = random.Random(seed)
    buffer: list[str] = []
    held = 0
    for text in texts:
        held += len(text)
        if len(buffer) < buffer_size:
            buffer.append(text)
        else:
            index = rng.randrange(buffer_size)
            held -= len(buffer[index])
            yield buffer[index]
            buffer[index] = text
        while held > n_characters and len(buffer) > 1:
            index = rng.randrange(len(buffer))
            buffer[index], buffer[-1] = buffer[-1], buffer[index]
            held -= len(buffer[-1])
            yield buffer.pop()
    rng.shuffle(buffer)
    yield from buffer
