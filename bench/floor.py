"""The least that a push can cost: read each file, hash it, and send it over loopback, two files at a time.

    python bench/floor.py DIRECTORY [SINK]

With a directory SINK, the other end writes what it gets to the disk, as a registry must; without, it drops it.
"""

from __future__ import annotations

import hashlib
import os
import socket
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

PIECE_BYTES = 1 << 20


def send(path: Path, port: int) -> str:
    """Read, hash and send one file, and wait until the other end has it."""
    state = hashlib.sha256()
    buffer = memoryview(bytearray(PIECE_BYTES))
    with path.open("rb", buffering=0) as stream, socket.create_connection(("127.0.0.1", port)) as connection:
        while count := stream.readinto(buffer):
            state.update(buffer[:count])
            connection.sendall(buffer[:count])
        connection.shutdown(socket.SHUT_WR)
        connection.recv(1)
    return state.hexdigest()


def main() -> None:
    """Send every file of the directory to a child process."""
    files = sorted(Path(sys.argv[1]).iterdir(), key=lambda path: -path.stat().st_size)
    sink = Path(sys.argv[2]) if len(sys.argv) > 2 else None
    with socket.create_server(("127.0.0.1", 0), backlog=len(files)) as listener:
        child = os.fork()
        if not child:
            _serve(listener, sink, len(files))
            os._exit(0)
        port = listener.getsockname()[1]
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda path: send(path, port), files))
        os.waitpid(child, 0)


def _serve(listener: socket.socket, sink: Path | None, connections: int) -> None:
    """Accept as the connections come; they are two at a time."""
    threads = []
    for number in range(connections):
        connection, _ = listener.accept()
        threads.append(threading.Thread(target=_take, args=(connection, sink, number)))
        threads[-1].start()
    for thread in threads:
        thread.join()


def _take(connection: socket.socket, sink: Path | None, number: int) -> None:
    buffer = memoryview(bytearray(PIECE_BYTES))
    target = Path(os.devnull) if sink is None else sink / str(number)
    with connection, target.open("wb", buffering=0) as stream:
        while count := connection.recv_into(buffer):
            stream.write(buffer[:count])
        if sink is not None:
            os.fsync(stream.fileno())  # as docker-registry does before it answers
        connection.sendall(b"!")


if __name__ == "__main__":
    main()
