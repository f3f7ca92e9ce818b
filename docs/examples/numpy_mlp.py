"""A network of three layers on handwritten digits, in NumPy with gradients by hand.

`numpy_mlp.py FILE` draws the run into a picture.
"""

import sys

import numpy as np
from sklearn.datasets import load_digits

import fusedopt
from fusedopt import schedules

digits = load_digits()
x, y = (digits.data / 16).astype("f4"), digits.target
train, held = slice(0, 1500), slice(1500, None)

rng = np.random.default_rng(0)
layers = [
    {"W": (rng.standard_normal((m, n)) * np.sqrt(2 / m)).astype("f4"), "b": np.zeros(n, "f4")}
    for m, n in [(64, 128), (128, 128), (128, 10)]
]


def forward(x):
    """Return what each layer gets, and the scores of the classes."""
    inputs = []
    for i, layer in enumerate(layers):
        inputs.append(x)
        x = x @ layer["W"] + layer["b"]
        if i < 2:
            x = np.maximum(x, 0)
    return inputs, x


def loss_and_grads(x, y):
    inputs, scores = forward(x)
    p = np.exp(scores - scores.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    loss = -np.log(p[range(len(y)), y]).mean()
    p[range(len(y)), y] -= 1
    back, grads = p / len(y), []
    for layer, inner in zip(layers[::-1], inputs[::-1], strict=True):
        grads.append({"W": inner.T @ back, "b": back.sum(axis=0)})
        back = (back @ layer["W"].T) * (inner > 0)
    return loss, grads[::-1]


rate = schedules.cosine(3e-3, steps=470)
opt = fusedopt.AdamW(layers, lr=rate, weight_decay=0.01)
history = fusedopt.monitor.History(every=5)
for _epoch in range(10):
    order = rng.permutation(1500)
    for i in range(0, 1500, 32):
        batch = order[i : i + 32]
        loss, grads = loss_and_grads(x[train][batch], y[train][batch])
        result = opt.step(grads, stats=history.due)
        history.record(result, loss=float(loss), lr=rate(result.step))

if sys.argv[1:]:
    history.plot(sys.argv[1])
right = forward(x[held])[1].argmax(axis=1) == y[held]
print(f"{opt.state_dict()['step']} steps, accuracy on held-out digits {right.mean():.2f}")
assert right.mean() > 0.85
