"""Logs trials to TensorBoard, Weights & Biases, or whatever else the HF Trainer reports to.

The Trainer's own callbacks do it, so that a search and the trainings of its vectors appear side by
side in one tool. The step of a trial is its number, and the callbacks put `train/` before every
name.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from optimer_hf.errors import ConfigError
from optimer_hf.files.text import first_line

logger = logging.getLogger(__name__)


def make_callbacks(report_to: Sequence[str]) -> list[Any]:
    """Return the Trainer's callbacks for some tools.

    Raises ConfigError for a tool that transformers does not know, or that cannot be used here.
    """
    from transformers.integrations import get_reporting_integration_callbacks

    try:
        return [callback() for callback in get_reporting_integration_callbacks(list(report_to))]
    except (ValueError, RuntimeError, ImportError) as error:
        raise ConfigError(f"search.report_to: {error}") from error


class Tracker:
    """Sends the numbers of trials to the tools in `search.report_to`; a context manager."""

    def __init__(self, report_to: Sequence[str], directory: Path) -> None:
        """Open the tools; TensorBoard writes to `directory`/runs.

        Raises ConfigError for a tool that transformers does not know, or that cannot be used here.
        """
        self._callbacks: list[Any] = []
        if not report_to:
            return
        from transformers import TrainerControl, TrainerState, TrainingArguments

        name = str(directory.resolve().name)
        self._callbacks = make_callbacks(report_to)
        self._args = TrainingArguments(
            output_dir=str(directory), report_to="none", run_name=name, use_cpu=True
        )
        self._state, self._control = TrainerState(), TrainerControl()

    def __enter__(self) -> "Tracker":
        """Begin a run in every tool. Raises ConfigError if one refuses, say without a login; the
        runs that have begun are then ended.
        """
        for tool, error in self._call("on_train_begin"):
            self._callbacks = self._callbacks[: self._callbacks.index(tool)]
            self.__exit__()
            reason = f"{type(tool).__name__}: {type(error).__name__}: {first_line(error)}"
            raise ConfigError(
                f"search.report_to: {reason}. Fix that, or leave the tool out."
            ) from error
        return self

    def __exit__(self, *_: object) -> None:
        self._try("on_train_end", "the end of the search")

    def log(self, number: int, values: Mapping[str, float]) -> None:
        """Send the numbers of trial `number`, by name. A tool that fails, as without a network, is
        named in a warning: it ends no search of hours.
        """
        self._try("on_log", f"trial {number}", step=number, logs=dict(values))

    def _try(self, event: str, what: str, step: int = 0, **values: Any) -> None:
        for tool, error in self._call(event, step, **values):
            reason = f"{type(error).__name__}: {first_line(error)}"
            name = type(tool).__name__
            logger.warning("search.report_to: %s did not take %s (%s)", name, what, reason)

    def _call(self, event: str, step: int = 0, **values: Any) -> Iterator[tuple[Any, Exception]]:
        """Tell every tool of an event; yield those that fail, with their errors."""
        for callback in self._callbacks:
            self._state.global_step = step
            try:
                getattr(callback, event)(
                    self._args, self._state, self._control, model=None, **values
                )
            except Exception as error:  # whatever a tool raises
                yield callback, error
