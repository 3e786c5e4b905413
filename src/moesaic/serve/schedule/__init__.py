"""Who waits, who runs, and what of the cache is whose."""
