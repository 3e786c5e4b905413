"""How much memory, how fast, how dear: what a model needs of machines, from its description alone. No torch here."""
