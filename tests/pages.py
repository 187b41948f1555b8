"""The pages of the documentation: their blocks, and a shell that runs these as a reader would.

Fenced blocks of ``sh`` run in bash, of ``python`` as a program of their own; the blocks of a page share one folder and
one environment, in their order. A block of ``text`` is the output of the block before it: see ``same_output``. What is
special about a block stands in an HTML comment on the line above it:

    <!-- file: NAME -->      its content is that of the file NAME
    <!-- slow -->            more than some seconds: run by the tests marked slow
    <!-- network -->         run by the tests marked network
    <!-- not run: WHY -->    not run
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).parent.parent
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMENT = re.compile(r"<!-- (file|slow|network|not run)(?:: ([^\n]*?))? -->\n\Z")
CLIENT = """\
#!{python} -IS
import json, os, socket, sys
name = os.path.basename(sys.argv[0])
server = socket.socket(socket.AF_UNIX)
server.connect({socket!r})
socket.send_fds(server, [b"!"], [0, 1, 2])
asked = {{"argv": [name, *sys.argv[1:]], "cwd": os.getcwd(), "env": dict(os.environ)}}
server.sendall(json.dumps(asked).encode() + b"\\n")
said = server.recv(1)
sys.exit(said[0] if said else 70)
"""
# `pip install` of a page puts packages into a folder of the test, without dependencies, which are all there.
PIP = """\
#!/bin/sh
[ "$1" = install ] || exit 64
shift
exec "{python}" -m pip install -q --target "$DOCS_SITE" --no-deps --no-index --no-build-isolation \\
    --disable-pip-version-check "$@"
