"""Objectives, and the scores that lm-eval gives a model on them."""
