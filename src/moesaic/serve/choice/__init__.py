"""How one text is written: what may follow, what is drawn, when it ends."""
