"""attempts_figure.py: what it draws of rows over seeds."""

from pathlib import Path

import numpy as np
import pytest

from optimer_hf.experiment.attempts_figure import draw_attempts, write_attempts_figure
from optimer_hf.experiment.seeds_file import SeededRow, Spread
from tests.support.landscapes import config_of

GAINS = {  # by kind and subject, for three seeds
    ("base", ""): [0.0, 0.0, 0.0],
    ("alone", "z"): [0.05, 0.06, 0.04],
    ("best_scale", "z"): [0.06, 0.07, 0.05],
    ("alone", "w"): [0.01, 0.02, 0.01],
    ("attempts", "2"): [0.04, 0.05, 0.03],
    ("attempts", "8"): [0.02, 0.02, 0.02],
    ("scaled_attempts", "2"): [0.05, 0.05, 0.04],
    ("other_search", "no mixture"): [0.045, 0.04, 0.05],
    ("merge", ""): [0.07, 0.08, 0.06],
}
MIXED = {"vectors": {"w": "w", "z": {"source": "z", "mixture": {"w": 1.0}}}}


def rows_of(gains) -> list[SeededRow]:
    return [
        SeededRow(
            kind=kind,
            subject=subject,
            chosen_after_seal=False,
            gain=Spread(values=values),
            merge_minus=Spread(values=values),
        )
        for (kind, subject), values in gains.items()
    ]


def test_curves_bars_and_bands_are_those_of_the_rows():
    """The uniform mixture in the pool is one attempt; a vector with text of its own is none."""
    figure = draw_attempts(rows_of(GAINS), config_of(**MIXED))
    (axis,) = figure.axes
    lines = {line.get_label(): line for line in axis.lines}
    best, scaled = lines["best of R mixtures"], lines["at its best scale"]
    assert best.get_xdata().tolist() == [1, 2, 8] and best.get_ydata() == pytest.approx([5, 4, 2])
    assert scaled.get_ydata() == pytest.approx([6, 14 / 3])
    assert lines["searched merge"].get_ydata() == pytest.approx([7, 7])
    bars = [tuple(line.get_ydata()) for line in axis.lines if len(line.get_ydata()) == 2]
    interval = Spread(values=GAINS["attempts", "2"]).interval
    assert any(bar == pytest.approx(100 * np.array(interval)) for bar in bars)
    low, high = Spread(values=GAINS["merge", ""]).interval
    bands = [patch.get_extents().transformed(axis.transData.inverted()) for patch in axis.patches]
    assert any(band.ymin == pytest.approx(100 * low) for band in bands)
    assert any(band.ymax == pytest.approx(100 * high) for band in bands)
    assert [text.get_text() for text in axis.get_xticklabels()] == ["1", "2", "8"]


def test_a_figure_is_written_for_one_seed_that_has_no_intervals(tmp_path: Path):
    single = {key: values[:1] for key, values in GAINS.items()}
    write_attempts_figure(rows_of(single), config_of(**MIXED), tmp_path / "attempts.png")
    assert (tmp_path / "attempts.png").read_bytes().startswith(b"\x89PNG")
