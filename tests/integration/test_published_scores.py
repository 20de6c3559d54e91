"""Published AlpacaEval outputs and annotations, scored by our code, give the published leaderboard."""

import importlib.util
import json
from pathlib import Path

import pytest
from command_line import invoke

ROOT = Path(__file__).parents[2]
PUBLISHED = ROOT.parent / "shared" / "data" / "alpaca_eval"
PAGE = ROOT / "docs" / "results" / "published_scores.md"
NEEDED = ("alpaca_eval_gpt4_leaderboard.csv", "alpaca-7b", "alpaca-7b-neft", "text_davinci_003")

pytestmark = pytest.mark.skipif(
    not all((PUBLISHED / name).exists() for name in NEEDED),
    reason="needs the published AlpacaEval files in ../shared/data/alpaca_eval",
)


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("published_scores", ROOT / "benchmarks" / "published_scores.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("model", ["alpaca-7b", "alpaca-7b-neft"])
def test_the_command_gives_the_leaderboards_figures(benchmark, model):
    board = benchmark.published(PUBLISHED)[model]
    files = ("score", str(PUBLISHED / model / "annotations.json"))
    files += ("--outputs", str(PUBLISHED / model / "model_outputs.json"))
    code, stdout, _ = invoke("eval", "alpaca", *files, "--json")
    found = json.loads(stdout)
    assert code == 0 and found["not_annotated"] == 0
    for name, key in benchmark.COUNTS.items():
        assert found[key] == int(board[name]), name
    for name, key in benchmark.RATES.items():
        assert benchmark.steps_apart(board[name], found[key]) <= 1, name
    assert found["n"] + found["excluded"] == 805


def test_the_reference_has_the_leaderboards_length(benchmark):
    rows = benchmark.scores_table(PUBLISHED).rows
    assert rows[-1][:4] == ["text_davinci_003", "avg_length", "307", "307"]


def test_the_committed_page_is_what_the_files_give(benchmark):
    page = PAGE.read_text(encoding="utf-8")
    for table in (benchmark.scores_table, benchmark.texts_table, benchmark.scale_table):
        assert table(PUBLISHED).markdown(aligned=True) in page, (
            f"run benchmarks/published_scores.py again: {table.__name__}"
        )


def test_the_papers_finding_shows_in_the_published_outputs():
    files = [str(PUBLISHED / model / "model_outputs.json") for model in ("alpaca-7b", "alpaca-7b-neft")]
    code, stdout, _ = invoke("eval", "text", *files, "--cutoff", "alpaca", "--json")
    without, with_noise = json.loads(stdout).values()
    assert code == 0 and with_noise["characters"] > 2.5 * without["characters"]
    # NEFTune, Tables 4 and 5: 1058.46 characters (LLaMA-1), 169.36 words and log-diversity 16.41 (LLaMA-2).
    assert with_noise["characters"] == pytest.approx(1058.46, rel=0.01)
    assert with_noise["whitespace_tokens"] == pytest.approx(169.36, rel=0.01)
    assert with_noise["log_diversity"] == pytest.approx(16.41, abs=0.1)
    assert 2 * with_noise["dropped"] < with_noise["outputs"]  # the paper's rule for its cutoffs
