"""Whole models, built from a ModelConfig. They know no family names."""
