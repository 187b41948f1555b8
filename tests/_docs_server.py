"""A process that has imported torch, timm and transformers once, and forks a Python program whenever a shell asks.

A page of the documentation runs dozens of commands, and each would import for seconds. The shell of ``pages.py`` finds
``learngene`` and ``python`` as small clients that hand arguments, folder, environment and the three standard streams to
this server over a Unix socket. Run: ``python _docs_server.py SOCKET``; it ends when its standard input does.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
import traceback
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

HEAVY = """
accelerate learngene_hub.cli learngene_hub.descendant learngene_hub.pool numpy PIL.Image pyarrow.parquet pytest
rich.table safetensors.torch timm timm.models.vision_transformer torch torch._dynamo torchvision.transforms.v2
transformers.trainer transformers.models.timm_wrapper.modeling_timm_wrapper typer.testing yaml
"""
CLIENTS = ("HF_ENDPOINT", "HF_HOME", "HF_HUB_OFFLINE", "HF_TOKEN")


def serve(path: str) -> None:
    """Answers clients until standard input ends."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the children: each tells its own client
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        print("ready", flush=True)
        while True:
            ready, _, _ = select.select([server, sys.stdin], [], [])
            if sys.stdin in ready:
                return
            client, _ = server.accept()
            if os.fork() == 0:
                server.close()
                answer(client)
            client.close()


def answer(client: socket.socket) -> None:
    """Runs what a client asks, in this process, and ends it."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _, streams, _, _ = socket.recv_fds(client, 1, 3)
    with client.makefile("rb") as sent:
        asked = json.loads(sent.readline())
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdin, sys.stdout, sys.stderr = (
        open(0, closefd=False),
        open(1, "w", buffering=1, closefd=False),  # by lines, as on a terminal, so that notes stay where they belong
        open(2, "w", buffering=1, closefd=False),
    )
    status = 1
    try:
        status = run(asked)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            pass
    client.sendall(bytes([status]))
    os._exit(status)


def run(asked: dict[str, Any]) -> int:
    """The program with its folder, environment and arguments."""
    had = {key: os.environ.get(key) for key in CLIENTS}
    os.environ.clear()
    os.environ.update(asked["env"])
    if had != {key: os.environ.get(key) for key in CLIENTS}:  # the client reads its settings when it is imported
        importlib.reload(sys.modules["huggingface_hub.constants"])
    os.chdir(asked["cwd"])
    if not os.environ.get("DOCS_NETWORK"):
        stay_here()
    here = str(Path(__file__).parent)
    own = [place for place in os.environ.get("PYTHONPATH", "").split(os.pathsep) if place]
    sys.path[:] = own + [place for place in sys.path if place != here and place not in own]
    importlib.invalidate_caches()
    if entry_points(group="learngene_hub.methods"):  # a page installed a method: the table is made at import
        for name in [name for name in sys.modules if name.split(".")[0] == "learngene_hub"]:
            del sys.modules[name]
    program, *arguments = asked["argv"]
    if program == "learngene":
        sys.argv = ["learngene", *arguments]
        importlib.import_module("learngene_hub.cli").main()
        return 0
    return python(arguments)


def python(arguments: list[str]) -> int:
    """``python -c CODE``, ``python -m MODULE``, ``python FILE`` or ``python -``."""
    first, *rest = arguments
    if first == "-m":
        sys.path.insert(0, os.getcwd())
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first in ("-c", "-"):
        sys.path.insert(0, os.getcwd())
        sys.argv = [first, *rest]
        code = rest[0] if first == "-c" else sys.stdin.read()
        exec(compile(code, "<page>", "exec"), {"__name__": "__main__"})
    else:
        sys.path.insert(0, os.path.dirname(os.path.abspath(first)))
        sys.argv = arguments
        runpy.run_path(first, run_name="__main__")
    return 0


def stay_here() -> None:
    """Refuses what leaves this machine, as conftest.py does in the tests' own process."""
    from conftest import _guarded, _guarded_lookup

    socket.socket.connect = _guarded(socket.socket.connect)  # type: ignore[method-assign]
    socket.socket.connect_ex = _guarded(socket.socket.connect_ex)  # type: ignore[method-assign]
    socket.getaddrinfo = _guarded_lookup(socket.getaddrinfo)


if __name__ == "__main__":
    for name in HEAVY.split():
        importlib.import_module(name)
    import conftest  # noqa: F401  # for stay_here, while this folder is on the path

    serve(sys.argv[1])
