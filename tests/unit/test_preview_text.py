"""What a preview shows: token texts that join to the whole, boundaries in plain text, sizes, and a plot."""

import io
import random
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from tiny import byte_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from qlora_neft.display.plots import plot_lengths
from qlora_neft.display.preview_text import TokenView, printable, render_example, render_summary, token_views

STORIES = Path(__file__).parents[3] / "shared" / "models" / "stories260K"
PIECES = [
    "a",
    "Hello",
    " there",
    "  ",
    "\n",
    "\t",
    "é",
    "e\u0301",
    "你好",
    "한",
    "🎉",
    "👩‍👩‍👧",
    "🇬🇧",
    "ก็",
    "\ufffd",
    "<s>",
    ".",
]
TEXTS = [
    "",
    " ",
    "a",
    " a",
    "  two  spaces ",
    "你好",
    "👩‍👩‍👧 e\u0301",
    "\ufffd\ufffda\ufffd",
    "line\n\n### Response:\n",
]


def texts(count=60):
    draw = random.Random(3)
    return TEXTS + ["".join(draw.choices(PIECES, k=draw.randint(1, 25))) for _ in range(count)]


def trained_unigram():
    """Sentencepiece with a space put in front and taken away again, as in T5."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.UnigramTrainer(vocab_size=80, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(["Hello there, Hello again", "there is a line", "你好 🎉 é"] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def merged_bytes():
    """As GPT-2 and what came after: a token may end in one character and begin the next."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(use_regex=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts(300), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def llama_like():
    """Sentencepiece with bytes for what is not in the vocabulary, as in Llama 2."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"Helothra", "é"]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module", params=["bytes", "merged bytes", "unigram", "llama", "stories260K"])
def tokenizer(request):
    if request.param == "stories260K":
        if not STORIES.is_dir():
            pytest.skip(f"{STORIES} is not on this machine")
        return PreTrainedTokenizerFast.from_pretrained(STORIES)
    makers = {"bytes": byte_tokenizer, "merged bytes": merged_bytes, "unigram": trained_unigram, "llama": llama_like}
    return makers[request.param]()


def decoded(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def check_views(tokenizer, ids, labels):
    views = token_views(tokenizer, ids, labels)
    assert "".join(view.text for view in views) == decoded(tokenizer, ids)
    assert [token for view in views for token in view.ids] == list(ids)
    trained = [view.trained for view in views for _ in view.ids]  # so no group mixes the two
    assert trained == [label != -100 for label in labels]
    assert max((len(view.ids) for view in views), default=0) <= 8
    return views


def test_token_texts_join_to_the_text(tokenizer):
    for text in texts():
        ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        for sequence in (ids, ids[1:-1]):
            views = check_views(tokenizer, sequence, [-100] * len(sequence))
            for view in views:
                assert len(view.ids) == 1 or len(view.text) == 1, view  # several tokens: one character


def test_token_texts_join_wherever_training_begins(tokenizer):
    draw = random.Random(4)
    for text in texts(20):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        cut = draw.randint(0, len(ids))
        check_views(tokenizer, ids, [-100] * cut + ids[cut:])
        check_views(tokenizer, ids, [draw.choice([-100, token]) for token in ids])


def test_token_texts_join_for_nonsense(tokenizer):
    draw = random.Random(5)
    for length in (1, 2, 5, 40, 200):
        ids = [draw.randrange(len(tokenizer)) for _ in range(length)]
        check_views(tokenizer, ids, [draw.choice([-100, 1]) for _ in ids])


def test_a_decoder_that_cannot_be_followed_still_gives_its_whole_text():
    class Backwards:
        all_special_ids = ()

        def decode(self, ids, **kwargs):
            return "".join(map(chr, reversed(ids)))

    ids = [*b"spelt backwards"]
    views = token_views(Backwards(), ids, [-100] * 5 + ids[5:])
    assert "".join(view.text for view in views) == "sdrawkcab tleps"
    assert [token for view in views for token in view.ids] == ids


def test_bytes_cut_off_within_a_character_stay_apart():
    tokenizer = llama_like()  # it decodes the whole run of bytes to U+FFFD if its last character is cut
    ids = tokenizer("a" + "你好吗" * 9, add_special_tokens=False)["input_ids"][:-1]
    views = check_views(tokenizer, ids, ids)
    assert {len(view.ids) for view in views} <= {1, 2, 3} and {view.text for view in views[2:]} <= {
        "\ufffd" * n for n in (1, 2, 3)
    }


def test_a_token_is_a_view_unless_a_character_takes_several():
    tokenizer = byte_tokenizer()
    views = check_views(tokenizer, ids := tokenizer("aé🎉\ufffdb")["input_ids"], ids)
    assert [(view.text, len(view.ids)) for view in views] == [("a", 1), ("é", 2), ("🎉", 4), ("\ufffd", 3), ("b", 1)]


def test_a_leading_space_belongs_to_its_token():
    views = token_views(
        tokenizer := llama_like(), ids := tokenizer("a the he", add_special_tokens=False).input_ids, ids
    )
    assert "|".join(view.text for view in views) == "|a| |t|h|e| |h|e"


def test_half_a_character_at_the_boundary_goes_to_the_trained_side():
    tokenizer = byte_tokenizer()
    ids = tokenizer("a你")["input_ids"]
    views = check_views(tokenizer, ids, [-100, -100, *ids[2:]])
    assert [(view.text, view.trained) for view in views] == [("a", False), ("", False), ("你", True)]


def test_special_tokens_are_flagged_and_stand_alone(tokenizer):
    ids = [tokenizer.bos_token_id, tokenizer.bos_token_id, *tokenizer("a")["input_ids"], tokenizer.eos_token_id]
    views = token_views(tokenizer, ids, ids)
    assert [view.special for view in views] == [token in tokenizer.all_special_ids for token in ids]
    assert views[-1].text == tokenizer.eos_token


def test_chat_markers_count_as_special():
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<|turn|>"], special_tokens=True)
    views = token_views(tokenizer, ids := tokenizer("<|turn|>a")["input_ids"], ids)
    assert [(view.text, view.special) for view in views] == [("<|turn|>", True), ("a", False)]


def test_every_id_needs_a_label():
    with pytest.raises(ValueError):
        token_views(byte_tokenizer(), [1, 2], [1])


def view(text, trained=False, special=False):
    return TokenView(text, (0,), trained, special)


def shown(render, *args, terminal=False, width=80, **kwargs):
    out = io.StringIO()
    color = {"color_system": "truecolor"} if terminal else {}
    console = Console(
        file=out, width=width, soft_wrap=True, highlight=False, force_terminal=terminal, _environ={}, **color
    )
    render(console, *args, **kwargs)
    return out.getvalue()


def test_each_trained_stretch_stands_in_brackets():
    views = [
        view("<s>", special=True),
        view("Q"),
        view(" A", True),
        view("</s>", True, True),
        view("Q"),
        view("B", True),
    ]
    assert shown(render_example, "row 1", views) == "row 1\n<s>Q⟦ A</s>⟧Q⟦B⟧\n"
    assert shown(render_example, "row 1", views, show_tokens=True) == "row 1\n<s>│Q⟦ A│</s>⟧Q⟦B⟧\n"


def test_whitespace_is_seen():
    assert shown(render_example, "t", [view("a\n\tb\n")]) == "t\na⏎\n⇥b⏎\n\n"


def test_long_lines_are_left_to_the_terminal():
    assert "x" * 300 in shown(render_example, "t", [view("x")] * 300, width=60)


def test_a_pipe_gets_no_escape_sequences_and_a_terminal_gets_only_ours():
    views = [view("\x1b[31m", True), view("\x07\x9b2J\r", True), view("[red]x[/red]:smile:"), view("\u202eabc\ud800")]
    plain = shown(render_example, "[bold]t\x1b", views)
    assert plain == "[bold]t\\x1b\n⟦\\x1b[31m\\x07\\x9b2J\\x0d⟧[red]x[/red]:smile:\\u202eabc\\ud800\n"
    colored = shown(render_example, "t", views, terminal=True)
    assert "\x1b[" in colored and "\x1b[31m" not in colored and "\x07" not in colored and "\x9b" not in colored


def test_neighbouring_tokens_differ_in_shade():
    colored = shown(render_example, "t", [view("aa"), view("bb"), view("cc")], terminal=True)
    assert "\x1b[2maa" in colored and "\x1b[2;4mbb" in colored and "\x1b[2mcc" in colored


def test_nothing_to_show_is_said():
    assert shown(render_example, "t", []) == "t\n(no tokens)\n"


def test_emoji_are_left_whole():
    assert printable("👩‍👩‍👧 e\u0301") == "👩‍👩‍👧 e\u0301"
    assert printable("\U000e0041\u200b") == "\\U000e0041\\u200b"


def part(rows=990, edges=(0, 32, 64, 96), counts=(10, 900, 80), **changes):
    named = ("min", "p5", "p25", "p50", "p75", "p95", "p99", "max", "mean")
    lengths = dict(zip(named, (20, 30, 60, 90, 120, 300, 480, edges[-1], 91.04) if rows else (None,) * 9, strict=True))
    sizes = {"rows": rows, "source_rows": rows, "tokens": rows * 91, "trained_tokens": rows * 40, "truncated": 3}
    shares = {"share_trained": 0.444 if rows else None, "truncated_fraction": 0.003 if rows else None}
    histogram = {"edges": list(edges) if rows else [], "counts": list(counts) if rows else []}
    padding = {"random_batches": 0.41, "as_run": 0.05} if rows else {"random_batches": None, "as_run": None}
    more = {"dropped": 1, "duplicates": 9, "lengths": lengths, "histogram": histogram, "padding_waste": padding}
    return {**sizes, **shares, **more, **changes}


def report(train=None, held_out=None, **changes):
    settings = {"max_length": 1512, "train_on_prompt": False, "keep_end_token": True}
    return {"train": train or part(), "eval": held_out, "settings": settings, "warnings": [], "problems": []} | changes


def test_the_summary_without_held_out_rows():
    text = shown(render_summary, report())
    assert "990 rows of at most 1,512 tokens" in text and "held out" not in text
    for cell in ("90,090", "39,600 (44.4%)", "3 (0.3%)", "96", "91.0", "5.0%", "41.0%"):
        assert f" {cell} " in text, cell


def test_the_summary_with_held_out_rows_in_a_narrow_terminal():
    for width in (60, 80):
        text = shown(render_summary, report(held_out=part(1, (5, 6), (1,))), width=width)
        assert "train" in text and "held out" in text and "…" not in text
        assert max(map(len, text.splitlines())) <= width


def test_padding_may_be_unknown():
    train = part()
    del train["padding_waste"]
    assert "padding" not in shown(render_summary, report(train))
    assert "padding, as run" in shown(render_summary, report(held_out=train))


def test_the_summary_of_nothing():
    text = shown(render_summary, report(part(0, truncated=0)))
    assert "0 rows" in text and "None" not in text and "no rows, so no lengths to show" in text


def test_bars_are_in_proportion_and_none_vanishes():
    lines = shown(render_summary, report(part(counts=(1, 10_000, 5_000)))).splitlines()[-3:]
    assert [line.strip().split("  ")[0] for line in lines] == ["0 to 31", "32 to 63", "64 to 96"]
    small, large, half = (line.split()[-1] for line in lines)
    assert small == "▏" and set(large) == {"█"} and len(large) - 1 <= 2 * len(half) <= len(large) + 2


def test_the_last_bar_ends_at_the_longest_row():
    train = part(edges=(480, 512, 544), counts=(5, 1))
    train["lengths"]["max"] = 512
    lines = shown(render_summary, report(train)).splitlines()
    assert [line.strip().split("  ")[0] for line in lines[-2:]] == ["480 to 511", "512"]


def test_at_most_twelve_bars_and_no_empty_ends():
    counts = (0, 0, *([2] * 21), 0)
    train = part(edges=range(0, 250, 10), counts=counts)
    train["lengths"]["max"] = 229
    lines = shown(render_summary, report(train)).splitlines()
    assert lines[-12].startswith("lengths") and "█" in lines[-1]
    assert lines[-11].startswith("  20 to 39  4") and lines[-1].startswith("220 to 229  2")
    train = part(1, (89.5, 90.5), (1,))
    train["lengths"]["max"] = 90
    lines = shown(render_summary, report(train)).splitlines()
    assert lines[-2] == "lengths in tokens (1 row)" and lines[-1].startswith("90  1")


def test_warnings_and_problems_have_a_line_each():
    changes = {"warnings": ["[red]\x1b[2J", "two\nlines"], "problems": ["bad"]}
    lines = shown(render_summary, report(**changes)).splitlines()
    assert lines[-3:] == ["warning: [red]\\x1b[2J", "warning: two lines", "problem: bad"]


SHAPES = {
    "both": report(held_out=part(50, (0, 50, 100), (20, 30))),
    "one row, no maximum": report(part(1, (77, 78), (1,)), settings={"max_length": None}),
    "no rows": report(part(0)),
    "only held out": report(part(0), held_out=part(5, (3, 9), (5,))),
    "bins without width": report(part(2, (5, 5), (2,))),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_lengths_are_drawn(shape, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib (extra plots) is not installed")
    assert plot_lengths(SHAPES[shape], tmp_path / "lengths.png", "a $title$ with $dollars")
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")


def test_no_plot_without_matplotlib(tmp_path, monkeypatch):
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    assert plot_lengths(report(), tmp_path / "lengths.png", "t") is False
    assert not list(tmp_path.iterdir())


def test_no_torch_is_loaded():
    code = "import sys, qlora_neft.display.preview_text, qlora_neft.display.plots; print('torch' in sys.modules)"
    root = Path(__file__).resolve().parents[2]
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert result.stdout == "False\n"
