"""float16 gradients: a loss scale keeps small ones from vanishing, and skips what overflows."""

import numpy as np

import fusedopt

rng = np.random.default_rng(0)
x = rng.standard_normal((256, 16)).astype("f4")
target = x @ rng.standard_normal((16, 1)).astype("f4")
w = np.zeros((16, 1), "f4")

opt = fusedopt.AdamW(w, lr=0.05)
scaler = fusedopt.GradScaler(init_scale=2.0**20)  # too large at first
skipped = 0
for _ in range(300):
    error = (x @ w - target) * np.float32(scaler.scale)  # of the scaled loss
    with np.errstate(over="ignore"):
        grad = (2 * x.T @ error / len(x)).astype("f2")
    skipped += scaler.step(opt, grad).skipped
    scaler.update()

print(f"{skipped} steps were skipped; the scale is {scaler.scale:g}")
print(f"loss {np.square(x @ w - target).mean():.3f}")
assert skipped > 0 and np.square(x @ w - target).mean() < 0.01
