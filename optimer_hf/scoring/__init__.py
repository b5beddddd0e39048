"""Objectives, and how lm-eval scores a model on them."""
