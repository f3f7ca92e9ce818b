"""Write the checkpoints of this version's format, and what is in them, as plain arrays.

    python tests/data/make.py

Run it once for each new format version, before its first release. Files of released versions are
never written again: tests/test_old_checkpoints.py loads all of them.
"""

from pathlib import Path

import numpy as np
from ml_dtypes import bfloat16

import fusedopt
from fusedopt import _checkpoint
from fusedopt.formats import Stored

FOLDER = Path(__file__).parent


def make():
    """Return an optimizer with state in each kind of format, and its parameters."""
    rng = np.random.default_rng(0)
    params = {
        "wide": rng.standard_normal((8, 20)).astype("f4"),
        "double": rng.standard_normal(7),
        "half": rng.standard_normal(70).astype(bfloat16),
    }
    groups = [
        {"params": {"wide": params["wide"], "half": params["half"]}, "state_dtype": "int8"},
        {"params": {"double": params["double"]}, "lr": 0.01, "ema": 0.9},
    ]
    opt = fusedopt.AdamW(groups, lr=0.1, amsgrad=True, min_8bit_size=100, master_bits=24)
    return opt, params


def values(opt):
    """Return all numbers of the state, as float or integer arrays by name."""
    found = {"step": np.array(opt.state_dict()["step"])}
    for leaf, state in opt.state.items():
        for name, array in state.items():
            found[f"{leaf}/{name}"] = (
                array.decode() if isinstance(array, Stored) else np.array(array)
            )
    return found


def main():
    """Take three steps and write the files."""
    opt, params = make()
    for step in range(3):
        rng = np.random.default_rng(step)
        wide, double, half = (rng.standard_normal(p.shape) for p in params.values())
        opt.step([{"wide": wide.astype("f4"), "half": half.astype("f4")}, {"double": double}])
    name = f"format{_checkpoint._VERSION}"
    for suffix in (".npz", ".safetensors"):
        opt.save(FOLDER / (name + suffix))
    np.savez(FOLDER / f"{name}-values.npz", **values(opt))


if __name__ == "__main__":
    main()
