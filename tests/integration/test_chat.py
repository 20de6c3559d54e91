"""chat: what the model sees of a conversation, commands, files, Ctrl-C."""

import contextlib
import io
import json
import signal
import subprocess
import sys
from contextlib import contextmanager

import pytest
from command_line import invoke, refused
from forked import environment, quick_python
from rich.console import Console
from talker import CONTEXT, save_talker

from qlora_neft.adapter.load import load_trained
from qlora_neft.errors import RunInterrupted, UserInputError
from qlora_neft.generation.chat import Chat, Conversation
from qlora_neft.generation.decode import Decoding
from qlora_neft.generation.screen import Screen

VICUNA = ("--prompt-template", "vicuna", "--max-new-tokens", "8")


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return str(save_talker(tmp_path_factory.mktemp("talker")))


@pytest.fixture(scope="module")
def vicuna(out):
    return load_trained(out, device="cpu", precision="fp32", prompt_template="vicuna")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def typed(monkeypatch):
    """Chat by a pipe: lines in, standard output out."""

    def run(out, *lines, options=VICUNA):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
        code, stdout, stderr = invoke("chat", out, *options)
        assert code == 0, stderr
        return stdout

    return run


def wide_console(file, width=120):
    return Console(file=file, force_terminal=True, width=width, highlight=False, color_system=None)


@contextmanager
def prompts_seen(trained):
    """Texts of the prompts that go through the model."""
    seen = []
    embedding = trained.model.get_input_embeddings()
    hook = embedding.register_forward_pre_hook(
        lambda module, args: (
            seen.append(trained.tokenizer.decode(args[0][0]).removeprefix("<s>")) if args[0].shape[1] > 1 else None
        )
    )
    try:
        yield seen
    finally:
        hook.remove()


def chat_with(trained, monkeypatch, *lines, screen=None, decoding=None, **options):
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
    chat = Chat(trained, decoding or Decoding(8), screen or Screen(Console(file=io.StringIO())), **options)
    with prompts_seen(trained) as seen:
        chat.run()
    return chat, seen


def test_the_model_sees_what_was_said_until_it_is_reset(vicuna, monkeypatch):
    chat, seen = chat_with(vicuna, monkeypatch, "One", "Two", "/reset", "", "Three", "/quit", "Four")
    [(_, answer)] = chat.conversations["adapter"].exchanges  # of Three
    assert answer and len(seen) == 3
    assert seen[0].endswith("USER: One ASSISTANT:")
    assert seen[1].startswith(seen[0] + " ") and seen[1].endswith("</s>USER: Two ASSISTANT:")
    assert seen[2] == seen[0].replace("One", "Three")


def test_a_system_message_is_set_kept_by_a_reset_and_removed(vicuna, monkeypatch):
    lines = ("One", "/system Be  brief.", "Two", "/reset", "Three", "/system", "Four")
    _, seen = chat_with(vicuna, monkeypatch, *lines, system="Be kind.")
    assert [text.startswith("Be kind. USER: One") for text in seen] == [True, False, False, False]
    assert seen[1].startswith("Be  brief. USER: One") and seen[2] == "Be  brief. USER: Three ASSISTANT:"
    assert seen[3].startswith("A chat between")


