"""thirty_billion.ipynb executed in a real kernel, offline, and what it left on disk."""

from command_line import logged, summary
from notebook_runner import execute, needs_notebooks, text_of

pytestmark = needs_notebooks


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
