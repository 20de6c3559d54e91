"""The page that compares runs: what it shows, that it needs nothing from outside, and that nothing breaks out of it."""

import json
from html import escape
from html.parser import HTMLParser

import pytest
import yaml
from command_line import invoke

from qlora_neft.compare.arms import arms_by
from qlora_neft.compare.page import curve_of, style_of, thinned, ticks, write_report
from qlora_neft.compare.records import find_runs, read_run
from qlora_neft.display.tables import Table
from qlora_neft.errors import UserInputError

EVIL = '<script>alert("x")</script>'
RECIPE = {"model": {"name_or_path": "base"}, "data": {"path": "rows.jsonl"}, "train": {"seed": 0}}
VOID = {"meta", "line", "circle", "polyline", "br", "link"}


class Page(HTMLParser):
    """Collects elements and text; wrongly nested ones fail."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.attributes, self.words = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def make_run(folder, alpha=None, seed=0, loss=1.0, *, finished=True, base="base", answers=(), **learned):
    """A run's folder as `run` leaves it, written by hand."""
    folder.mkdir(parents=True)
    noise = {"noise_alpha": alpha, "distribution": "uniform", "schedule": "constant", "final_alpha": None}
    recipe = {
        "model": {"name_or_path": base},
        "neftune": None if alpha is None else noise,
        "data": {"path": "rows.jsonl"},
        "train": {"seed": seed, "learning_rate": 1e-3, **learned},
        "machine": {"threads": "auto"},
    }
    said = [{"prompt": "Say a|b", "reference": "wanted", "text": "before"}]
    about = {"recipe": recipe, "data_sha256": "d", "base_sha256": "b" * 64}
    about["before"] = {"clean_train_loss": 3.0, "answers": said}
    (folder / "run.json").write_text(json.dumps(about))
    lines = [{"step": 0, "clean_loss": 3.0}, *({"step": i, "loss": 3.0 - i / 10} for i in range(1, 6))]
    lines.append({"step": 5, "clean_loss": 0.5, "eval_loss": loss})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 6, "lo')
    if answers:
        stored = [{"prompt": "Say a|b", "reference": "wanted", "text": text} for text in answers]
        (folder / "answers.json").write_text(json.dumps({"answers": stored}))
    if finished:
        summary = {
            "steps": 5,
            "after": {"clean_train_loss": 0.5, "held_out_loss": loss},
            "train_seconds": 12.3,
            "peak_memory": {"host_bytes": 2**30},
            "data": {"train": {"rows": 10, "tokens": 100, "sha256": "f" * 64}, "eval": None, "warnings": [EVIL]},
            "hardware": {"name": "a card", "device": "cuda", "threads": 2, "platform": "here"},
            "versions": {"torch": "2.0"},
            "precision": "float32",
        }
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def report(tmp_path, *folders):
    html, markdown = write_report(folders, tmp_path / "report.html")
    return Page(html.read_text()), html.read_text(), markdown.read_text()


def test_arms_are_compared_and_settings_that_differ_shown(tmp_path):
    folders = [make_run(tmp_path / f"a{alpha}s{seed}", alpha, seed, 1.0 - alpha / 50 + seed / 10)
               for alpha in (0, 5) for seed in (0, 1, 2)]  # fmt: skip
    page, text, markdown = report(tmp_path, *folders)
    assert "held-out loss: measurable: noise_alpha 5 -0.100" in page.text
    assert "best by held-out loss: noise_alpha 5, measurably below every other" in page.text
    assert "Settings that differ run neftune.noise_alpha train.seed a0s0 0 0" in page.text
    assert "neftune.distribution" not in page.text.split("Settings in common")[0]  # without noise there is none
    assert "| a5s2 | 2 | 5 | 0.500 | 1.100 | 12 | 1.00 |" in markdown
    assert text.count("<polyline") == 3 * 6 and text.count('class="swatch"') == 2


def test_the_page_needs_nothing_from_outside(tmp_path):
    page, text, _ = report(tmp_path, make_run(tmp_path / "one", 5.0))
    assert not {"script", "img", "link", "iframe", "object"} & set(page.tags)
    assert not {"src", "href", "onclick", "onload"} & {name for name, _ in page.attributes}
    assert "http" not in text and "@import" not in text and "url(" not in text
    assert "prefers-color-scheme: dark" in text and ("name", "viewport") in page.attributes
    assert text.count('class="scroll"') == text.count("<table")


