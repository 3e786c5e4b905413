"""Experts: the way from T tokens to R rows, through the experts that own them, and back."""
