# /// script
# requires-python = ">=3.11"
# dependencies = ["qlora-neft[plots] @ git+https://github.com/qlora-neft/qlora_neft"]
# ///
"""Train on a machine that is rented by the minute, and keep what was learned on the Hub.

    hf jobs uv run --flavor l4x1 --timeout 6h --secrets HF_TOKEN jobs/train.py qwen3-4b --push-to me/qwen3-4b-mine \\
        data.path=me/my-rows

The arguments are those of ``qlora-neft train``; the folder is ``out`` unless ``--output-dir`` names another. A job's
disk is gone when it ends: without ``--push-to`` or ``machine.mirror_dir`` nothing begins. The same command continues a
job that was cut short. Runs anywhere: ``uv run jobs/train.py demo --throw-away``.
"""

import os
import sys
from typing import NoReturn

KEEPS = ("--push-to", "machine.push_to=", "machine.mirror_dir=")
USAGE = "usage: train.py RECIPE --push-to OWNER/NAME [options and overrides of qlora-neft train]"


def refuse(message: str) -> NoReturn:
    """Exit as ``qlora-neft`` does for what was written wrongly."""
    print(message, file=sys.stderr)
    raise SystemExit(2)


def command_of(arguments: list[str]) -> list[str]:
    """The words behind ``qlora-neft``, or an exit with what is missing."""
    if not arguments or arguments[0].startswith("-"):
        refuse(f"RECIPE: required as the first argument.\n{USAGE}")
    throw_away = "--throw-away" in arguments
    words = [word for word in arguments if word != "--throw-away"]
    if not throw_away and not any(word.startswith(KEEPS) for word in words):
        refuse(
            "--push-to: required, since a job's disk is gone when it ends. Write --push-to OWNER/NAME, "
            "machine.mirror_dir=FOLDER of a mounted bucket, or --throw-away to keep nothing."
        )
    if any(word.startswith(KEEPS[:2]) for word in words) and not os.environ.get("HF_TOKEN"):
        refuse("HF_TOKEN: required to push. Add --secrets HF_TOKEN to hf jobs uv run, or export it.")
    if not any(word == "--output-dir" or word.startswith("--output-dir=") for word in words):
        words += ["--output-dir", "out"]
    return ["train", *words]


if __name__ == "__main__":
    command = command_of(sys.argv[1:])
    from qlora_neft.cli import main

    sys.argv = ["qlora-neft", *command]
    sys.exit(main())
