"""`python -m bench.gpu`, from the checkout, does everything; `python -m bench.gpu record FOLDER` makes the record and
the table of a run that was cut off, from what it left in a folder.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

try:
    from . import session, worker
except ImportError as error:  # an interpreter without NumPy
    raise SystemExit(f"make gpu: {sys.executable}: {error}; choose another interpreter with PYTHON=...") from None


def main(argv: Sequence[str]) -> int:
    match argv:
        case ["worker", *arguments]:  # how it starts processes of its own
            return worker.main(arguments)
        case ["record", folder]:
            return session.finish(Path(folder))
        case []:
            return session.main()
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
