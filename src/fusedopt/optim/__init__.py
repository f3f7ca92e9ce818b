"""The optimizers, one file for each rule: class, function, and the constants of a step."""
