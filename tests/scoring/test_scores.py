"""scores.py: the score of a term."""

from optimer_hf.scoring.scores import TermScore


def test_score_is_the_ratio_of_sums_not_the_mean_of_ratios():
    assert TermScore([(1.0, 1.0), (1.0, 3.0)], False).score == 0.5
