"""scikit-learn's handwritten digits as images in [-1, 1], split once for the denoiser and the classifier."""

from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

DIGITS = 10
IMAGE_SIDE = 8
HELD_OUT_SHARE = 0.2


@dataclass(frozen=True)
class DigitImages:
    """Images f32[N, 1, 8, 8] in [-1, 1] with their labels i64[N]."""

    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)


def load_split(seed: int) -> tuple[DigitImages, DigitImages]:
    """Return (training, held-out) images: 80 % and 20 % of the 1,797, each digit in proportion."""
    pixels, labels = load_digits(return_X_y=True)
    held_in, held_out = train_test_split(
        range(len(labels)), test_size=HELD_OUT_SHARE, stratify=labels, random_state=seed
    )
    # Pixels are integers from 0 to 16.
    images = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, IMAGE_SIDE, IMAGE_SIDE) / 8 - 1
    targets = torch.tensor(labels, dtype=torch.int64)
    return DigitImages(images[held_in], targets[held_in]), DigitImages(images[held_out], targets[held_out])
