"""scikit-learn's digits: 1,797 scans of handwritten digits, 8 x 8 pixels; small enough to retrain on many times.

From the test set of the UCI "Optical Recognition of Handwritten Digits" data set (E. Alpaydin, C. Kaynak, 1998;
CC BY 4.0), as `sklearn.datasets.load_digits` brings it along: nothing is downloaded.
"""

import numpy as np

from attrib_jax.data.protocol import Row, hash_rows

RESOLUTION = 8
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_WHITEST = 16  # the scans have values from 0 to 16


class DigitsDataset:
    """The scans as grey images (8, 8, 3) uint8, white ink on black, with captions such as "digit three".

    Digits are not mirror symmetric: train on and score them as they are (`flips="none"`).
    """

    name = "digits"
    credit = "Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak, UCI. Licence: CC BY 4.0"
    credit_url = "https://creativecommons.org/licenses/by/4.0/"
    groups = group_names = None

    def __init__(self):
        """Raises ValueError where scikit-learn is not installed."""
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise ValueError(
                "dataset 'digits' needs scikit-learn, which is not installed: pip install -e '.[studies]'"
            ) from error
        digits = load_digits()
        grey = np.round(digits.images * (255 / _WHITEST)).astype(np.uint8)
        self._images = np.repeat(grey[..., None], 3, axis=-1)
        self.labels = digits.target.astype(np.int32)
        self.row_ids = np.arange(len(grey), dtype=np.int32)

    def __len__(self) -> int:
        return len(self.row_ids)

    def __getitem__(self, index: int) -> Row:
        return Row(self._images[index], self.captions(index), int(self.row_ids[index]))

    def captions(self, index: int) -> tuple[str, ...]:
        return (f"digit {WORDS[self.labels[index]]}",)

    def fingerprint(self) -> str:
        """sha256 over every image's pixels, row id and captions."""
        return hash_rows(self)
