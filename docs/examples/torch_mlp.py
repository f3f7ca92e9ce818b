"""The same network in torch: one line differs from a loop with torch.optim."""

import torch
from sklearn.datasets import load_digits

import fusedopt.torch as fo

torch.manual_seed(0)
digits = load_digits()
x = torch.tensor(digits.data / 16, dtype=torch.float32)
y = torch.tensor(digits.target)

model = torch.nn.Sequential(
    torch.nn.Linear(64, 128), torch.nn.ReLU(),
    torch.nn.Linear(128, 128), torch.nn.ReLU(),
    torch.nn.Linear(128, 10),
)  # fmt: skip
opt = fo.AdamW(model.parameters(), lr=3e-3)  # was torch.optim.AdamW
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 470)

for _epoch in range(10):
    for batch in torch.randperm(1500).split(32):
        loss = torch.nn.functional.cross_entropy(model(x[batch]), y[batch])
        opt.zero_grad()
        loss.backward()
        opt.step()
        schedule.step()

with torch.no_grad():
    right = (model(x[1500:]).argmax(dim=1) == y[1500:]).float().mean().item()
print(f"accuracy on held-out digits {right:.2f}")
assert right > 0.85
