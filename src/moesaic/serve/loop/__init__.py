"""Requests through an engine, many together, step by step."""
