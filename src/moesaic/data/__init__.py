"""Text on its way to a model: corpora of labelled domains, tokenizers, packed tokens and batches, chat prompts."""
