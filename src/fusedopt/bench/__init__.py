"""How fast a step is on this machine: against the memory's limit, and against its peers.

Cases (`cases`, `shapes.json`) times contenders (`contenders`, a row each) are measured in worker
processes (`worker`) that take turns under one schedule (`measure`). What is measured goes into a
recording (`recording`), which `statistics`, `report` and `plots` read. `python -m fusedopt bench`
is its command line.
"""
