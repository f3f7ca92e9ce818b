"""Clipping and a running average of the parameters, in the pass of the step.

`clip_ema.py FILE` draws both losses into a picture.
"""

import sys

import numpy as np

import fusedopt

rng = np.random.default_rng(0)
x = rng.standard_normal((4096, 16)).astype("f4")
target = x @ rng.standard_normal((16, 1)).astype("f4")
target += rng.standard_t(2, target.shape).astype("f4")  # noise with outliers
w = np.zeros((16, 1), "f4")


def loss():
    return np.abs(x @ w - target).mean()


opt = fusedopt.SGD(w, lr=0.02, ema=0.99, max_grad_norm=10.0)
clipped, losses = 0, []
for step in range(1000):
    batch = rng.integers(len(x), size=8)
    grad = 2 * x[batch].T @ (x[batch] @ w - target[batch]) / 8
    clipped += opt.step(grad).clip_factor < 1
    if step % 10 == 9:
        last = loss()
        with opt.swap_ema():
            average = loss()
        losses.append((step + 1, last, average))

print(f"{clipped} of 1000 steps were clipped")
print(f"loss of the last parameters {last:.2f}, of their average {average:.2f}")
assert average < last

if sys.argv[1:]:
    from matplotlib.figure import Figure

    steps, of_last, of_average = zip(*losses, strict=True)
    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, of_last, label="of the parameters")
    axes.plot(steps, of_average, label="of their average")
    axes.set(xlabel="step", ylabel="loss (logarithmic)", yscale="log")
    axes.legend()
    figure.savefig(sys.argv[1])
