"""How fast a step is on this machine, compared with memory bandwidth and with other libraries.

Each case (`cases`, `shapes.json`) is measured with each contender (`contenders`, a row each) in
worker processes (`worker`) that take turns (`measure`). The measurements go into a recording
(`recording`), which `stats`, `report` and `plots` read. `python -m fusedopt bench` is its command
line.
"""
