"""Scoring functions of a user: load them from local Python files, call them, check their results.

A term names a function of a file (`function: my_metrics.py:brevity`) or one that the caller gives.
"""

import importlib.util
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from optimer_hf.errors import EvaluationError
from optimer_hf.files.digest import digest, sha256_file
from optimer_hf.files.reference import function_in_file
from optimer_hf.files.text import did_you_mean, first_line, quote
from optimer_hf.scoring.objective import Objective, Term, naming_test
from optimer_hf.scoring.scores import TermScore

Scorer = Callable[[Any, Any, int | None], Sequence[float]]

CONTRACT = (
    "A scoring function gets (model, tokenizer, limit) and returns a finite number for each item"
)
OF_THE_MACHINE = (OSError, MemoryError, torch.OutOfMemoryError, torch.AcceleratorError)


def collect_functions(
    objectives: Sequence[Objective], given: Mapping[str, Scorer] | None
) -> dict[str, Scorer]:
    """Return the functions that terms name: those of files are loaded, the others are `given`.

    Raises EvaluationError for a function that is not there.
    """
    functions = dict(given or {})
    for objective in objectives:
        with naming_test(objectives, objective):
            for term in objective.scored_terms:
                if term.function is not None and term.function not in functions:
                    functions[term.function] = _load_function(term, term.function)
    return functions


def digest_function(term: Term) -> str | None:
    """Return the sha256 of the file that a term's function is in; None for a given function."""
    in_file = function_in_file(str(term.function))
    return None if in_file is None else sha256_file(in_file[0])


def _load_function(term: Term, function: str) -> Scorer:
    in_file = function_in_file(function)
    if in_file is None:
        raise EvaluationError(
            f"term {term.label!r}: no function {function!r} was given. Name its file, as in "
            f"`function: my_metrics.py:{function}`, or give it to "
            "`optimer_hf.search(..., functions={...})`."
        )
    file, name = in_file
    module = _load_module(term, file)
    scorer: Scorer | None = getattr(module, name, None)
    if scorer is None or not callable(scorer):
        known = [key for key, value in vars(module).items() if callable(value) and key[0] != "_"]
        hint = did_you_mean(name, known)
        raise EvaluationError(f"term {term.label!r}: {file} has no function {name!r}.{hint}")
    return scorer


def _load_module(term: Term, file: Path) -> ModuleType:
    name = f"optimer_functions_{file.stem}_{digest(str(file))[:8]}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None or not file.is_file():
        raise EvaluationError(f"term {term.label!r}: {file}: no such file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look for it there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise EvaluationError(
            f"term {term.label!r}: {file} cannot be imported ({reason})."
        ) from error
    return module


def score_by_function(
    term: Term, function: Scorer, model: Any, tokenizer: Any, limit: int | None
) -> TermScore:
    """Return the score that a function gives to a model.

    Raises EvaluationError if the function fails, or returns anything but finite numbers. Errors
    that are the machine's fault pass.
    """
    where = f"term {term.label!r}: function {term.function_name!r}"
    try:
        with torch.no_grad():
            scored = function(model, tokenizer, limit)
            scored = list(scored) if isinstance(scored, Iterator) else scored
    except OF_THE_MACHINE:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise EvaluationError(f"{where} failed with {reason}. {CONTRACT}.") from error
    try:
        values = [float(value) for value in scored]
    except (TypeError, ValueError):
        raise EvaluationError(f"{where} returned {quote(scored)}. {CONTRACT}.") from None
    if not values or not all(map(math.isfinite, values)):
        raise EvaluationError(f"{where} returned {quote(values)}. {CONTRACT}.")
    return TermScore([(value, 1.0) for value in values], bool(term.higher_is_better))
