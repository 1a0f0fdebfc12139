"""How tests run a command, and how they run something in several processes."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from typer.testing import CliRunner

from decompclip.cli import app

GRACE = 3
"""Seconds after the first error until those that still wait are ended, first by SIGTERM, then by SIGKILL, as torchrun ends them."""


def in_processes(count: int, work: Callable[[int], Any], *, grace: float = GRACE) -> list[Any]:
    """What `work(rank)` returns in each of several processes, or the exception that it raises; None where it had to be ended.

    They find what torchrun would tell them. They are forked, so that nothing is imported again, and compute in one thread,
    which a fork leaves in order.
    """
    with socket.socket() as held, tempfile.TemporaryDirectory() as folder:
        # bound until the end, so that nobody else is given the port; the first process may listen at it, since this does not
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        told = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1"}
        told["MASTER_PORT"] = held.getsockname()[1]
        places = [Path(folder) / f"{rank}" for rank in range(count)]
        children = {}
        for rank, place in enumerate(places):
            child = os.fork()
            if not child:
                code = 1
                try:
                    os.environ.update(
                        {key: str(x) for key, x in {**told, "RANK": rank, "LOCAL_RANK": rank}.items()}
                    )
                    code = _in_child(place, work, rank)
                finally:
                    os._exit(code)
            children[child] = rank
        end, ending = None, signal.SIGTERM
        while children:
            for child in list(children):
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    del children[child]
                    end = end or (time.monotonic() + grace if status else None)
            if end is not None and time.monotonic() > end:
                for child in children:
                    os.kill(child, ending)
                end, ending = time.monotonic() + grace, signal.SIGKILL
            time.sleep(0.01)
        return [pickle.loads(place.read_bytes()) if place.exists() else None for place in places]


def _in_child(place: Path, work: Callable[[int], Any], rank: int) -> int:
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        found = work(rank)
        failed = isinstance(found, tuple) and found[0] not in (0, None)  # of a command
    except Exception as error:
        found, failed = error, True
    place.write_bytes(pickle.dumps(found))
    return int(failed)


def run(*arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of one command, in this process."""
    result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def succeeds(*arguments: object) -> tuple[str, str]:
    """Stdout and stderr of a command that ends well."""
    code, stdout, stderr = run(*arguments)
    assert code == 0, stderr
    return stdout, stderr


def refused(*arguments: object) -> str:
    """The one line in which a command says what is wrong with its input."""
    code, stdout, stderr = run(*arguments)
    assert code == 2 and "Traceback" not in stdout + stderr, stderr
    (line,) = [line for line in stderr.splitlines() if line.startswith("error: ")]
    return line
