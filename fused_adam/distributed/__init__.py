"""Sharded steps on several ranks: `Sharded`, over the ranks of torch.distributed or the threads of one process.

For example, where no torch is needed::

    from fused_adam.distributed import Sharded, Threads

    def train(collective):
        params = {"W": np.ones((4, 3), np.float32)}
        opt = Sharded(fused_adam.AdamW, params, collective, lr=1e-3)
        opt.step({"W": gradient_of(collective.rank, params)})
        return opt.params

    Threads.run(2, train)

How to use it, and what it costs from one rank to 16,384, is in docs/scale.md.
"""

from fused_adam.distributed._collective import Alone as Alone
from fused_adam.distributed._collective import Collective as Collective
from fused_adam.distributed._collective import Work as Work
from fused_adam.distributed._sharded import Sharded as Sharded
from fused_adam.distributed._threads import Threads as Threads
from fused_adam.distributed._torch import TorchCollective as TorchCollective
