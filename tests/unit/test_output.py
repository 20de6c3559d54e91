"""Output whose reader goes away: verbs that print end as other programs do, those that work go on."""

import contextlib
import errno
import io
import os
import sys

import pytest
from rich.console import Console

from qlora_neft.cli import main
from qlora_neft.output import ending_with_its_reader, outliving_its_reader


class Broken(io.StringIO):
    """A stream that takes so many characters and then fails."""

    def __init__(self, error, room=0):
        super().__init__()
        self.error, self.room = error, room

    def write(self, text):
        if self.tell() + len(text) > self.room:
            raise OSError(self.error, os.strerror(self.error))
        return super().write(text)


@pytest.mark.parametrize("error", [errno.EPIPE, errno.EIO, errno.ENOSPC])
def test_what_cannot_be_printed_is_dropped_and_noted_once(error):
    stdout, stderr, notes = Broken(error, room=6), Broken(error), []
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        with outliving_its_reader(notes.append):
            console = Console()
            console.print("first")
            for _ in range(3):
                print("lost")
                console.print("lost", end="")
                print("lost", file=sys.stderr, flush=True)
        assert (sys.stdout, sys.stderr) == (stdout, stderr)
    assert stdout.getvalue() == "first\n"
    assert notes == [
        f"standard output cannot be written to any more ({os.strerror(error)}); what is printed from here on is dropped"
    ]


def test_a_block_that_lasts_inside_one_that_ends_is_not_ended():
    notes = []
    with contextlib.redirect_stdout(Broken(errno.EPIPE)), ending_with_its_reader(), outliving_its_reader(notes.append):
        print("lost")
    assert len(notes) == 1


def test_a_line_printed_by_a_signals_handler_inside_another_is_dropped():
    class Reentered(io.StringIO):
        def write(self, text):
            raise RuntimeError("reentrant call inside <_io.BufferedWriter name='<stdout>'>")

    with contextlib.redirect_stdout(Reentered()), outliving_its_reader(pytest.fail):
        print("lost")


@contextlib.contextmanager
def pipe_without_reader():
    reading, writing = os.pipe()
    os.close(reading)
    with contextlib.suppress(OSError), os.fdopen(writing, "w") as pipe:  # what is buffered cannot be written
        yield pipe


VERBS = (
    ["ls"],
    ["ls", "--json"],
    ["show", "demo"],
    ["show", "--keys"],
    ["diff", "demo", "llama2-7b-alpaca"],
    ["validate", "demo"],
    ["fit", "demo"],
    ["doctor"],
    ["--version"],
    ["--help"],
    ["show", "nothing-of-that-name"],
)


@pytest.mark.parametrize("words", VERBS, ids=" ".join)
def test_every_verb_survives_a_reader_that_is_gone(words, monkeypatch):
    with pipe_without_reader() as stdout, pipe_without_reader() as stderr:
        monkeypatch.setattr("sys.stdout", stdout)
        monkeypatch.setattr("sys.stderr", stderr)
        with pytest.raises(SystemExit) as ended:
            main(words)
        monkeypatch.undo()
    assert ended.value.code == (2 if "nothing" in words[-1] else 141)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_an_output_on_a_full_disk_is_told(monkeypatch, capsys):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr("sys.stdout", full)
        with pytest.raises(SystemExit) as ended:
            main(["show", "demo"])
        monkeypatch.undo()
    said = f"{ended.value.code}" + capsys.readouterr().err
    assert "failed: standard output cannot be written to (No space left on device)." in said
