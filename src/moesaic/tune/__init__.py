"""Changing a model that has been trained."""
