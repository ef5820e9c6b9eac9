"""Two data sets as one: exemplars in front of the images that they are scored among."""

import numpy as np

from attrib_jax.core.fingerprint import digest
from attrib_jax.data.protocol import NO_GROUP, Dataset, Row, named_groups


class ConcatDataset:
    """`first`'s rows, then `second`'s.

    Row ids of `first` are kept and those of `second` follow: shifted by `first`'s largest one plus 1. Groups likewise;
    where only one of the two has groups, every row of the other is a group of its own. Where only one has named groups,
    the rows of the other name none.

    Attributes, beside those of a `Dataset`:
      first, second: the two.
      shift: number that is added to `second`'s row ids.
    """

    def __init__(self, first: Dataset, second: Dataset):
        """Raises ValueError where the shifted row ids do not fit 32 bits."""
        self.first, self.second = first, second
        self.name = f"{first.name}+{second.name}"
        self.shift = _next_id(first.row_ids)
        if _next_id(second.row_ids) + self.shift > 2**31:
            raise ValueError(
                f"row ids of {self.name!r} reach {_next_id(second.row_ids) - 1 + self.shift}; expected at most "
                f"{2**31 - 1}. Give the two data sets in the other order, or renumber their rows."
            )
        self.row_ids = np.concatenate([first.row_ids, second.row_ids + self.shift]).astype(np.int32)
        self.groups = None
        if first.groups is not None or second.groups is not None:
            groups = [data.row_ids if data.groups is None else np.asarray(data.groups) for data in (first, second)]
            self.groups = np.concatenate([groups[0], groups[1] + _next_id(groups[0])]).astype(np.int32)
        self.group_names: list[str] | None = None
        names = [named_groups(data) for data in (first, second)]
        if any(part is not None for part in names):
            parts = [part or [NO_GROUP] * len(data) for part, data in zip(names, (first, second))]
            self.group_names = [*parts[0], *parts[1]]
        self.credit, self.credit_url = _credit(first, second)

    def __len__(self) -> int:
        return len(self.row_ids)

    def __getitem__(self, index: int) -> Row:
        dataset, inner = self._locate(index)
        return dataset[inner]._replace(row_id=int(self.row_ids[index]))

    def captions(self, index: int) -> tuple[str, ...]:
        dataset, inner = self._locate(index)
        return dataset.captions(inner)

    def fingerprint(self) -> str:
        """sha256 over both fingerprints and the shift of the row ids."""
        both = (self.first.fingerprint(), self.second.fingerprint(), self.shift)
        return digest(repr(both))

    def _locate(self, index: int) -> tuple[Dataset, int]:
        index = range(len(self))[index]
        inner = index - len(self.first)
        return (self.first, index) if inner < 0 else (self.second, inner)


def concatenate(first: Dataset, second: Dataset) -> ConcatDataset:
    """Two data sets as one, exemplars first (METHOD.md section 9); see `ConcatDataset`."""
    return ConcatDataset(first, second)


def _next_id(ids: np.ndarray) -> int:
    return int(np.max(ids)) + 1


def _credit(first: Dataset, second: Dataset) -> tuple[str | None, str | None]:
    credits = list(dict.fromkeys((data.credit, data.credit_url) for data in (first, second) if data.credit))
    if len(credits) < 2:
        return credits[0] if credits else (None, None)
    return "; ".join(text if url is None else f"{text} ({url})" for text, url in credits), None
