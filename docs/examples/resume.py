"""A run that is killed and resumed ends with the bits of one that was not."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

import fusedopt


def train(folder, kill_at=None):
    """Train for 100 steps from the last checkpoint; save every 10 steps."""
    w = np.zeros((64, 64), "f4")
    opt = fusedopt.AdamW(w, lr=fusedopt.schedules.cosine(0.01, steps=100), state_dtype="int8")
    first, saved = 0, sorted(folder.glob("step*.npz"))
    if saved:  # the newest; a name appears only when its file is whole
        opt.load(saved[-1])
        first = opt.state_dict()["step"]
        w[...] = np.load(folder / f"w{first:03}.npy")
        print(f"resumed at step {first}", flush=True)
    for step in range(first, 100):
        grad = np.random.default_rng(step).standard_normal(w.shape).astype("f4") + w
        opt.step(grad)
        if (step + 1) % 10 == 0:
            np.save(folder / f"w{step + 1:03}.npy", w)
            opt.save(folder / f"step{step + 1:03}.npz")
        if step + 1 == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
    return w


if __name__ == "__main__":
    if len(sys.argv) > 1:
        train(Path(sys.argv[1]), kill_at=57)
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        killed = subprocess.run([sys.executable, __file__, one])
        assert killed.returncode == -signal.SIGKILL
        resumed, whole = train(Path(one)), train(Path(other))
        assert resumed.tobytes() == whole.tobytes()
        print("the same bits as without the kill")
