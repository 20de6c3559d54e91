"""``python ...`` in a process that `fork_server.py` forks: what an executable in place of Python runs.

python -IS fork_client.py EXECUTABLE FOLDER PYTHON ARGUMENTS...

The client hands over its standard streams, passes signals on, and ends as the child ends. It imports next to nothing,
for it has to start in no time. Where it cannot serve it becomes a real Python: for options other than ``-c``, ``-m``,
``-u`` and ``-P``, and where no server has the environment's values of what libraries read when they are imported.
"""

from __future__ import annotations

import _socket
import array
import json
import os
import signal
import sys
import zlib
from contextlib import suppress

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
READ_ON_IMPORT = ("HF_", "HUGGINGFACE_", "TRANSFORMERS_", "OMP_")
NO_MATTER = {"HF_DATASETS_CACHE"}  # the server sets it


def request(arguments: list[str], executable: str, environment: dict[str, str]) -> bytes:
    """What the server is sent: the words behind ``python``, and what a process inherits."""
    content = {"arguments": arguments, "folder": os.getcwd(), "environment": environment, "executable": executable}
    return json.dumps(content).encode()


def connect(address: str, content: bytes, streams: tuple[int, ...] = (0, 1, 2)) -> tuple[_socket.socket, int]:
    """Let the server fork a child; the connection, and the child's process id."""
    connection = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    connection.connect(address)
    rights = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, array.array("i", streams))]
    connection.sendmsg([len(content).to_bytes(4, "big")], rights)
    connection.sendall(content)
    return connection, number(connection)


def number(connection: _socket.socket) -> int:
    """What the server says next: a process id, or a wait status."""
    content = b""
    while len(content) < 4:
        part = connection.recv(4 - len(content))
        if not part:
            raise ConnectionError("the fork server is gone")
        content += part
    return int.from_bytes(content, "big", signed=True)


def address_for(environment: dict[str, str], folder: str) -> str:
    """The socket of the server that has imported everything under such an environment."""
    names = sorted(name for name in environment if name.startswith(READ_ON_IMPORT) and name not in NO_MATTER)
    read = "".join(f"{name}={environment[name]}\n" for name in names)
    return os.path.join(folder, f"fork-{zlib.crc32(read.encode()):08x}")


def main(executable: str, folder: str, python: str, *arguments: str) -> None:
    words = arguments
    while words[:1] and words[0] in ("-u", "-P"):
        words = words[1:]
    known = words[:1] and (words[0] in ("-c", "-m") or not words[0].startswith("-"))
    address = address_for(dict(os.environ), folder)
    if not known or not os.path.exists(address):
        os.execv(python, [python, *arguments])
    connection, pid = connect(address, request(list(arguments), executable, dict(os.environ)))

    def pass_on(received: int, _: object) -> None:
        with suppress(ProcessLookupError):  # it has just ended
            os.kill(pid, received)

    for signalled in FORWARDED:
        signal.signal(signalled, pass_on)
    status = number(connection)
    if os.WIFSIGNALED(status):
        ended_by = os.WTERMSIG(status)
        if ended_by not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(ended_by, signal.SIG_DFL)
        os.kill(os.getpid(), ended_by)
    os._exit(os.WEXITSTATUS(status))


if __name__ == "__main__":
    main(*sys.argv[1:])
