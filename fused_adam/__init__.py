"""fused_adam: the optimizer step in one pass over memory, the same bits on every backend."""

from fused_adam._adam_step import adam_step as adam_step
from fused_adam._adam_step import adamw_step as adamw_step
from fused_adam._layout import FlatBuffer as FlatBuffer
from fused_adam._layout import flatten as flatten
from fused_adam._optimizer import SGD as SGD
from fused_adam._optimizer import Adagrad as Adagrad
from fused_adam._optimizer import Adam as Adam
from fused_adam._optimizer import AdamW as AdamW
from fused_adam._optimizer import Lion as Lion
from fused_adam._optimizer import RMSprop as RMSprop
from fused_adam._sparse import SparseGrad as SparseGrad
from fused_adam._user_rule import rule as rule
from fused_adam.backends import backends as backends

__version__ = "0.1.0"
