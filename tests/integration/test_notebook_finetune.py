"""finetune.ipynb executed in a real kernel, offline, and what it left on disk."""

import json
import shutil
import signal

import pytest
from command_line import ROWS, adapter, logged, summary
from notebook_runner import execute, needs_notebooks, pictures_of, text_of

from qlora_neft import QLoRANeftTrainer, load_recipe, run
from qlora_neft.errors import RunInterrupted
from qlora_neft.run_folder.checkpoints import find_checkpoints

pytestmark = needs_notebooks
OWN_ROWS = (
    "data.path=mine.jsonl data.format=auto data.prompt_template=auto data.split=train "
    "data.eval_path=null data.eval_split=null data.eval_fraction=0.05"
)


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
    shutil.rmtree(
        "first"
    )  # as the disk of a session that is gone; a run that is still there keeps its mirror to itself

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
