"""Count a training step: `python -m benchmarks.step_counter --help`."""

from __future__ import annotations

import argparse

from .arms import FAMILIES, Arm, count, operations
from .counter import KINDS
from .recorded import record


def main() -> None:
    """Count one arm and print it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step_counter", description=__doc__)
    parser.add_argument("--record", nargs="*", metavar="ARM", help="count again and write counts.json: all, or these")
    parser.add_argument("--family", choices=FAMILIES, default="llama", help="default: an eighth of Llama-2-7B")
    parser.add_argument("--r", type=int, default=8, help="LoRA's rank; 8 here is 64 of Llama-2-7B (default)")
    parser.add_argument("--dropout", type=float, default=0.1, help="LoRA's (default 0.1)")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--checkpointing", action="store_true", help="all blocks recompute their activations")
    parser.add_argument("--padding-free", action="store_true", help="rows are joined")
    parser.add_argument("--trainer", choices=("ours", "trl"), default="ours")
    parser.add_argument("--as-on-cuda", action="store_true", help="a fused function counts as one launch")
    parser.add_argument("--argument", action="append", default=[], metavar="NAME=VALUE", help="of the trainer's config")
    parser.add_argument("--scale", type=float, default=8.0, help="factor on bytes (8: llama here as Llama-2-7B)")
    parser.add_argument("--operations", action="store_true", help="list what a layer runs as well")
    options = parser.parse_args()
    if options.record is not None:
        record(options.record)
        return
    arm = Arm(
        family=options.family,
        r=options.r,
        dropout=options.dropout,
        precision=options.precision,
        checkpointing=options.checkpointing,
        padding_free=options.padding_free,
        trainer=options.trainer,
        as_on_cuda=options.as_on_cuda,
        arguments={name: _value(text) for name, _, text in (item.partition("=") for item in options.argument)},
    )
    counts, scale = count(arm), options.scale / 1024
    print(f"{'per token and layer':<20}{'KB':>10}{'launches':>10}")
    for kind in KINDS:
        print(f"{kind:<20}{counts.bytes[kind] * scale:>10.1f}{counts.launches[kind]:>10}")
    print(f"{'together':<20}{sum(counts.bytes.values()) * scale:>10.1f}{sum(counts.launches.values()):>10}")
    print(f"{'kept for backward':<20}{counts.kept * scale:>10.1f}\n{'peak':<20}{counts.peak * scale:>10.1f}")
    print(f"the host waits {sum(counts.waits.values())} times in a step of one micro-batch:")
    for place, times in counts.waits_at.items():
        print(f"  {times} x {place}")
    if options.operations:
        print("\nOne layer at one length, constants included:")
        for kind, name, launches, size in operations(arm):
            print(f"{kind:<16}{name:<52}{launches:>5}{size * scale:>10.1f} KB")


def _value(text: str) -> bool | int | float | str:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


if __name__ == "__main__":
    main()
