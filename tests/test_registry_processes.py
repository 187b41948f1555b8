"""Edits of registry.yaml: nothing is lost between processes, and whatever goes wrong leaves a whole file."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from test_registry import ROW, rows, write

from learngene_hub import _lock
from learngene_hub._registry_file import add_entry, remove_entry
from learngene_hub.errors import RegistryError, StoreError
from learngene_hub.registry import MAX_BYTES, Entry, Registry

TESTS = Path(__file__).parent


def entry() -> Entry:
    return Entry(**{**ROW, "name": "new"})


def loaded(path: Path) -> list[Entry]:
    return list(Registry.load(path).entries.values())


# --- the file ---------------------------------------------------------------------------------------------------------


def test_mode_and_link_stay(tmp_path: Path) -> None:
    real = tmp_path / "real"
    real.mkdir()
    target = write(real, rows({}))
    target.chmod(0o640)
    link = tmp_path / "registry.yaml"
    link.symlink_to(target)
    add_entry(link, entry())
    assert link.is_symlink() and len(loaded(target)) == 2
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    assert sorted(os.listdir(tmp_path)) == ["real", "registry.yaml"] and os.listdir(real) == ["registry.yaml"]
    link.unlink()
    link.symlink_to(real / "new.yaml")  # nothing is there yet
    add_entry(link, entry())
    assert link.is_symlink() and loaded(real / "new.yaml") == [entry()]


def test_a_registry_has_an_end(tmp_path: Path) -> None:
    text = rows({}) + "\n#" + "x" * (MAX_BYTES - len(rows({})) - 100)
    path = write(tmp_path, text)
    with pytest.raises(RegistryError, match=f"would have 10.* bytes; a registry has at most {MAX_BYTES}"):
        add_entry(path, entry())
    assert path.read_text() == text


def test_what_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, message in (
        (tmp_path, "is not a file"),
        (tmp_path / "pipe", "is not a file"),
        (tmp_path / "no" / "registry.yaml", "no folder .*no; make it first"),
        (tmp_path / "a\0b", "cannot write"),
        (tmp_path / ("x" * 300), "cannot write .*nothing was changed"),
    ):
        with pytest.raises(StoreError, match=message):
            add_entry(path, entry())
    with pytest.raises(StoreError, match="cannot read the registry .*missing.yaml"):
        remove_entry(tmp_path / "missing.yaml", "x")
    path = write(tmp_path, rows({}))
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(StoreError, match="is read-only; `chmod u\\+w` allows"):
        add_entry(path, entry())
    assert sorted(os.listdir(tmp_path)) == ["pipe", "registry.yaml"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_changes_nothing(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    path = write(tmp_path, rows({}))
    with monkeypatch.context() as patch:
        patch.setattr(os, step, full)
        with pytest.raises(StoreError, match="no space left for .*; nothing was changed"):
            add_entry(path, entry())
    assert path.read_text() == rows({}) and os.listdir(tmp_path) == ["registry.yaml"]
    add_entry(path, entry())


# --- several processes ------------------------------------------------------------------------------------------------


def script(code: str, *args: object) -> list[str]:
    """The command that runs this code, with ``add_entry`` and ``entry`` at hand; importing this file takes longer."""
    head = f"""
import sys
sys.path[:0] = [{str(TESTS)!r}, {str(TESTS.parent)!r}]
from learngene_hub._registry_file import add_entry, remove_entry
from learngene_hub.registry import Entry, Registry
def entry(name):
    return Entry(**{ROW!r} | {{"name": name}})
def names(path):
    return list(Registry.load(path).entries)
"""
    return [sys.executable, "-c", head + code, *map(str, args)]


HOLD = """
import fcntl, time
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(60)
"""


def test_who_waits_too_long_says_so_and_a_dead_holder_blocks_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_lock, "LOCK_SECONDS", 0.2)
    path, lock = write(tmp_path, rows({})), tmp_path / ".registry.yaml.lock"
    (tmp_path / ".registry.yaml.tmp").write_text("- half of a ro")
    with subprocess.Popen(script(HOLD, lock), stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout and holder.stdout.readline() == "held\n"
        with pytest.raises(StoreError, match=r"another process has held .*\.registry\.yaml\.lock for 0 s; try again"):
            add_entry(path, entry())
        holder.kill()
        holder.wait()
    assert lock.exists()
    add_entry(path, entry())
    assert len(loaded(path)) == 2 and os.listdir(tmp_path) == ["registry.yaml"]


ADD = """
for i in range(int(sys.argv[3])):
    add_entry(sys.argv[1], entry(f"{sys.argv[2]}-{i}"))
