"""What is installed: the wheel's content, the versions that are promised, and pins that work anywhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import learngene_hub
from learngene_hub.registry import Registry

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NEWEST_FLOOR = {"torch": (2, 11), "transformers": (5, 17), "huggingface_hub": (1, 33), "accelerate": (1, 15)}


def _build(kind: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "hatchling", "build", "--target", kind, "--directory", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return next(folder.iterdir())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("hatchling")
    return _build("wheel", tmp_path_factory.mktemp("wheel"))


def test_the_wheel_holds_the_package_and_the_bundled_learngenes(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        files = {"__init__.py", "py.typed", "samples/signdigits/train.parquet", "samples/signdigits/test.parquet"}
        assert {f"learngene_hub/{name}" for name in files | {"_data/registry.yaml"}} <= names
        for entry in Registry.load(ROOT / "registry.yaml").entries.values():
            if not entry.is_remote:
                for name in ("README.md", "learngene.safetensors"):
                    inside = archive.read(f"learngene_hub/_data/{entry.uri}/{name}")
                    assert inside == (ROOT / entry.uri / name).read_bytes()
        outside = {name.split("/")[0] for name in names} - {"learngene_hub"}
        assert len(outside) == 1 and outside.pop().endswith(".dist-info")
        info = next(name for name in names if name.endswith("/entry_points.txt"))
        assert "learngene = learngene_hub.cli:main" in archive.read(info).decode()
        assert any(name.endswith("licenses/LICENSE") for name in names)
        assert not [name for name in names if "__pycache__" in name]


def test_the_wheel_works_where_there_is_no_repository(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = (
        "import learngene_hub, learngene_hub.registry as r\n"
        "print(learngene_hub.__file__, r.data_folder(), sep='\\n')\n"
        "print(*[entry.name for entry in learngene_hub.list_learngenes()])"
    )
    env = {**os.environ, "PYTHONPATH": str(tmp_path)} | {"LEARNGENE_REGISTRY": ""}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=True
    )
    package, data, names = run.stdout.split("\n")[:3]
    assert Path(package).parent == tmp_path / "learngene_hub" and Path(data) == tmp_path / "learngene_hub" / "_data"
    assert names.split() == list(Registry.load(ROOT / "registry.yaml").entries)


def test_the_source_archive_can_be_built_from(tmp_path: Path) -> None:
    pytest.importorskip("hatchling")
    with tarfile.open(_build("sdist", tmp_path)) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = {
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "CHANGELOG.md",
        "registry.yaml",
        "tests/conftest.py",
        "Makefile",
    }
    assert needed <= names


def test_lower_bounds_are_not_above_the_promised_ones() -> None:
    floors = {}
    for requirement in PROJECT["dependencies"]:
        found = re.fullmatch(r"([\w-]+)>=([\d.]+)", requirement)
        assert found, f"{requirement} has no lower bound, or an upper one"
        floors[found[1]] = tuple(map(int, found[2].split(".")))
    for name, newest in NEWEST_FLOOR.items():
        assert floors[name][:2] <= newest, name


def test_the_pins_name_no_host_and_no_path() -> None:
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    for pin in pins:
        assert re.fullmatch(r"[A-Za-z0-9_.-]+==[\w.+!]+( ; [^/:]+)?", pin), pin
    assert {"uv", "torch", "pytest", "ruff", "basedpyright"} <= {pin.split("==")[0] for pin in pins}


def test_the_changelog_is_of_this_version() -> None:
    top = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert top and top[1] == learngene_hub.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", learngene_hub.__version__)
