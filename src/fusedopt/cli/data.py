"""Data to train on: scikit-learn's handwritten digits, or the user's own arrays."""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

DEMO = 'needs: pip install "fusedopt[demo]"'
NAMES = ("x_train", "y_train", "x_test", "y_test")


@dataclass(frozen=True)
class Data:
    """Inputs as rows of float32, classes as integers from 0."""

    x_train: NDArray[np.float32]
    y_train: NDArray[np.int64]
    x_test: NDArray[np.float32]
    y_test: NDArray[np.int64]

    @property
    def classes(self) -> int:
        """Number of classes: one more than the largest label."""
        return int(max(self.y_train.max(), self.y_test.max())) + 1

    @property
    def digest(self) -> str:
        """A fingerprint, so that a resumed run can tell whether it has the same data."""
        sha = hashlib.sha256()
        for name in NAMES:
            sha.update(np.ascontiguousarray(getattr(self, name)).tobytes())
        return sha.hexdigest()[:16]


def digits() -> Data:
    """Return the 1,797 scans of 8 x 8 pixels, a stratified quarter of them held out."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ModuleNotFoundError as exc:
        raise ModuleNotFoundError(f"the digits data {DEMO}; or give --data FILE.npz") from exc
    x, y = load_digits(return_X_y=True)
    split = train_test_split(x, y, test_size=0.25, random_state=0, stratify=y)
    return _standardised(*(split[i] for i in (0, 2, 1, 3)))


def from_file(path: Path) -> Data:
    """Return the arrays of a .npz file, checked; ValueError or OSError naming it."""
    try:
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            missing = [name for name in NAMES if name not in file.files]
            if missing:
                raise ValueError(f"no {', '.join(missing)} in it (expected {', '.join(NAMES)})")
            x_train, y_train, x_test, y_test = (file[name] for name in NAMES)
    except (ValueError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as exc:
        raise ValueError(f"{path}: {exc}") from exc
    for part, x, y in (("train", x_train, y_train), ("test", x_test, y_test)):
        where = f"{path}: x_{part}, y_{part}"
        if y.ndim != 1 or len(x) != len(y) or x.ndim < 2 or len(y) == 0:
            raise ValueError(
                f"{where}: shapes {x.shape} and {y.shape}; expected one row and one label each"
            )
        if not np.issubdtype(y.dtype, np.integer) or y.min() < 0:
            raise ValueError(f"{where}: labels must be whole numbers from 0, got {y.dtype}")
        if not np.issubdtype(x.dtype, np.number) or not np.isfinite(x).all():
            raise ValueError(f"{where}: inputs must be finite numbers")
    if x_train.shape[1:] != x_test.shape[1:]:
        raise ValueError(f"{path}: x_train has rows {x_train.shape[1:]}, x_test {x_test.shape[1:]}")
    return _standardised(x_train, y_train, x_test, y_test)


def _standardised(x_train: Any, y_train: Any, x_test: Any, y_test: Any) -> Data:
    """Scale every input by the mean and deviation that the training part has."""
    x_train, x_test = (np.asarray(x, np.float64).reshape(len(x), -1) for x in (x_train, x_test))
    mean, deviation = x_train.mean(axis=0), x_train.std(axis=0)
    deviation[deviation == 0] = 1  # a pixel that is always blank
    scaled = (((x - mean) / deviation).astype(np.float32) for x in (x_train, x_test))
    x_train, x_test = scaled
    return Data(x_train, y_train.astype(np.int64), x_test, y_test.astype(np.int64))
