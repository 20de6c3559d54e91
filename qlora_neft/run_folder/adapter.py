"""What a trained adapter is on disk: safetensors, a sorted ``adapter_config.json``, the tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peft import PeftModel


def save_adapter(model: PeftModel, tokenizer: Any, output_dir: str | Path) -> None:
    """Write an adapter so that the same training writes the same bytes; no pickle is written.

    Args:
        model: The trained model; only its adapter is written, in the dtype it was trained in (float32).
        tokenizer: Saved beside it, None to leave it out.
        output_dir: Folder to write to, made if missing.
    """
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    # Without False, PEFT asks the Hub for the base's configuration to see whether its vocabulary grew.
    model.save_pretrained(output_dir, save_embedding_layers=False)
    (output_dir / "README.md").unlink(missing_ok=True)  # PEFT's template, all "[More Information Needed]"
    _sort_config(output_dir / "adapter_config.json")
    if tokenizer is not None:
        tokenizer.save_pretrained(output_dir)


def _sort_config(path: Path) -> None:
    """PEFT writes sets, in an order that changes from run to run."""
    config = json.loads(path.read_text(encoding="utf-8"))
    for key in ("target_modules", "modules_to_save", "exclude_modules"):
        if isinstance(config.get(key), list):
            config[key] = sorted(config[key])
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
