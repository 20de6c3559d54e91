"""The command line's verbs from a notebook: output line by line as it comes, losses as they fall.

A verb that loads a model runs in a process of its own, which gives back all of a GPU's memory when it ends, and finds a
package that was installed a cell above. A verb that only reads runs in the kernel, which saves the seconds in which a
new process imports torch. (`!qlora-neft ...` would run anything, but "Run all" goes on after it fails.)
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import logging
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, TextIO

from .display.plots import plot_losses
from .errors import RunFailed, UserInputError
from .files import read_json
from .processes import ENDS_WITH_STDIN, python_command

SECONDS_BETWEEN_PICTURES = 2.0
WIDTH = "120"  # columns of the tables in a cell's output
READING = ("ls", "show", "diff", "cp", "validate", "fit", "check")  # verbs that load no torch
LOOKING = ("preview", "noise", "doctor", "export")  # verbs that load torch, but no model
ASKS_THE_GPU = ("preview", "doctor")  # which takes memory of the GPU until the process ends


def command(*arguments: object) -> None:
    """Run a verb of the command line, and show its output as it comes.

    ``command("fit", "demo", "lora.r=8")`` is ``qlora-neft fit demo lora.r=8``. Interrupting the cell is Ctrl-C:
    training writes a checkpoint first.

    Args:
        arguments: The words of the command; anything but text is converted by `str`.

    Raises:
        UserInputError: If the command ended with exit code 2; its message is in the output above.
        RunFailed: If it ended with another exit code; likewise.
        KeyboardInterrupt: If it was interrupted.
    """
    words = list(map(str, arguments))
    _show_command(words)
    if _runs_in_the_kernel(words):
        shown = _Pipe(sys.stdout)
        code = _run_in_the_kernel(words, shown, shown)
    else:
        code = _follow(words, lambda: None)
    _check(words, code)


def output_of(*arguments: object) -> str:
    """Return what a verb prints to standard output, for ``json.loads`` with ``"--json"``.

    Args:
        arguments: As for `command`.

    Raises:
        UserInputError: If the command ended with exit code 2; its message is shown.
        RunFailed: If it ended with another exit code; likewise.
    """
    words = list(map(str, arguments))
    if _runs_in_the_kernel(words):
        stdout, stderr = io.StringIO(), io.StringIO()
        code = _run_in_the_kernel(words, _Pipe(stdout), _Pipe(stderr))
        output, messages = stdout.getvalue(), stderr.getvalue()
    else:
        done = subprocess.run(
            _argv(words), capture_output=True, encoding="utf-8", errors="replace", env=_environment(), check=False
        )
        code, output, messages = done.returncode, done.stdout, done.stderr
    if code:
        sys.stdout.write(messages)
    _check(words, code)
    return output


def train_live(name: str | Path, *overrides: str, output_dir: str | Path) -> dict[str, Any]:
    """Train a recipe as ``qlora-neft train`` does, with a picture of the losses that is redrawn as they come.

    Called again after an interruption or a disconnect it continues, and the picture shows the run from its first step.

    Args:
        name: A recipe's name, or the path to a YAML file.
        overrides: ``section.key=value``.
        output_dir: A new or empty folder, or that of this recipe's run.

    Returns:
        The content of ``summary.json``.

    Raises:
        UserInputError: As `command`.
        RunFailed: As `command`; called again, it continues from the newest checkpoint.
        KeyboardInterrupt: If it was interrupted; likewise.
    """
    words = ["train", str(name), "--output-dir", str(output_dir), *overrides]
    _show_command(words)
    picture = _Picture(Path(output_dir))
    code = _follow(words, picture.refresh)
    # The last losses may have come less than SECONDS_BETWEEN_PICTURES after the last picture.
    picture.refresh(now=True)
    _check(words, code)
    return read_json(Path(output_dir, "summary.json"))


class _Picture:
    """The losses of a run in the output of a cell."""

    def __init__(self, output_dir: Path) -> None:
        from IPython.display import Markdown, display

        self.metrics, self.title, self.drawn = output_dir / "metrics.jsonl", str(output_dir), 0.0
        self.place = display(Markdown("*losses appear here*"), display_id=True)

    def refresh(self, now: bool = False) -> None:
        """Draw what is logged so far, unless it was drawn a moment ago."""
        entries = self._entries()
        if not entries or not (now or time.monotonic() - self.drawn > SECONDS_BETWEEN_PICTURES):
            return
        from IPython.display import Image

        # Not loss.png in the run's folder, which the training process writes itself.
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "loss.png")
            if plot_losses(entries, path, self.title) and self.place is not None:  # None: not in a notebook
                self.place.update(Image(data=path.read_bytes(), width=800))
        self.drawn = time.monotonic()

    def _entries(self) -> list[dict[str, Any]]:
        """Return the log entries with a step; the last line may still be being written."""
        if not self.metrics.exists():
            return []
        lines = self.metrics.read_text(encoding="utf-8").splitlines(keepends=True)
        return [entry for line in lines if line.endswith("\n") and "step" in (entry := json.loads(line))]


def _show_command(words: list[str]) -> None:
    print(f"$ qlora-neft {shlex.join(words)}", flush=True)


def _check(words: list[str], code: int) -> None:
    """Raise the error that an exit code stands for."""
    # A negative code is the signal that ended the process before it could end by itself.
    if code in (130, -signal.SIGINT):
        raise KeyboardInterrupt
    if code:
        kind = UserInputError if code == 2 else RunFailed
        raise kind(f"qlora-neft {words[0]} ended with exit code {code}; the output above says why")


# ---- In a process of its own ----


def _follow(words: list[str], after_each_line: Callable[[], None]) -> int:
    """Run a command to its end, show what it prints, and return its exit code."""
    # In a session of its own: interrupting a cell signals the kernel's whole process group, and this function passes
    # the signal on; two would mean "stop at once".
    with subprocess.Popen(
        _argv(words),
        stdin=subprocess.PIPE,  # held open for as long as the kernel lives: training ends, saved, if it is killed
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**_environment(), ENDS_WITH_STDIN: "1"},
        start_new_session=True,
    ) as process:
        assert process.stdout is not None  # it is a pipe
        # newline="" keeps the carriage returns with which progress bars overwrite themselves.
        output = io.TextIOWrapper(process.stdout, encoding="utf-8", errors="replace", newline="")
        # Followed to the end after Ctrl-C too: training then writes a checkpoint and says so.
        while True:
            try:
                for line in output:
                    sys.stdout.write(line)
                    sys.stdout.flush()
                    after_each_line()
                return process.wait()
            except KeyboardInterrupt:
                process.send_signal(signal.SIGINT)


def _argv(words: list[str]) -> list[str]:
    # Not the script `qlora-neft`: on PATH may be that of another environment, or none.
    return python_command("qlora_neft", *words)


def _environment() -> dict[str, str]:
    # COLUMNS before the user's own variables, which win. Unbuffered, so that each line arrives as it is printed.
    return {"COLUMNS": WIDTH, **os.environ, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}


# ---- In the kernel ----


class _Pipe(io.TextIOBase):
    """Output of a verb in the kernel: like the pipe of a process, it is not a terminal, and it is not buffered."""

    encoding = "utf-8"

    def __init__(self, target: TextIO) -> None:
        self.target = target

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.target.write(text)
        self.target.flush()
        return len(text)


def _runs_in_the_kernel(words: list[str]) -> bool:
    verb = words[0] if words else ""
    # Not by asking torch, which would start CUDA in the kernel: exactly what is to be avoided.
    if verb in ASKS_THE_GPU and (shutil.which("nvidia-smi") or Path("/proc/driver/nvidia").exists()):
        return False
    # A push takes minutes of network, and is interrupted like training; only the dry run stays here.
    return verb in READING or (verb in LOOKING and (verb != "export" or "--dry-run" in words))


def _run_in_the_kernel(words: list[str], stdout: _Pipe, stderr: _Pipe) -> int:
    """Run a command here, and return the exit code that its process would have had."""
    from .cli import main

    if words[0] in LOOKING:
        importlib.import_module("torch")  # first, so that its random stream and threads are among the state kept
    with _state_kept(stderr), contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        try:
            main(words)
        # sys.exit takes a code, None for 0, or a message, which means 1.
        except SystemExit as end:
            return end.code if isinstance(end.code, int) else int(end.code is not None)
        except Exception:  # noqa: BLE001  (a bug of ours: a process would have printed it and ended with 1)
            traceback.print_exc()
            return 1
    return 0


@contextlib.contextmanager
def _state_kept(stderr: _Pipe) -> Generator[None, None, None]:
    """Leave the kernel after a verb as it was: directory, environment, warnings, random streams, threads, logging."""
    variables, torch, numpy = dict(os.environ), sys.modules.get("torch"), sys.modules.get("numpy")
    python_state = random.getstate()
    numpy_state = None if numpy is None else numpy.random.get_state()
    # Streams of GPUs are left alone: no verb that runs here draws from them, and to ask for one starts CUDA.
    torch_state = None if torch is None else (torch.get_rng_state(), torch.get_num_threads())
    os.environ.setdefault("COLUMNS", WIDTH)
    try:
        with contextlib.chdir("."), warnings.catch_warnings(), _logged_to(stderr):  # "." is returned to
            yield
    finally:
        random.setstate(python_state)
        if numpy is not None:
            numpy.random.set_state(numpy_state)
        if torch is not None and torch_state is not None:
            torch.set_rng_state(torch_state[0])
            torch.set_num_threads(torch_state[1])
        for name in os.environ.keys() - variables.keys():
            del os.environ[name]
        os.environ.update(variables)


@contextlib.contextmanager
def _logged_to(stream: _Pipe) -> Generator[None, None, None]:
    """Send log lines for standard error to a stream, also those of libraries that are first imported in the block."""
    standard = sys.stderr
    for handler in _stream_handlers():
        if handler.stream is standard:
            handler.setStream(stream)
    try:
        yield
    finally:
        for handler in _stream_handlers():
            if handler.stream is stream:
                handler.setStream(standard)


def _stream_handlers() -> list[logging.StreamHandler]:
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    handlers = [handler for logger in loggers if isinstance(logger, logging.Logger) for handler in logger.handlers]
    # With a stream of its own; logging's _StderrHandler looks sys.stderr up for each line.
    return [handler for handler in handlers if isinstance(handler, logging.StreamHandler) and "stream" in vars(handler)]
