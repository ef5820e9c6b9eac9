"""Texts from elsewhere that neither files nor tokenizers take."""


def replace_surrogates(text: str) -> str:
    """`text` with '?' for each half of a surrogate pair, which JSON can escape and UTF-8 cannot hold."""
    return text.encode("utf-8", "replace").decode()
