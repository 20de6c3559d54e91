"""The process that the tests' other processes are forked from: it has imported everything, so that they start at once.

python fork_server.py SOCKET OWNER_PID

A client (`fork_client.py`) sends the words behind ``python``, a folder, the environment and its three standard streams,
and is told the child's process id at once and its wait status at the end. The child is a process of its own in every
other respect: its own session, real signals, a real ``kill -9``. If the client goes away, its child is killed. The
server ends with its owner.

Nothing here may compute with torch: threads that OpenMP has started do not survive a fork, and the child would wait for
them forever.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import importlib
import io
import itertools
import json
import os
import pkgutil
import runpy
import selectors
import signal
import socket
import struct
import sys
import threading
import types
from contextlib import suppress
from pathlib import Path
from typing import Any

LENGTH, NUMBER = struct.Struct("!I"), struct.Struct("!i")
# What upstream loads only when it is first used; our own modules load the rest.
USED_LATER = (
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "peft.tuners.lora.bnb",
    "torch.optim.lr_scheduler",
    "transformers.models.llama.modeling_llama",
    "transformers.integrations.bitsandbytes",
)
SEARCHED = [path for path in sys.path[1:] if path not in os.environ.get("PYTHONPATH", "").split(os.pathsep)]


def import_everything() -> None:
    """Import this package and what it uses."""
    import qlora_neft

    for module in pkgutil.walk_packages(qlora_neft.__path__, "qlora_neft."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    for name in USED_LATER:
        importlib.import_module(name)


def serve(address: Path, owner: int) -> None:
    """Fork a child for each request until the owner has ended."""
    selector = selectors.DefaultSelector()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        draft = address.with_suffix(".draft")
        listener.bind(str(draft))
        listener.listen(64)
        draft.rename(address)  # who finds it can connect
        selector.register(listener, selectors.EVENT_READ)
        clients: dict[int, socket.socket] = {}  # by process id
        while os.path.exists(f"/proc/{owner}"):
            for key, _ in selector.select(timeout=1):
                if key.fileobj is listener:
                    _begin(listener.accept()[0], selector, clients)
                elif isinstance(key.fileobj, socket.socket):  # its client is gone: else it says nothing more
                    selector.unregister(key.fileobj)
                    _kill(key.data)
                else:
                    _end(key.fd, key.data, selector, clients.pop(key.data))
        for pid in clients:
            _kill(pid)


def _begin(client: socket.socket, selector: selectors.BaseSelector, clients: dict[int, socket.socket]) -> None:
    first, streams, *_ = socket.recv_fds(client, LENGTH.size, 3)
    with client.makefile("rb") as file:
        request = json.loads(file.read(LENGTH.unpack(first)[0]))
    pid = os.fork()
    if pid == 0:
        selector.close()
        for other in (client, *clients.values()):
            other.close()
        _become(request, streams)
    for stream in streams:
        os.close(stream)
    client.sendall(NUMBER.pack(pid))
    clients[pid] = client
    selector.register(client, selectors.EVENT_READ, pid)
    selector.register(os.pidfd_open(pid), selectors.EVENT_READ, pid)


def _end(descriptor: int, pid: int, selector: selectors.BaseSelector, client: socket.socket) -> None:
    _, status = os.waitpid(pid, 0)
    selector.unregister(descriptor)
    os.close(descriptor)
    if client in [key.fileobj for key in selector.get_map().values()]:
        selector.unregister(client)
    with suppress(OSError):  # it is gone
        client.sendall(NUMBER.pack(status))
    client.close()


def _kill(pid: int) -> None:
    """A child and what it has started, unless that has a session of its own."""
    for kill in (os.killpg, os.kill):  # a child that has just begun has no session yet
        with suppress(ProcessLookupError):
            kill(pid, signal.SIGKILL)


# ---- In the child ----


def _become(request: dict[str, Any], streams: list[int]) -> None:
    """Run what ``python`` would run, and end as it would."""
    os.setsid()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.executable = request["executable"]
    if sys.modules.get("datasets"):  # the one setting read on import that differs between the tests' processes
        importlib.import_module("datasets.config").HF_DATASETS_CACHE = os.environ["HF_DATASETS_CACHE"]
    atexit._clear()  # of the server
    code = 1
    try:
        words = request["arguments"]
        options = set(itertools.takewhile({"-u", "-P"}.__contains__, words))
        _set_streams("-u" in options or bool(os.environ.get("PYTHONUNBUFFERED")))
        _execute(words[len(options) :], safe_path="-P" in options)
        code = 0
    except SystemExit as end:
        code = _code_of(end)
    except BaseException as error:  # noqa: BLE001 (as Python ends with it)
        sys.excepthook(type(error), error, error.__traceback__)
        if isinstance(error, KeyboardInterrupt):
            code = -signal.SIGINT
    finally:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:
                code = code or 120  # as Python has it
        if code < 0:
            signal.signal(-code, signal.SIG_DFL)
            os.kill(os.getpid(), -code)
        os._exit(code)


def _set_streams(unbuffered: bool) -> None:
    """New ones: the server's remember that they may seek in its log."""
    encoding, _, errors = os.environ.get("PYTHONIOENCODING", "").partition(":")
    encoding, errors = encoding or sys.stdout.encoding, errors or sys.stdout.errors  # the locale's
    buffering = 0 if unbuffered else -1
    raw = [os.fdopen(0, "rb", closefd=False), *(os.fdopen(n, "wb", buffering, closefd=False) for n in (1, 2))]
    sys.stdin = sys.__stdin__ = io.TextIOWrapper(raw[0], encoding, errors)
    options = {"write_through": unbuffered}
    sys.stdout = sys.__stdout__ = io.TextIOWrapper(raw[1], encoding, errors, line_buffering=os.isatty(1), **options)
    sys.stderr = sys.__stderr__ = io.TextIOWrapper(raw[2], encoding, "backslashreplace", line_buffering=True, **options)


def _execute(arguments: list[str], *, safe_path: bool) -> None:
    kind, rest = arguments[0], arguments[1:]
    own = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    first = {"-m": os.getcwd(), "-c": ""}.get(kind, str(Path(kind).absolute().parent))
    sys.path[:] = [*([] if safe_path else [first]), *own, *SEARCHED]
    if kind == "-m":
        sys.argv = ["-m", *rest[1:]]
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), main.__dict__)  # noqa: S102 (what ``-c`` is)
    else:
        sys.argv = arguments
        runpy.run_path(kind, run_name="__main__")


def _code_of(end: SystemExit) -> int:
    if end.code is None or isinstance(end.code, int):
        return (end.code or 0) & 0xFF
    print(end.code, file=sys.stderr)
    return 1


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    gc.disable()  # else it walks again and again over what is there to stay
    import_everything()
    gc.freeze()  # children share the server's memory for as long as neither writes there, which a collection would do
    gc.enable()
    ctypes.CDLL(None).malloc_trim(0)  # what a child needs more is to be seen by a test that measures it
    serve(Path(sys.argv[1]), int(sys.argv[2]))
