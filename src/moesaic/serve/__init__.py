"""Serving: many requests through one engine, and the protocols they come by."""
