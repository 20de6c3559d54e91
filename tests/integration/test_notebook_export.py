"""export_to_hub.ipynb executed in a real kernel, against a stand-in for the Hub, and what it left there and on disk."""

import json
import os
import subprocess
import sys
from pathlib import Path

from command_line import adapter
from hub_server import HubServer
from notebook_runner import SMALL, execute, needs_notebooks, text_of

from qlora_neft.paths import resolve_bundled

pytestmark = needs_notebooks
TOKEN = "hf_annwrite0123456789abcdef"


def test_export_merges_publishes_and_loads_back(tmp_path):
    with HubServer() as hub:
        hub.add_user("ann", write=TOKEN)
        variables = hub.environment(TOKEN, tmp_path / "home")
        upload = [Path(sys.executable).with_name("hf"), "upload", "ann/base", resolve_bundled("bundled:demo/base")]
        subprocess.run(upload, env={**os.environ, **variables}, check=True, capture_output=True)
        form = {"MORE": f"{SMALL} train.max_steps=4", "REPO_ID": "ann/mine", "BASE_ID": "ann/base", "PUSH_TO_HUB": True}
        folder = tmp_path / "work"
        notebook = execute("export_to_hub.ipynb", folder, variables, PROOF_ROWS=4, **form)
        published = hub.repo("ann/mine")
        assert published.private and len(published.pushes()) == 1
        assert published.files()["adapter_model.safetensors"] == adapter(folder / "demo-run")
    report = json.loads((folder / "merged" / "merge_report.json").read_text())
    assert report["status"] == "done" and report["proof"]["rows"] == 4
    assert 0 <= report["strategies"]["dequantized"]["kl"] < 1e-3
    assert (folder / "merged" / "model.safetensors").stat().st_size > 4e6
    card = (folder / "published" / "README.md").read_text()
    assert published.files()["README.md"].decode() == card and "ann/base" in card
    said = text_of(notebook)
    assert card.split("---", 2)[2].strip() in said and TOKEN not in said and "merged:" in said
    answers = [line for line in said.splitlines() if line.startswith("Say thank you to Clara the swan. ->")]
    assert len(answers) == 2 and answers[0] == answers[1]
