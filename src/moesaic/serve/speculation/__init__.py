"""Drafts: tokens guessed ahead, which a longer step of the engine then confirms or not."""
