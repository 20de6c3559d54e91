"""What a user does after training, against whatever Hub the environment names: export, load, ask, train again.

python export_worker.py RUN_DIR REPO_ID OUTPUT_JSON
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import torch
from command_line import invoke
from peft import AutoPeftModelForCausalLM

from qlora_neft.adapter.folder import find_adapter
from qlora_neft.adapter.load import load_trained
from qlora_neft.base.nf4 import keep_nf4_layout, nf4_config
from qlora_neft.recipe.schema import Quantization

ON_CPU = {"device": "cpu", "precision": "fp32"}
REQUEST = [{"role": "user", "content": "Repeat 7"}]


def main(run_dir: str, repo_id: str, output: Path) -> None:
    found: dict[str, Any] = {"export": invoke("export", run_dir, "--repo-id", repo_id)}
    found["again"] = invoke("export", run_dir, "--repo-id", repo_id)
    local = load_trained(run_dir, **ON_CPU)
    ids = torch.tensor([local.prompts.ids(REQUEST)])
    wanted = logits(local.model, ids)
    by_id = load_trained(repo_id, **ON_CPU)
    found["by_id"] = torch.equal(logits(by_id.model, ids), wanted) and by_id.prompts.ids(REQUEST) == ids.tolist()[0]
    found["base"] = [find_adapter(repo_id).base, find_adapter(repo_id).base_revision]
    quantization = nf4_config(Quantization(), torch.float32)
    peft = AutoPeftModelForCausalLM.from_pretrained(
        repo_id, quantization_config=quantization, dtype=torch.float32, device_map="cpu"
    ).eval()
    keep_nf4_layout(peft)
    found["peft"] = torch.equal(logits(peft, ids), wanted)
    options = ("Repeat 7", "--max-new-tokens", "8", "--device", "cpu", "--precision", "fp32")
    found["answers"] = [invoke("generate", source, *options)[:2] for source in (run_dir, repo_id)]
    card = Path(run_dir, "export", "README.md").read_text()
    found["snippets"] = [said_by(code, output.with_name(f"snippet{n}.py")) for n, code in enumerate(python_in(card))]
    # Last, for it loads another model: what the card says repeats the training.
    found["rerun"] = invoke("train", str(Path(run_dir, "export", "recipe.yaml")), "--output-dir", "rerun")[0]
    output.write_text(json.dumps(found))


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def python_in(card: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card, re.DOTALL)


def said_by(code: str, path: Path) -> str:
    """What a program of the card prints, run as it is."""
    path.write_text(code)
    with contextlib.redirect_stdout(io.StringIO()) as stdout:
        runpy.run_path(str(path))
    return stdout.getvalue()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
