"""Data sets of captioned images."""
