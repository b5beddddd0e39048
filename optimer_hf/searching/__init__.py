"""Running a study: SMAC asks, a pool of vectors answers."""
