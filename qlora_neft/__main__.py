"""``python -m qlora_neft``: the command line, and the target for torchrun and accelerate."""

from __future__ import annotations

from .cli import main

if __name__ == "__main__":
    main()