"""


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    page: str
    line: int
    language: str
    text: str
    kind: str = ""  # of the comment above it: file, slow, network, not run
    what: str = ""  # the rest of that comment

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(path: Path) -> list[Block]:
    """The fenced blocks of a page, and those that are indented by four spaces after a blank line, as ``sh``."""
    page = path.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(page):
        line = page.count("\n", 0, match.start()) + 2
        block = Block(path.name, line, match[1], match[2])
        if comment := COMMENT.search(page, 0, match.start()):
            block = replace(block, kind=comment[1], what=comment[2] or "")
        found.append(block)
    return found


@dataclass
class Shell:
    """What a reader sits in front of: a folder, an environment, and what the last block printed."""

    folder: Path
    environment: dict[str, str]
    output: str = ""

    def run(self, block: Block, text: str) -> None:
        """Runs a block, or compares it with the output of the one before.

        Raises:
            AssertionError: it failed, or the output is another; with the block's place and what it printed.
        """
        if block.kind == "file":
            path = self.folder / block.what
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        elif block.language == "text":
            assert same_output(text, self.output), f"{block}: told\n{text}\nprinted\n{self.output}"
        elif block.language == "python":
            self._run(block, ["python", "-"], text)
        elif block.language in ("sh", ""):
            state = self.folder.parent / "state"
            end = f'\n{{ pwd; env -0; }} > "{state}"\n'
            self._run(block, ["bash", "-euo", "pipefail", "-s"], text + end)
            place, _, variables = state.read_text().partition("\n")
            self.folder = Path(place)
            self.environment = dict(pair.split("=", 1) for pair in variables.split("\0") if "=" in pair)
        else:
            raise AssertionError(f"{block}: a block of {block.language!r}; there are sh, python, text")

    def _run(self, block: Block, command: Sequence[str], text: str) -> None:
        began = time.perf_counter()
        ran = subprocess.run(
            command, input=text, cwd=self.folder, env=self.environment, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, timeout=540,
        )  # fmt: skip
        self.output = ran.stdout
        print(f"{block}: {time.perf_counter() - began:.1f} s")
        told = textwrap.indent(text, "    ")
        assert ran.returncode == 0, f"{block}: exit status {ran.returncode} of\n{told}\n{self.output[-4000:]}"


NUMBER = re.compile(r"[+-]?\d[\d,]*(\.\d+)?(e-?\d+)?")


def same_output(told: str, printed: str) -> bool:
    """Whether a page tells what was printed, line by line; a line of ``...`` stands for any lines.

    Spaces do not count: a terminal aligns what a pipe separates by tabs. Of numbers with a fraction, those before "s"
    (seconds) are free, those before "%" may differ by 6 points and others by two fifths, as results of training do
    between machines; whole numbers are exact. A long word may be shortened to its first letters and "...".
    """
    parts: list[list[str]] = [[]]
    for line in told.strip().splitlines():
        if line.strip() == "...":
            parts.append([])
        else:
            parts[-1].append(line)
    lines, start = printed.strip().splitlines(), 0
    for number, part in enumerate(parts):
        last = number == len(parts) - 1
        places = range(start, len(lines) - len(part) + 1)
        fits = [place for place in places if all(map(_same_line, part, lines[place : place + len(part)]))]
        fits = [place for place in fits if number or place == 0]
        fits = [place for place in fits if not last or place + len(part) == len(lines) or not part]
        if not fits:
            return False
        start = fits[0] + len(part)
    return parts[-1] == [] or start == len(lines)


def _same_line(told: str, printed: str) -> bool:
    pairs = told.split(), printed.split()
    if len(pairs[0]) != len(pairs[1]):
        return False
    after = [*pairs[1][1:], ""]
    return all(_same_word(a, b, unit) for a, b, unit in zip(*pairs, after, strict=True))


def _same_word(told: str, printed: str, unit: str) -> bool:
    if told == printed or (told.endswith("...") and len(told) > 8 and printed.startswith(told[:-3])):
        return True
    a, b = told.strip("(),;:"), printed.strip("(),;:")
    matches = NUMBER.fullmatch(a), NUMBER.fullmatch(b)
    if not all(matches) or not any(match and (match[1] or match[2]) for match in matches):
        return False
    found = [float(word.replace(",", "")) for word in (a, b)]
    if unit.strip(".,;)") == "s":
        return True
    allowed = 6.0 if unit.startswith("%") else 0.4 * abs(found[1])
    return abs(found[0] - found[1]) <= allowed


@contextmanager
def shells(environment: Mapping[str, str]) -> Iterator[Shells]:
    """Shells whose ``learngene`` and ``python`` run in forks of one process; see ``_docs_server.py``."""
    root = Path(tempfile.mkdtemp(prefix="docs-"))  # a socket's path is short
    own = {**environment, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tests/_docs_server.py"), str(root / "socket")]
    try:
        (root / "bin").mkdir()
        client = CLIENT.format(python=sys.executable, socket=str(root / "socket"))
        for name in ("learngene", "python"):
            _write_program(root / "bin" / name, client)
        _write_program(root / "bin/pip", PIP.format(python=sys.executable))
        tools = os.path.dirname(sys.executable)
        own["PATH"] = os.pathsep.join([str(root / "bin"), tools, own.get("PATH", "/usr/bin:/bin")])
        piped = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with subprocess.Popen(command, env=own, cwd=root, **piped) as server:  # leaving ends its input, and so itself
            assert server.stdout.readline() == "ready\n"
            yield Shells(root, own)
    finally:
        shutil.rmtree(root, ignore_errors=True)


def _write_program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


@dataclass(frozen=True)
class Shells:
    """Makes shells in folders of their own."""

    root: Path
    environment: Mapping[str, str]

    def at(self, folder: Path, **more: str) -> Shell:
        """A shell in a new folder, ``folder/work``."""
        (folder / "work").mkdir(parents=True)
        site = str(folder / "site")
        own = {"DOCS_SITE": site, "PYTHONPATH": os.pathsep.join([site, str(ROOT)])}
        return Shell(folder / "work", {**self.environment, **own, **more})
