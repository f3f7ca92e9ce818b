"""The classic small classifier in NumPy: two hidden ReLU layers, softmax, cross-entropy."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Layer = dict[str, Floats]
Params = dict[str, Layer]

HIDDEN = (128, 128)


def init(inputs: int, classes: int, seed: int) -> Params:
    """Return initial parameters, normal with He et al.'s variance (ICCV 2015, equation 10)."""
    rng = np.random.default_rng(seed)
    sizes = (inputs, *HIDDEN, classes)
    return {
        f"dense{i + 1}": {
            "W": (rng.standard_normal((a, b)) * np.sqrt(2 / a)).astype(np.float32),
            "b": np.zeros(b, np.float32),
        }
        for i, (a, b) in enumerate(zip(sizes, sizes[1:], strict=False))
    }


def forward(params: Params, x: Floats) -> list[Floats]:
    """Return the input and each layer's output; the last is the logits."""
    outputs = [x]
    for i, layer in enumerate(params.values(), start=1):
        z = outputs[-1] @ layer["W"] + layer["b"]
        outputs.append(z if i == len(params) else np.maximum(z, 0))
    return outputs


def softmax_loss(logits: Floats, y: NDArray[Any]) -> tuple[float, Floats]:
    """Return the mean cross-entropy and its gradient with respect to the logits."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    exp = np.exp(shifted)
    total = exp.sum(axis=1, keepdims=True)
    rows = np.arange(len(y))
    loss = float(np.mean(np.log(total[:, 0]) - shifted[rows, y]))
    gradient = exp / total
    gradient[rows, y] -= 1
    gradient /= len(y)
    return loss, gradient


def loss_and_gradients(params: Params, x: Floats, y: NDArray[Any]) -> tuple[float, Params]:
    """Return the loss of a batch and its gradients, nested like the parameters."""
    outputs = forward(params, x)
    loss, delta = softmax_loss(outputs[-1], y)
    grads: Params = {}
    for (name, layer), below in zip(reversed(params.items()), reversed(outputs[:-1]), strict=True):
        grads[name] = {"W": below.T @ delta, "b": delta.sum(axis=0)}
        delta = (delta @ layer["W"].T) * (below > 0)
    return loss, grads


def evaluate(params: Params, x: Floats, y: NDArray[Any]) -> tuple[float, NDArray[np.intp]]:
    """Return the mean loss on some data, and the predicted classes."""
    logits = forward(params, x)[-1]
    return softmax_loss(logits, y)[0], logits.argmax(axis=1)
