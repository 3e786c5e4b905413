"""Models in fewer bits: rounding, and what acts on a model from outside."""
