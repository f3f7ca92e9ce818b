"""Fine-tune a small transformer on text, in a custom loop: fusedopt.torch beside torch.optim.

    python bench/finetune_torch.py [--steps 60] [--width 192] [--threads 2] [--optimizers ...]

The text ships with Python: the model is first trained on sources of the standard library, then
fine-tuned on the documentation of its keywords and topics (pydoc_data). The fine-tuning runs once
with each optimizer from the same weights on the same batches. The optimizers take turns at each
step, so that times are comparable. Prints the held-out loss, and the time of the optimizer's step
and of the rest.
"""

from __future__ import annotations

import argparse
import copy
import random
import sysconfig
from collections.abc import Callable, Iterable
from pathlib import Path
from pydoc_data import topics as documentation
from statistics import median
from time import perf_counter

import torch
from torch import Tensor, nn

import fusedopt
import fusedopt.torch as fo

CONTEXT = 64  # bytes that the model sees
Make = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]

OPTIMIZERS: dict[str, Make] = {
    "torch.optim.AdamW": lambda p: torch.optim.AdamW(p, lr=1e-3),
    "torch.optim.AdamW(fused=True)": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
    "fusedopt.torch.AdamW": lambda p: fo.AdamW(p, lr=1e-3),
    "fusedopt.torch.AdamW(state_dtype='int8')": lambda p: fo.AdamW(p, lr=1e-3, state_dtype="int8"),
}


class Transformer(nn.Module):
    """A decoder over bytes."""

    def __init__(self, width: int, depth: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, width)
        self.place = nn.Parameter(torch.randn(CONTEXT, width) * 0.02)
        layer = nn.TransformerEncoderLayer(
            width, 4, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(width, 256)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(CONTEXT))

    def forward(self, text: Tensor) -> Tensor:
        """Return the mean loss of each next byte, in nats; `text` has CONTEXT + 1 columns."""
        x = self.embed(text[:, :-1]) + self.place
        x = self.head(self.layers(x, mask=self.mask, is_causal=True))
        return nn.functional.cross_entropy(x.flatten(0, 1), text[:, 1:].flatten())


def as_bytes(texts: Iterable[str]) -> Tensor:
    """Return all texts as one row of bytes."""
    joined = "\n\n".join(texts).encode()
    return torch.frombuffer(bytearray(joined), dtype=torch.uint8).long()


def batches(data: Tensor, count: int, size: int, seed: int) -> list[Tensor]:
    """Return batches of pieces from random positions."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(data) - CONTEXT - 1, (count, size), generator=generator)
    return [torch.stack([data[s : s + CONTEXT + 1] for s in row.tolist()]) for row in starts]


def train(model: Transformer, opt: torch.optim.Optimizer, text: Tensor) -> tuple[float, float]:
    """Take one step; return the seconds of forward and backward, and of the optimizer."""
    begin = perf_counter()
    opt.zero_grad()
    model(text).backward()
    middle = perf_counter()
    opt.step()
    return middle - begin, perf_counter() - middle


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--threads", type=int, default=fusedopt.get_num_threads())
    parser.add_argument("--optimizers", nargs="+", default=list(OPTIMIZERS), choices=OPTIMIZERS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    fusedopt.set_num_threads(options.threads)
    torch.manual_seed(0)

    library = Path(sysconfig.get_path("stdlib"))
    sources = as_bytes(
        (library / f"{name}.py").read_text() for name in ("argparse", "ast", "typing", "inspect")
    )
    topics = as_bytes(documentation.topics.values())
    cut = len(topics) * 9 // 10
    held_out = batches(topics[cut:], 20, 16, seed=1)

    base = Transformer(options.width)
    print(f"{sum(p.numel() for p in base.parameters()):,} parameters, {options.threads} threads")
    first = OPTIMIZERS[options.optimizers[0]](base.parameters())
    for text in batches(sources, options.steps, 16, seed=2):
        train(base, first, text)

    models = {name: copy.deepcopy(base) for name in options.optimizers}
    opts = {name: OPTIMIZERS[name](model.parameters()) for name, model in models.items()}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    order = list(models)
    for text in batches(topics[:cut], options.steps, 16, seed=3):
        random.shuffle(order)
        for name in order:
            seconds[name].append(train(models[name], opts[name], text))
    print(f"{'':42}{'held-out loss':>14}{'optimizer':>12}{'the rest':>12}")
    for name, model in models.items():
        with torch.no_grad():
            loss = sum(float(model(text)) for text in held_out) / len(held_out)
        rest, step = (median(column) * 1e3 for column in zip(*seconds[name], strict=True))
        print(f"{name:42}{loss:14.4f}{step:9.2f} ms{rest:9.2f} ms")


if __name__ == "__main__":
    main()
