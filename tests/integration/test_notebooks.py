"""Every notebook executed in a real kernel, on the demo model and offline, and what each left on disk."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import ROWS, adapter, logged, summary
from hub_server import HubServer
from notebook_runner import execute, pictures_of, text_of

from qlora_neft import QLoRANeftTrainer, load_recipe, run
from qlora_neft.errors import RunInterrupted
from qlora_neft.files.bundled import resolve_bundled
from qlora_neft.run_folder.checkpoint_files import find_checkpoints

MISSING = [
    name for name in ("nbclient", "ipykernel", "matplotlib", "rouge_score") if not importlib.util.find_spec(name)
]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {MISSING} (pip install -e '.[dev]')")
OWN_ROWS = (
    "data.path=mine.jsonl data.format=auto data.prompt_template=auto data.split=train "
    "data.eval_path=null data.eval_split=null data.eval_fraction=0.05"
)
FEW = "machine.eval_answers=2 data.split=train[:64] data.eval_split=train[:16]"
TOKEN = "hf_annwrite0123456789abcdef"


class Disconnected(QLoRANeftTrainer):
    """A session that is told to stop in the third step."""

    def training_step(self, *args, **kwargs):
        if self.state.global_step == 2:
            signal.raise_signal(signal.SIGTERM)
        return super().training_step(*args, **kwargs)


def test_finetune_with_rows_of_ones_own_goes_on_after_a_disconnect(tmp_path, monkeypatch):
    rows = [{"prompt": f"{row['instruction']} {n}", "completion": row["output"]} for n, row in enumerate(ROWS)]
    mirror = tmp_path / "drive"
    changes = f"neftune.noise_alpha=10 train.max_steps=4 machine.mirror_dir={mirror} {OWN_ROWS} machine.eval_answers=1"
    for session in ("lost", "new"):
        (tmp_path / session).mkdir()
        (tmp_path / session / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path / "lost")
    with pytest.raises(RunInterrupted):
        run(load_recipe("demo", changes.split()), "first", quiet=True, trainer_class=Disconnected)
    lost = find_checkpoints(mirror).newest.step

    form = {"RECIPE": "demo", "DATA": "mine.jsonl", "ALPHA": 10, "MAX_STEPS": 4, "MORE": "machine.eval_answers=1"}
    notebook = execute("finetune.ipynb", tmp_path / "new", MIRROR=str(mirror), PROMPTS="Repeat 3 | Say hello", **form)

    done = summary(tmp_path / "new" / "first")
    assert (done["status"], done["steps"], done["resumed_from_step"]) == ("done", 4, lost)
    assert done["recipe"]["neftune"]["noise_alpha"] == 10 and done["recipe"]["data"]["path"] == "mine.jsonl"
    assert done["after"]["clean_train_loss"] < done["before"]["clean_train_loss"]
    assert adapter(tmp_path / "new" / "first") == adapter(mirror)
    assert sorted(logged(mirror)) == sorted(logged(tmp_path / "new" / "first")) and len(logged(mirror)) > 1
    said = text_of(notebook)
    losses = [done[when]["held_out_loss"] for when in ("before", "after")]
    assert f"| held-out loss | {losses[0]:.3f} | {losses[1]:.3f} |" in said
    assert "⟦" in said and "base:" in said and "adapter:" in said and "fits on this machine's memory" in said
    assert pictures_of(notebook) == 1  # of the losses; what is drawn later takes its place


@pytest.mark.slow
def test_export_merges_publishes_and_loads_back(tmp_path):
    with HubServer() as hub:
        hub.add_user("ann", write=TOKEN)
        variables = hub.environment(TOKEN, tmp_path / "home")
        upload = [Path(sys.executable).with_name("hf"), "upload", "ann/base", resolve_bundled("bundled:demo/base")]
        subprocess.run(upload, env={**os.environ, **variables}, check=True, capture_output=True)
        form = {"MORE": f"{FEW} train.max_steps=4", "REPO_ID": "ann/mine", "BASE_ID": "ann/base", "PUSH_TO_HUB": True}
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


@pytest.mark.slow
def test_noise_and_alpha_sweeps_and_measures(tmp_path):
    form = {"ALPHAS": "0,15", "SEEDS": 1, "MAX_STEPS": 2, "ROWS": 2, "MEASURES": "rows"}
    notebook = execute("noise_and_alpha.ipynb", tmp_path, MORE=FEW, **form)
    sweep = tmp_path / "sweep"
    runs = {value: sweep / f"noise_alpha_{value}-seed_0" for value in (0, 15)}
    assert [summary(run)["recipe"]["neftune"]["noise_alpha"] for run in runs.values()] == [0, 15]
    assert adapter(runs[0]) != adapter(runs[15])
    results = json.loads((sweep / "results.json").read_text())
    assert (results["runs"], results["finished"]) == (2, 2) and "clean_train_loss" in results["measures"]
    assert results["pairing"][0]["data"] and results["pairing"][0]["start"]
    assert all("overfit" in json.loads((folder / "measures.json").read_text()) for folder in runs.values())
    for picture in (tmp_path / "noise.png", sweep / "sweep.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")
    assert "noise_alpha 15" in (sweep / "report.html").read_text()
    assert "Paired differences to noise_alpha 0" in text_of(notebook) and pictures_of(notebook) == 3


def test_thirty_billion_plans_and_rehearses(tmp_path):
    notebook = execute("thirty_billion.ipynb", tmp_path, REHEARSAL_STEPS=2, CARDS="t4, h200")
    said = text_of(notebook)
    assert "effective batch x 2" in said and "learning rate   x 0.5" in said
    assert "| t4 | no |" in said and "| h200 | yes |" in said
    done = summary(tmp_path / "rehearsal")
    assert done["steps"] == 2 and done["base_unchanged"]
    assert done["recipe"]["train"]["effective_batch_size"] == 32 and done["recipe"]["lora"]["r"] == 64
    assert list(logged(tmp_path / "rehearsal")) and (tmp_path / "fit.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "llama-30b").exists()
