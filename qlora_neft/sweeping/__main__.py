"""``python -m qlora_neft.sweeping FOLDER MEASURE...``: measure one run in a process of its own, for `ProcessRunner`."""

from __future__ import annotations

import sys
from pathlib import Path

from ..errors import RunFailed, UserInputError
from .measures import measure_run


def main(arguments: list[str]) -> int:
    """Exit code 0, 1 for a failure, 2 for wrong input."""
    try:
        measure_run(Path(arguments[0]), arguments[1:])
    except (UserInputError, RunFailed) as error:
        is_input = isinstance(error, UserInputError)
        print(f"{'error' if is_input else 'failed'}: {error}", file=sys.stderr)
        return 2 if is_input else 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
