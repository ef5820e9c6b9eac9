"""Data sets of captioned pictures."""