def test_what_a_run_says_is_text(tmp_path):
    folder = make_run(tmp_path / "<b>&run", 5.0, base=EVIL, answers=(EVIL,))
    page, text, markdown = report(tmp_path, folder)
    assert EVIL not in text and page.text.count(EVIL) >= 3 and "b" not in page.tags
    assert "Say a|b" in page.text
    assert f"<pre>\n{escape(EVIL, quote=False)}\n</pre>" in markdown and "<script>" not in markdown


def test_answers_stand_side_by_side(tmp_path):
    one = make_run(tmp_path / "one", 0.0, answers=("first",))
    two = make_run(tmp_path / "two", 5.0, answers=("sec\x00ond\nline",))
    page, _, markdown = report(tmp_path, one, two)
    shown = page.text.split(" Answers ")[1]
    assert shown.startswith(
        "Prompt Say a|b Expected wanted base, before training before noise_alpha 0, after (seed 0) first"
    )
    assert "noise_alpha 5, after (seed 0) sec\ufffdond line" in shown
    assert "sec\ufffdond\nline" in markdown


def test_a_fence_in_an_answer_does_not_end_the_block(tmp_path):
    _, _, markdown = report(tmp_path, make_run(tmp_path / "one", 5.0, answers=("```\n# no heading",)))
    assert "<pre>\n```\n# no heading\n</pre>" in markdown


def test_a_run_under_way_is_shown_as_that(tmp_path):
    page, _, _ = report(tmp_path, make_run(tmp_path / "done"), make_run(tmp_path / "begun", 5.0, finished=False))
    assert "2 runs , not finished: begun" in page.text.replace("runs,", "runs ,")
    assert "begun 0 not finished" in page.text


def test_a_sweep_stands_for_its_runs_and_its_first_arm_is_the_baseline(tmp_path):
    sweep = tmp_path / "sweep"
    names = [f"rate{i}-seed{seed}" for i in (1, 2) for seed in (0, 1)]
    for name in names[:3]:
        make_run(sweep / name, 5.0, int(name[-1]), learning_rate=int(name[4]) / 1000)
    plan = {
        "recipe": "mine",
        "swept": {"train.learning_rate": ["0.001", "0.002"]},
        "runs": [{"name": n} for n in names],
    }
    (sweep / "sweep.json").write_text(json.dumps(plan))
    page, _, _ = report(tmp_path, sweep)
    assert [run.name for run in find_runs([sweep, sweep / names[0]])] == names[:3]  # the fourth has not begun
    assert "Paired differences to learning_rate 0.001, 95% intervals" in page.text
    assert "held-out loss learning_rate 0.002 +0.000" in page.text


def test_runs_of_one_name_are_told_apart(tmp_path):
    folders = [make_run(tmp_path / side / "out") for side in ("left", "right")]
    assert [run.name for run in find_runs(folders)] == ["left/out", "right/out"]


def test_old_runs_are_read_by_what_they_have(tmp_path):
    folder = make_run(tmp_path / "one", 5.0)
    recipe = json.loads((folder / "run.json").read_text())["recipe"]
    (folder / "run.json").unlink()
    (folder / "metrics.jsonl").unlink()
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    page, text, _ = report(tmp_path, folder)
    assert read_run(folder).seed == 0 and "Curves" not in page.text and "<polyline" not in text


@pytest.mark.parametrize("broken", ["run.json", "summary.json", "measures.json"])
def test_damaged_records_are_named(tmp_path, broken):
    folder = make_run(tmp_path / "one")
    (folder / broken).write_text("[1]" if broken == "measures.json" else "{")
    with pytest.raises(UserInputError, match=broken):
        find_runs([folder])


ANSWER = {"prompt": "p", "reference": "r", "text": "t"}


