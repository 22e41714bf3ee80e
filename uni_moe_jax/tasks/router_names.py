"""Names of the routers, for configs, which are checked without JAX; `moe/routers.py` implements them."""

DENSE = 'dense'  # no experts
MERGED = ('attribute', 'task', 'modality')  # route conditions: the kernels of the chosen experts merge
DISPATCHED = ('token', 'context')  # route tokens: each token is dispatched to its experts
ROUTERS = (DENSE, *MERGED, *DISPATCHED)
