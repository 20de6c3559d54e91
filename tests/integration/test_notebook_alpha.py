"""noise_and_alpha.ipynb executed in a real kernel, offline, and what it left on disk."""

import json

from command_line import adapter, summary
from notebook_runner import SMALL, execute, needs_notebooks, pictures_of, text_of

pytestmark = needs_notebooks


def test_noise_and_alpha_sweeps_and_measures(tmp_path):
    form = {"ALPHAS": "0,15", "SEEDS": 1, "MAX_STEPS": 2, "ROWS": 2, "MEASURES": "rows"}
    notebook = execute("noise_and_alpha.ipynb", tmp_path, MORE=SMALL, **form)
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
