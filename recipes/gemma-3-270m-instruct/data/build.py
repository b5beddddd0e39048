"""Make the chats of this folder: `pip install reasoning-gym==0.1.25 && python build.py`.

Questions and answers come from the generators of reasoning-gym (Apache-2.0), with fixed seeds.
Training, search and test have different kinds of questions, so what the held-out items measure is
answering in the format of a chat, not the kind. The generators that are made from GSM8K are left
out.
"""

import json
import lzma
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

import reasoning_gym

HERE = Path(__file__).parent
KINDS = {
    "train": [
        "base_conversion",
        "basic_arithmetic",
        "calendar_arithmetic",
        "chain_sum",
        "family_relationships",
        "fraction_simplification",
        "gcd",
        "leg_counting",
        "letter_counting",
        "number_sorting",
        "sentence_reordering",
        "simple_equations",
        "spell_backward",
        "syllogism",
        "time_intervals",
    ],
    "search": ["decimal_arithmetic", "number_filtering", "products", "word_sorting"],
    "test": ["count_bits", "decimal_chain_sum", "lcm", "word_sequence_reversal"],
}
N_ITEMS = {"train": 120, "search": 20, "test": 30}  # of each kind
CHAT = (
    "<start_of_turn>user\n{question}<end_of_turn>\n<start_of_turn>model\n{solution}<end_of_turn>\n"
)
LONGEST = 600  # characters of a question


def items(half: str) -> Iterator[dict[str, str]]:
    """Yield the questions of a part, and their answers, in an order that mixes the kinds."""
    rows = []
    for kind in KINDS[half]:
        dataset = reasoning_gym.create_dataset(kind, size=4 * N_ITEMS[half], seed=0)
        asked = {str(row["question"]).strip(): str(row["answer"]).strip() for row in dataset}
        short = [(q, a) for q, a in asked.items() if a and len(q) <= LONGEST]
        rows += [(kind, *pair) for pair in short[: N_ITEMS[half]]]
    random.Random(0).shuffle(rows)
    for kind, question, solution in rows:
        yield {"question": question, "solution": solution, "source": "reasoning-gym", "doc": kind}


def write(name: str, rows: Iterable[dict[str, str]]) -> None:
    """Write a compressed JSONL file beside this one."""
    with lzma.open(HERE / f"{name}.jsonl.xz", "wt", encoding="utf-8", preset=9) as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def main() -> None:
    """Write the training text, in Gemma's chat template, and the items of search and test."""
    train = [
        {"text": CHAT.format(**row), "source": row["source"], "doc": row["doc"]}
        for row in items("train")
    ]
    write("chat.train", train)
    for half in ("search", "test"):
        write(f"chat.{half}", items(half))


if __name__ == "__main__":
    main()
