"""Contenders that are compiled as functions of their arrays: optax under jax.jit, Keras."""

from __future__ import annotations

from typing import Any

import numpy as np

from fusedopt._check import Array
from fusedopt.bench.cases import CLASSES, Problem
from fusedopt.bench.contenders._base import Contender, nbytes
from fusedopt.bench.contenders.torch import settle


class Optax(Contender):
    """optax under jax.jit, with parameters and state donated; each step waits for its result."""

    def __init__(self, problem: Problem, params: list[Array]) -> None:
        import jax
        import optax

        jax.config.update("jax_enable_x64", problem.dtype == "float64")
        o = problem.options
        makes = {
            "sgd": lambda: optax.sgd(o["lr"], momentum=o["momentum"]),
            "adam": lambda: optax.adam(o["lr"], *o["betas"], eps=o["eps"]),
            "adamw": lambda: optax.adamw(
                o["lr"], *o["betas"], eps=o["eps"], weight_decay=o["weight_decay"]
            ),
        }
        transform = makes[problem.optimizer]()

        def step(params: Any, state: Any, grads: Any) -> Any:
            updates, state = transform.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        self.call = jax.jit(step, donate_argnums=(0, 1))
        self.wait = jax.block_until_ready
        self.held = [jax.numpy.array(p) for p in params]
        self.state = transform.init(self.held)

    def load(self, grads: list[Array]) -> None:
        import jax

        self.grads = [jax.numpy.array(g) for g in grads]

    def step(self) -> None:
        self.held, self.state = self.wait(self.call(self.held, self.state, self.grads))

    def params(self) -> list[Array]:
        return [np.asarray(p) for p in self.held]

    def state_bytes(self) -> int:
        import jax

        return nbytes(jax.tree.leaves(self.state))


class Keras(Contender):
    """Keras's optimizers, as a custom training loop calls them on each backend.

    jax: `stateless_apply` under jax.jit with donation; tensorflow: `apply` in a tf.function; torch
    and numpy: `apply`. The backend is chosen by KERAS_BACKEND, once for a process.
    """

    def __init__(self, problem: Problem, params: list[Array]) -> None:
        import keras

        self.problem, self.backend = problem, keras.backend.backend()
        o = problem.options
        names = {"lr": "learning_rate", "eps": "epsilon", "momentum": "momentum"}
        if problem.optimizer == "adamw":
            names["weight_decay"] = "weight_decay"
        options = {theirs: o[ours] for ours, theirs in names.items() if ours in o}
        if "betas" in o:
            options |= {"beta_1": o["betas"][0], "beta_2": o["betas"][1]}
        if self.backend == "jax":
            import jax

            jax.config.update("jax_enable_x64", problem.dtype == "float64")
        if self.backend == "torch":
            import torch

            torch.set_num_threads(problem.threads)
            settle(problem.dtype)
        self.grads: list[Any]
        self.variables = [keras.Variable(p, dtype=problem.dtype) for p in params]
        self.optimizer = getattr(keras.optimizers, CLASSES[problem.optimizer])(**options)
        self.optimizer.build(self.variables)
        self.tensor = keras.ops.convert_to_tensor
        self.array = keras.ops.convert_to_numpy
        if self.backend == "jax":
            self.call = jax.jit(self.optimizer.stateless_apply, donate_argnums=(0, 2))
            self.wait = jax.block_until_ready
            self.held = [v.value for v in self.variables]
            self.state = [v.value for v in self.optimizer.variables]
            self.step = self.stateless_step  # type: ignore[method-assign]
        elif self.backend == "tensorflow":
            import tensorflow as tf

            self.apply = tf.function(lambda: self.optimizer.apply(self.grads))
        else:
            self.apply = lambda: self.optimizer.apply(self.grads)

    def load(self, grads: list[Array]) -> None:
        if self.backend == "tensorflow":  # the traced function keeps reading the first variables
            import tensorflow as tf

            if hasattr(self, "grads"):
                for held, g in zip(self.grads, grads, strict=True):
                    held.assign(g)
            else:
                self.grads = [tf.Variable(g, trainable=False) for g in grads]
        else:
            self.grads = [self.tensor(g) for g in grads]

    def step(self) -> None:
        self.apply()

    def stateless_step(self) -> None:
        self.held, self.state = self.wait(self.call(self.state, self.grads, self.held))

    def params(self) -> list[Array]:
        if self.backend == "jax":
            return [np.asarray(p) for p in self.held]
        return [self.array(v) for v in self.variables]

    def state_bytes(self) -> int:
        return sum(
            int(np.prod(v.shape)) * np.dtype(v.dtype).itemsize for v in self.optimizer.variables
        )
