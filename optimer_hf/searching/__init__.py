"""Runs a study: SMAC proposes weights, a pool of vectors is merged with them and scored."""
