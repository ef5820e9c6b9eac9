"""Torch checkpoint folders and files <-> Flax modules, parameters, tokenizer and noise schedule."""
