"""Checkpoints of each format version since the first load, with the numbers that they held."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest

from fusedopt import _checkpoint

DATA = Path(__file__).parent / "data"
sys.path.insert(0, str(DATA))
from make import make, values  # noqa: E402

FILES = sorted(DATA.glob("format*[0-9].*"))


def test_there_are_files_of_every_version():
    known = {(int(re.search(r"\d+", path.name)[0]), path.suffix) for path in FILES}
    versions = range(1, _checkpoint._VERSION + 1)
    assert known == {(v, suffix) for v in versions for suffix in (".npz", ".safetensors")}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_loads_with_its_numbers(path):
    if path.suffix == ".safetensors":
        pytest.importorskip("safetensors")
    opt, params = make()
    before = values(opt)
    opt.load(path)
    found = values(opt)
    with np.load(path.with_name(f"{path.stem}-values.npz")) as held:
        assert set(held) == set(found)
        for name, array in found.items():
            assert array.dtype == held[name].dtype and array.tobytes() == held[name].tobytes(), name
        assert any((before[name] != held[name]).any() for name in held)
    opt.step([None, {"double": np.ones(7)}])  # and the run goes on
    assert opt.state_dict()["step"] == 4
