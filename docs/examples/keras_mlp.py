"""The same network in Keras, on its torch backend."""

import os

os.environ["KERAS_BACKEND"] = "torch"

import keras  # noqa: E402
from sklearn.datasets import load_digits  # noqa: E402

import fusedopt.keras  # noqa: E402

keras.utils.set_random_seed(0)
digits = load_digits()
x, y = digits.data.astype("float32") / 16, digits.target

model = keras.Sequential(
    [
        keras.Input((64,)),
        keras.layers.Dense(128, activation="relu"),
        keras.layers.Dense(128, activation="relu"),
        keras.layers.Dense(10, activation="softmax"),
    ]
)
model.compile(
    optimizer=fusedopt.keras.Adam(3e-3),  # was keras.optimizers.Adam
    loss="sparse_categorical_crossentropy",
    metrics=["accuracy"],
)
model.fit(x[:1500], y[:1500], batch_size=32, epochs=5, verbose=0)
loss, accuracy = model.evaluate(x[1500:], y[1500:], verbose=0)
print(f"accuracy on held-out digits {accuracy:.2f}")
assert accuracy > 0.85
