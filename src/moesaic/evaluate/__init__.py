"""Judging a model on text it has not been trained on."""
