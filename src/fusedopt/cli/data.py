"""Data to train on: some of scikit-learn's, or the user's own arrays or table."""

from __future__ import annotations

import csv
import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

DEMO = 'needs: pip install "fusedopt[demo]"'
SETS = ("digits", "iris", "wine", "breast_cancer")  # scikit-learn installs them
NAMES = ("x_train", "y_train", "x_test", "y_test")
MOST_CLASSES = 1000  # the model's last layer, and the report, have a row for each


@dataclass(frozen=True)
class Data:
    """Inputs as rows of float32, classes as integers from 0."""

    x_train: NDArray[np.float32]
    y_train: NDArray[np.int64]
    x_test: NDArray[np.float32]
    y_test: NDArray[np.int64]
    labels: tuple[str, ...] = ()  # names of the classes, if they have some

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


def load(source: str) -> Data:
    """Return a data set of scikit-learn by name, or what a .csv or .npz file holds, checked.

    Raises
    ------
    ValueError, OSError
        Naming the file.
    ModuleNotFoundError
        Without scikit-learn, for all but .npz files.
    """
    if source not in SETS:
        return _from_csv(source) if source.lower().endswith(".csv") else _from_npz(source)
    try:
        from sklearn import datasets
    except ModuleNotFoundError as exc:
        raise ModuleNotFoundError(f"the {source} data {DEMO}; or give --data FILE.npz") from exc
    bunch = getattr(datasets, f"load_{source}")()
    labels = tuple(map(str, bunch.target_names))
    x_train, y_train, x_test, y_test = _split(source, bunch.data, bunch.target)
    return _standardised(x_train, y_train, x_test, y_test, labels)


def _split(where: str, x: Any, y: Any) -> list[NDArray[Any]]:
    """Return x_train, y_train, x_test and y_test: a quarter of each class is held out."""
    try:
        from sklearn.model_selection import train_test_split
    except ModuleNotFoundError as exc:
        raise ModuleNotFoundError(f"{where}: holding out a part {DEMO}") from exc
    try:
        split = train_test_split(x, y, test_size=0.25, random_state=0, stratify=y)
    except ValueError as exc:
        raise ValueError(f"{where}: cannot hold out a quarter of each class: {exc}") from exc
    return [split[i] for i in (0, 2, 1, 3)]


def _from_csv(path: str) -> Data:
    """Return the rows of a table: numbers, and the class, of any name, in the last column."""
    x: list[list[float]] = []
    names: list[str] = []
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            delimiter = max(",;\t", key=file.readline().count)
            file.seek(0)
            for line, row in enumerate(csv.reader(file, delimiter=delimiter), start=1):
                try:
                    numbers = [float(cell) for cell in row[:-1]]
                except ValueError as exc:
                    if line == 1:  # names of the columns
                        continue
                    raise ValueError(f"row {line}: {exc}") from exc
                if not row:
                    continue
                if not numbers or len(numbers) != len(x[0] if x else numbers):
                    expected = len(x[0]) + 1 if x else "2 or more"
                    raise ValueError(f"row {line}: {len(row)} values, expected {expected}")
                x.append(numbers)
                names.append(row[-1].strip())
    except (ValueError, csv.Error) as exc:
        raise ValueError(f"{path}: {exc}; expected rows of numbers and a class") from exc
    # whole numbers by their values, then other names
    labels = sorted(set(names), key=lambda x: (not x.isdecimal(), x.isdecimal() and len(x), x))
    if not 2 <= len(labels) <= MOST_CLASSES:
        raise ValueError(
            f"{path}: {len(labels)} classes in the last column, expected 2 to {MOST_CLASSES}"
        )
    place = {name: i for i, name in enumerate(labels)}
    arrays = _split(path, np.array(x), np.array([place[name] for name in names]))
    return _checked(path, dict(zip(NAMES, arrays, strict=True)), tuple(labels))


def _from_npz(path: str) -> Data:
    """Return the arrays of a .npz file."""
    return _checked(path, _read(path))


def _checked(path: str, arrays: dict[str, NDArray[Any]], labels: tuple[str, ...] = ()) -> Data:
    for part in ("train", "test"):
        x, y = arrays[f"x_{part}"], arrays[f"y_{part}"]
        where = f"{path}: x_{part}, y_{part}"
        if x.ndim < 2 or y.ndim != 1 or len(x) != len(y) or x.size == 0:
            raise ValueError(
                f"{where}: shapes {x.shape} and {y.shape}; expected one row and one label each"
            )
        if y.dtype.kind not in "iu":
            raise ValueError(f"{where}: labels must be whole numbers, got {y.dtype}")
        if y.min() < 0 or y.max() >= MOST_CLASSES:
            raise ValueError(
                f"{where}: labels must be from 0 to {MOST_CLASSES - 1}, got {y.min()} to {y.max()}"
            )
        if x.dtype.kind not in "iuf":
            raise ValueError(f"{where}: inputs must be real numbers, got {x.dtype}")
        if not np.isfinite(x).all():
            raise ValueError(f"{where}: inputs must be finite")
    x_train, y_train, x_test, y_test = arrays.values()
    if x_train.shape[1:] != x_test.shape[1:]:
        raise ValueError(f"{path}: x_train has rows {x_train.shape[1:]}, x_test {x_test.shape[1:]}")
    data = _standardised(x_train, y_train, x_test, y_test, labels)
    if not (np.isfinite(data.x_train).all() and np.isfinite(data.x_test).all()):
        raise ValueError(f"{path}: inputs are too far apart to be scaled to deviations of 1")
    return data


def _read(path: str) -> dict[str, NDArray[Any]]:
    """Return the members of a .npz file that have our names."""
    try:
        with open(path, "rb") as raw:
            if raw.read(2) != b"PK":  # NumPy would treat it as a pickle
                raise ValueError("not a .npz file")
            raw.seek(0)
            with np.load(raw, allow_pickle=False) as file:
                missing = [name for name in NAMES if name not in file.files]
                if missing:
                    raise ValueError(f"no {', '.join(missing)} in it (expected {', '.join(NAMES)})")
                arrays = {name: file[name] for name in NAMES}
    except MemoryError as exc:
        raise ValueError(f"{path}: claims more data than memory can hold") from exc
    except Exception as exc:  # third-party parsers may raise anything on damaged bytes
        raise ValueError(f"{path}: {exc}") from exc
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray):  # NumPy returns members that are no arrays as bytes
            raise ValueError(f"{path}: {name} is not an array")
    return arrays


def _standardised(
    x_train: Any, y_train: Any, x_test: Any, y_test: Any, labels: tuple[str, ...] = ()
) -> Data:
    """Scale every input by its mean and standard deviation in the training part."""
    x_train, x_test = (np.asarray(x, np.float64).reshape(len(x), -1) for x in (x_train, x_test))
    with np.errstate(over="ignore", invalid="ignore"):
        mean, deviation = x_train.mean(axis=0), x_train.std(axis=0)
        deviation[deviation == 0] = 1  # a pixel that is always blank
        deviation[np.isinf(deviation)] = np.nan
        x_train, x_test = (((x - mean) / deviation).astype(np.float32) for x in (x_train, x_test))
    return Data(x_train, y_train.astype(np.int64), x_test, y_test.astype(np.int64), labels)
