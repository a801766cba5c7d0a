"""Checkpoints: `save` and `load` of an optimizer with its parameters, and `convert` for those of other libraries.

For example::

    from fused_adam import checkpoint

    checkpoint.save("run1", opt, extra={"epoch": epoch})  # the old checkpoint or the new one, never neither
    extra = checkpoint.load("run1", opt)  # on any backend, bit for bit

What is on the disk is described in docs/checkpoints.md.
"""

from fused_adam.checkpoint._api import load as load
from fused_adam.checkpoint._api import save as save
from fused_adam.checkpoint._api import verify as verify
from fused_adam.checkpoint._foreign import LAYOUTS as LAYOUTS
from fused_adam.checkpoint._foreign import convert as convert
from fused_adam.checkpoint._format import CheckpointError as CheckpointError
