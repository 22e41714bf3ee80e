"""The routers, for configs, which are checked without JAX; `moe/routers.py` and `moe/token_routers.py` implement them.

A new condition router is one entry of `CONDITION_ROUTERS`.
"""

import dataclasses
from collections.abc import Callable, Hashable

from uni_moe_jax.tasks.attributes import Condition

DENSE = 'dense'  # no experts


@dataclasses.dataclass(frozen=True)
class ConditionInput:
  """What a condition router embeds."""
  read: Callable[[Condition], Hashable]  # the part of a condition that the router sees: its attribute bits, or a name
  # Rows of the embedding table of names, in order, given the names of task types and target families; None: the router
  # projects attribute bits.
  names: Callable[[tuple[str, ...]], tuple[str, ...]] | None = None


# These route conditions: the kernels of the chosen experts merge.
CONDITION_ROUTERS = {
    'attribute': ConditionInput(lambda c: c.bits),
    'task': ConditionInput(lambda c: c.task, names=lambda router_tasks: router_tasks),
    'modality': ConditionInput(lambda c: c.modality, names=lambda _: ('visual', 'text')),
}
DISPATCHED = ('token', 'context')  # these route tokens: each token is dispatched to its experts
ROUTERS = (DENSE, *CONDITION_ROUTERS, *DISPATCHED)
GMM_BACKENDS = ('tiled', 'batched', 'ragged', 'megablox', 'triton', 'tokamax')  # of dispatched tokens: `kernels/gmm/`
