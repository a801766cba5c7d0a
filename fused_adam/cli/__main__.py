"""`python -m fused_adam.cli` is the command `fused-adam`."""

import sys

from fused_adam.cli import main

sys.exit(main())