@pytest.mark.parametrize(
    ("name", "content", "place"),
    [
        ("run.json", {"recipe": {"train": {"seed": 0}}}, "model"),
        ("run.json", {"recipe": {**RECIPE, "lora": [1]}}, "lora"),
        ("run.json", {"recipe": RECIPE, "before": {"answers": [{}]}}, "before.answers.0.prompt"),
        ("summary.json", {"steps": 5, "hardware": {"name": "a card"}}, "hardware.device"),
        ("measures.json", {"text": "long"}, "text"),
        ("answers.json", {"answers": None}, "answers"),
        ("answers.json", {"answers": [{**ANSWER, "text": None}]}, "answers.0.text"),
        ("sweep.json", {"recipe": "mine", "swept": {}, "runs": [{}]}, "runs.0.name"),
    ],
)
def test_records_of_another_shape_are_named(tmp_path, monkeypatch, name, content, place):
    monkeypatch.chdir(tmp_path)
    (make_run(tmp_path / "one") / name).write_text(json.dumps(content))
    code, _, stderr = invoke("report", "one")
    assert code == 2 and f"is damaged at {place} (" in stderr and "one" in stderr, stderr


def test_measures_that_are_no_numbers_are_left_out(tmp_path):
    folder = make_run(tmp_path / "one", 5.0)
    (folder / "measures.json").write_text('{"text": {"a": NaN, "b": Infinity, "c": "x", "d": {"e": 1}, "f": 2}}')
    assert set(read_run(folder).values) == {"clean_train_loss", "held_out_loss", "text.f"}


def test_what_all_runs_share_is_said_once_also_beside_a_run_under_way(tmp_path):
    runs = (
        make_run(tmp_path / "one"),
        make_run(tmp_path / "two", 5.0),
        make_run(tmp_path / "begun", 9.0, finished=False),
    )
    _, _, markdown = report(tmp_path, *runs)
    assert markdown.count("10 rows, 100 tokens") == 1 and "| training data |" in markdown


def test_an_arm_without_noise_is_not_told_what_kind(tmp_path):
    runs = [make_run(tmp_path / f"a{alpha}", alpha) for alpha in (0, 5)]
    arms = arms_by([read_run(run) for run in runs], ["neftune.noise_alpha", "neftune.distribution"])
    assert [arm.label for arm in arms] == ["noise_alpha 0", "noise_alpha 5, distribution uniform"]


def test_what_holds_no_run_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for arguments, said in (
        (("none",), "no such folder"),
        (("empty",), "holds no run"),
        (("empty", "--output", "page.pdf"), "must end in .html"),
        (("empty", "--output", "far/page.html"), "there is no folder"),
    ):
        code, _, stderr = invoke("report", *arguments)
        assert code == 2 and said in stderr and stderr.startswith("error: ")
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_curves_are_thinned_by_means_and_ticks_are_round():
    points = [(float(x), float(x % 7)) for x in range(5000)]
    few = thinned(points)
    assert len(few) <= 300 and (few[0], few[-1]) == (points[0], points[-1])
    assert sum(y for _, y in few) / len(few) == pytest.approx(3.0, abs=0.1)
    assert ticks(0, 40) == [0, 10, 20, 30, 40] and ticks(5.24, 6.03) == pytest.approx([5.4, 5.6, 5.8, 6.0])
    assert len({style_of(i) for i in range(21)}) == 21


def test_what_is_no_number_is_no_point(tmp_path):
    folder = make_run(tmp_path / "one")
    with (folder / "metrics.jsonl").open("w") as file:
        file.write('{"step": 1, "loss": null}\n{"step": 2, "loss": NaN}\n{"step": 3, "loss": 1.5}\n')
        file.write('{"step": 4, "loss": "x"}\n{"step": 5, "loss": [2]}\n' + "[" * 100_000 + "\n\x00\n")
    assert curve_of(read_run(folder), "loss") == [(3.0, 1.5)]


def test_bars_and_line_ends_stay_in_their_cell():
    table = Table(("a", "b"), (("x|y", "1\n2"),))
    assert table.markdown().splitlines()[-1] == r"| x\|y | 1 2 |"
    picture = Table(("a",), (("![x](http://elsewhere/x.png)",), ("[1, 2]",))).markdown()
    assert "](" not in picture and "| [1, 2] |" in picture