"""


@pytest.mark.parametrize("times", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_two_processes_add_at_once_and_no_entry_is_lost(times: int, tmp_path: Path) -> None:
    path = write(tmp_path, "# ours\n" + rows({}))
    adding = [subprocess.Popen(script(ADD, path, who, times)) for who in ("a", "b")]
    seen = 0
    while any(process.poll() is None for process in adding):
        names = list(Registry.load(path).entries)  # whole at every moment
        assert len(names) >= seen
        seen = len(names)
        time.sleep(0.2)
    assert [process.returncode for process in adding] == [0, 0]
    names = list(Registry.load(path).entries)
    assert sorted(names) == sorted(["lsamd-base", *(f"{who}-{i}" for who in "ab" for i in range(times))])
    assert path.read_text().startswith("# ours\n" + rows({}) + "\n") and os.listdir(tmp_path) == ["registry.yaml"]


# A child ends, as by SIGKILL, before its n-th step that the interpreter reports (open, flock, chmod, rename, remove).
STEPS = """
import json, os
from pathlib import Path
path, ends = Path(sys.argv[1]), []
before = names(path)
for n in range(1000):
    child = os.fork()
    if child == 0:
        left = [n]
        def step(event, _):
            if event in {"open", "fcntl.flock", "os.chmod", "os.chown", "os.rename", "os.remove"}:
                left[0] -= 1
                if left[0] < 0:
                    os._exit(9)
        sys.addaudithook(step)
        add_entry(path, entry("gene"))
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    after = names(path)
    assert after in (before, [*before, "gene"]), n
    ends.append("new" if "gene" in after else "old")
    add_entry(path, entry("next"))
    assert os.listdir(path.parent) == [path.name], n
    remove_entry(path, "next")
    if ends[-1] == "new":
        remove_entry(path, "gene")
    if status == 0:
        break
print(json.dumps(ends))
"""


def test_a_process_that_ends_at_any_step_leaves_the_old_or_the_new_file(tmp_path: Path) -> None:
    path = write(tmp_path, rows({}))
    done = subprocess.run(script(STEPS, path), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    ends = json.loads(done.stdout)
    assert len(ends) > 8 and ends == sorted(ends, reverse=True) and {*ends} == {"old", "new"}


KILL = """
import json, os, random, signal, time
from pathlib import Path
import hostile
from learngene_hub import _registry_commands
path, gene, times = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
sys.stdout = open(os.devnull, "w")

def add(name):
    try:
        _registry_commands.app(["add", gene, "--name", name, "--registry", str(path), "-q"])
    except SystemExit as end:
        return end.code

chance, ends, others = random.Random(int(sys.argv[4])), [], set(os.listdir(path.parent))
with hostile.only_method_is_tiny():
    for name in ("warm", "warmer"):
        began = time.perf_counter()
        assert add(name) == 0
        span = time.perf_counter() - began
    for n in range(times):
        before = names(path)
        child = os.fork()
        if child == 0:
            add("gene")
            os._exit(0)
        time.sleep(chance.uniform(0, 1.3 * span))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        after = names(path)
        assert after in (before, [*before, "gene"]), (n, after)
        ends.append(len(after) > len(before))
        assert add("next") == 0, n
        assert set(os.listdir(path.parent)) == others, (n, os.listdir(path.parent))
        for name in ["next", "gene"][: 1 + ends[-1]]:
            remove_entry(path, name)
print(json.dumps(ends), file=sys.__stdout__)
"""


@pytest.mark.parametrize("times", [4, pytest.param(50, marks=pytest.mark.slow)])
def test_sigkill_at_random_moments_of_registry_add(times: int, tmp_path: Path) -> None:
    from hostile import only_method_is_tiny, small

    path = write(tmp_path, rows({}))
    with only_method_is_tiny():
        small().save_pretrained(tmp_path / "gene")
    (tmp_path / "gene" / "README.md").write_text("# Gene")
    done = subprocess.run(script(KILL, path, tmp_path / "gene", times, 1), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)) == times
