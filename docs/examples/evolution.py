"""An evolution strategy: Adam on gradients that are estimated from ranked returns."""

import numpy as np

import fusedopt

rng = np.random.default_rng(0)
theta = np.zeros(100, "f4")
goal = rng.standard_normal(100).astype("f4")
opt = fusedopt.Adam(theta, lr=0.05, maximize=True)

sigma = np.float32(0.1)
for _ in range(400):
    noise = rng.standard_normal((32, 100)).astype("f4")
    noise = np.concatenate([noise, -noise])  # in pairs
    returns = -np.square(theta + sigma * noise - goal).sum(axis=1)
    ranks = (returns.argsort().argsort() / (len(returns) - 1) - 0.5).astype("f4")
    opt.step(ranks @ noise / (len(returns) * sigma))

print(f"squared distance to the goal: {np.square(theta - goal).sum():.2f}")
assert np.square(theta - goal).sum() < 2
