"""PyTorch's optimizers with this package's step: ``from fused_adam.torch import AdamW``.

Real ``torch.optim.Optimizer`` subclasses, with torch's arguments, errors and states, so that state dicts go both ways.
Parameters lie in host memory or, with CuPy, on GPUs. Tested with torch 2.13 on the CPU.
"""

from fused_adam.torch._classes import SGD as SGD
from fused_adam.torch._classes import Adagrad as Adagrad
from fused_adam.torch._classes import Adam as Adam
from fused_adam.torch._classes import AdamW as AdamW
from fused_adam.torch._classes import Lion as Lion
from fused_adam.torch._classes import RMSprop as RMSprop
from fused_adam.torch._convert import from_apex as from_apex
from fused_adam.torch._convert import from_bitsandbytes as from_bitsandbytes
