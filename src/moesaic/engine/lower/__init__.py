"""From a model's parts to the steps of a program: one file a kind of part, which knows no families."""
