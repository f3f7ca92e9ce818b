"""Rows of an embedding: factors of users and items from ratings, a batch's rows at a time."""

import numpy as np

import fusedopt
from fusedopt import Rows

rng = np.random.default_rng(0)
users, items, width = 5000, 2000, 16
hidden_u, hidden_v = (rng.standard_normal((n, 4)).astype("f4") for n in (users, items))

params = {
    "user": rng.normal(0, 0.1, (users, width)).astype("f4"),
    "item": rng.normal(0, 0.1, (items, width)).astype("f4"),
}
opt = fusedopt.Adagrad(params, lr=0.3)

for step in range(2001):
    u, v = rng.integers(0, users, 512), rng.integers(0, items, 512)  # some more than once
    rating = np.sum(hidden_u[u] * hidden_v[v], axis=1)
    error = np.sum(params["user"][u] * params["item"][v], axis=1) - rating
    gradient = error[:, None] * np.stack([params["item"][v], params["user"][u]])
    opt.step({"user": Rows(u, gradient[0]), "item": Rows(v, gradient[1])})
    if step % 500 == 0:
        print(f"step {step}: mean squared error {np.mean(error**2):.3f}")

assert np.mean(error**2) < 0.2
