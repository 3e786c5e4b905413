"""Between token ids and conversations."""