def test_the_oldest_exchanges_are_forgotten_when_the_context_is_full_and_it_is_said(vicuna, monkeypatch):
    screen = Screen(Console(file=io.StringIO(), width=200))
    _, seen = chat_with(
        vicuna,
        monkeypatch,
        *[f"Number {n} " + "the horse lives in a stable " * 12 for n in range(6)],
        screen=screen,
        system="S.",
    )
    assert max(len(vicuna.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in seen) <= CONTEXT - 8
    first, last = seen[2], seen[-1]
    assert "Number 0" in first and "Number 0" not in last and "Number 4" in last and last.startswith("S. USER: ")
    assert "oldest exchange forgotten: the model's context is full" in screen.console.file.getvalue()


def test_a_request_that_fills_the_context_is_answered_by_a_note_and_not_remembered(vicuna, monkeypatch):
    screen = Screen(Console(file=io.StringIO(), width=200))
    chat, seen = chat_with(vicuna, monkeypatch, "One", "long " * 600, "Two", screen=screen, system="S.")
    assert "(no answer: the request fills the model's context. Shorten it)" in screen.console.file.getvalue()
    assert [request for request, _ in chat.conversations["adapter"].exchanges] in (["One", "Two"], ["Two"])
    assert len(seen) == 2


def test_a_transcript_of_a_pipe_is_complete(out, typed):
    stdout = typed(out, "Hi \\", "there", "/help", "/nothing", " /slash", "/quit", "not read")
    assert "> Hi \\" in stdout and "> there" in stdout and "> /help" in stdout and "> not read" not in stdout
    assert "/reset        forget what was said" in stdout
    assert "there is no command /nothing" in stdout and "no command /slash" not in stdout
    assert "prompt template vicuna" in stdout.splitlines()[0] and "stands alone" not in stdout


def test_a_template_of_one_request_says_so_once_and_forgets(out, typed, folder):
    stdout = typed(out, "Repeat 1", "Repeat 2", "Repeat 1", "/save talk.jsonl", "/system x", options=VICUNA[2:])
    assert stdout.count("each stands alone") == 1
    assert "alpaca has no place for a system message" in stdout
    rows = [json.loads(line)["messages"] for line in (folder / "talk.jsonl").read_text().splitlines()]
    assert [row[0]["content"] for row in rows] == ["Repeat 1", "Repeat 2", "Repeat 1"]
    assert rows[0] == rows[2] and [message["role"] for message in rows[0]] == ["user", "assistant"]
    assert f"> Repeat 1\n{rows[0][1]['content']}\n" in stdout


def test_save_writes_what_was_said_and_never_over_another_file(out, typed, folder):
    (folder / "old.jsonl").write_text("precious")
    lines = (
        "/save a.jsonl",
        "One",
        "/save",
        "/save old.jsonl",
        "/save none/a",
        "/save a.jsonl",
        "Two",
        "/save a.jsonl",
    )
    stdout = typed(out, *lines, options=(*VICUNA, "--system", "Be kind."))
    assert (folder / "old.jsonl").read_text() == "precious" and "'old.jsonl' exists" in stdout
    for said in ("nothing was said yet", "needs a file", "'none/a' cannot be written", "(saved: a.jsonl)"):
        assert said in stdout
    messages = json.loads((folder / "a.jsonl").read_text())["messages"]
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert [m["content"] for m in messages[:4:3]] == ["Be kind.", "Two"]
    assert sorted(path.name for path in folder.iterdir()) == ["a.jsonl", "old.jsonl"]


def test_a_saved_conversation_is_data_to_train_on(out, typed, folder):
    typed(out, "One", "Two", "/save a.jsonl")
    code, stdout, _ = invoke("preview", "demo", "data.path=a.jsonl", "data.format=auto", "data.prompt_template=vicuna")
    assert "USER: Two ASSISTANT:" in stdout, (code, stdout)


def test_compare_shows_both_each_with_its_own_history(vicuna, monkeypatch, folder):
    for width, form in ((120, "columns"), (60, "below")):
        screen = Screen(wide_console(io.StringIO(), width))
        chat, seen = chat_with(vicuna, monkeypatch, "One", "Two", f"/save {form}.jsonl", screen=screen, compare=True)
        base, adapter = (chat.conversations[name].exchanges for name in ("base", "adapter"))
        assert base[0][1] != adapter[0][1] and base[0][0] == adapter[0][0] == "One"
        assert seen[0] == seen[1]
        assert base[0][1] in seen[2] and adapter[0][1] in seen[3]
        text = screen.console.file.getvalue()
        is_beside = any("base" in line and "adapter" in line for line in text.splitlines()[1:4])
        assert is_beside == (form == "columns") and ("adapter:\n" in text) == (form == "below")
        saved = [
            json.loads((folder / name).read_text())["messages"] for name in (f"{form}.jsonl", f"{form}-base.jsonl")
        ]
        assert [messages[1]["content"] for messages in saved] == [adapter[0][1], base[0][1]]


def test_base_alone_is_the_base(vicuna, monkeypatch):
    both, _ = chat_with(vicuna, monkeypatch, "One", compare=True)
    alone, _ = chat_with(vicuna, monkeypatch, "One", base_alone=True)
    assert alone.conversations["base"].exchanges == both.conversations["base"].exchanges


def test_a_repeated_question_is_sampled_again_and_a_chat_repeats_with_its_seed(vicuna, monkeypatch):
    def answers(seed):
        drawing = Decoding(8, do_sample=True, temperature=3.0, seed=seed)
        chat, _ = chat_with(vicuna, monkeypatch, "One", "/save", "One", "One", decoding=drawing)
        return [answer for _, answer in chat.conversations["adapter"].exchanges]

    assert answers(1) == answers(1) != answers(2)
    assert len(set(answers(1))) == 3


def test_a_terminal_is_shown_what_steers_it_and_does_not_obey():
    screen = Screen(wide_console(io.StringIO()))
    screen.write("a\x1b[2Jb\nc [red]d[/red]\t|")
    assert screen.console.file.getvalue() == "a\\x1b[2Jb\nc [red]d[/red]    |"
    piped = Screen(Console(file=io.StringIO()))
    piped.write("a\tb")
    assert piped.console.file.getvalue() == "a\tb"


# ---- Signals ----


class SignalsAfter(Screen):
    """Sends signals to this process after some pieces of the first answer."""

    def __init__(self, count, *signals):
        super().__init__(Console(file=io.StringIO(), width=200))
        self.count, self.signals = count, signals

    def write(self, text):
        super().write(text)
        self.count -= 1
        for number in self.signals * (self.count == 0):
            signal.raise_signal(number)


def test_ctrl_c_stops_the_answer_and_the_chat_goes_on(vicuna, monkeypatch):
    whole, _ = chat_with(vicuna, monkeypatch, "One", decoding=Decoding(60))
    [(_, full)] = whole.conversations["adapter"].exchanges
    screen = SignalsAfter(2, signal.SIGINT)
    before = signal.getsignal(signal.SIGINT)
    chat, seen = chat_with(vicuna, monkeypatch, "One", "Two", screen=screen, decoding=Decoding(60))
    assert signal.getsignal(signal.SIGINT) is before
    (_, cut), (_, second) = chat.conversations["adapter"].exchanges
    assert full.startswith(cut) and 0 < len(cut) < len(full) and second
    assert "(stopped)" in screen.console.file.getvalue() and f"{cut}</s>USER: Two" in seen[1]


def test_a_second_ctrl_c_and_sigterm_end_the_program(vicuna, monkeypatch):
    twice = SignalsAfter(2, signal.SIGINT, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        chat_with(vicuna, monkeypatch, "One", screen=twice, decoding=Decoding(60))
    with pytest.raises(RunInterrupted, match="SIGTERM"):
        chat_with(vicuna, monkeypatch, "One", screen=SignalsAfter(2, signal.SIGTERM), decoding=Decoding(60))
    assert not vicuna.model.training


def test_a_process_stops_its_answer_on_ctrl_c_and_ends_on_the_next_with_130(out, folder):
    command = [quick_python(), "-m", "qlora_neft", "chat", out, "--prompt-template", "none"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment(), **pipes) as chat:
        chat.stdin.write("Once upon a time\n")
        chat.stdin.flush()
        assert next(line for line in chat.stdout if line.startswith("> ")) == "> Once upon a time\n"
        assert chat.stdout.read(1)
        chat.send_signal(signal.SIGINT)
        assert "(stopped)\n" in iter(chat.stdout.readline, "")
        assert _interrupted(chat) in (130, -signal.SIGINT)  # the latter where another signal met Python's own end
        assert "interrupted" in chat.stderr.read().splitlines()


def _interrupted(chat):
    """The exit code after a SIGINT; another one where Python had just begun to read, and did not see the first."""
    for _ in range(6):
        chat.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            return chat.wait(10)
    raise AssertionError("still running")


# ---- Bad input ----


def test_a_system_message_that_would_not_be_seen_is_refused(out, folder, vicuna):
    assert (
        refused("chat", out, "--system", "x")
        == "--system: the prompt template alpaca has no place for a system message."
    )
    (folder / "deaf.jinja").write_text(
        "{% for m in messages if m['role'] != 'system' %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    assert "leaves the system message out" in refused("chat", out, "--system", "x", "--prompt-template", "deaf.jinja")
    with pytest.raises(UserInputError, match="blank"):
        Conversation(vicuna.prompts, 100, " ")
