"""The table of methods, and a method of a third party that is really installed and grown from."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

import learngene_hub
from learngene_hub import methods
from learngene_hub.errors import SettingsError
from learngene_hub.methods.lsamd import Lsamd

CODE = '''
"""TWICE: the first block of the ancestor, at every depth. Uses nothing but the public Method protocol."""
from dataclasses import dataclass
from typing import ClassVar
from learngene_hub import Learngene, ViTShape
from learngene_hub.errors import ArtefactError, SettingsError
from learngene_hub.shape import Reach

@dataclass(frozen=True, kw_only=True)
class Twice:
    name: ClassVar[str] = "twice"
    paper: ClassVar[str] = "https://example.org/twice"
    groups: ClassVar[frozenset] = frozenset({"all"})
    scale: float = 2.0

    def __post_init__(self):
        if not self.scale > 0:
            raise SettingsError(f"scale {self.scale!r} asked; it must be above 0")

    def extract(self, ancestor, data, *, facts, preprocessing, watch):
        shape = ViTShape.of(ancestor)
        tensors = {f"all.{k}": v.detach().clone() for k, v in ancestor.state_dict().items()
                   if not k.startswith("head") and (not k.startswith("blocks.") or k.startswith("blocks.0."))}
        return Learngene(tensors=tensors, method=self.name, settings={"scale": self.scale}, shape=shape,
                         reach=Reach(depths=(1, 9), widths=(shape.width, shape.width, shape.head_dim)),
                         ancestor=dict(facts), preprocessing=preprocessing, license="MIT", provenance={})

    def expand(self, learngene, shape):
        part = learngene.group("all")
        state = {k: v for k, v in part.items() if not k.startswith("blocks.")}
        state["cls_token"] = state["cls_token"] * self.scale
        for i in range(shape.depth):
            state |= {k.replace("blocks.0", f"blocks.{i}"): v for k, v in part.items() if k.startswith("blocks.")}
        return state | dict.fromkeys(["head.weight", "head.bias"])

    def check(self, shapes, native):
        if shapes.get("all.cls_token") != (1, 1, native.width):
            raise ArtefactError("all.cls_token is missing")
'''

SCRIPT = """
import json, sys, torch
import learngene_hub as hub
from learngene_hub import METHODS, Learngene, ViTShape, extract
shape = ViTShape(depth=2, width=64, heads=2, patch=8, image_size=16, classes=3)
ancestor = shape.build()
facts = {"name": "pico", "license": "MIT", "source": "here"}
gene = extract("twice", ancestor, {}, settings={"scale": 3.0}, facts=facts)
digest = gene.save(sys.argv[1])
kept = sys.argv[1] + ".state"  # a method that knows of no state is extracted beside one
again = [extract("twice", ancestor, {}, settings={"scale": 3.0}, facts=facts, state_dir=kept).digest for _ in range(2)]
assert again == [digest, digest]
grown = Learngene.load(sys.argv[1], sha256=digest).expand(depth=5, num_labels=7)
mine = ancestor.state_dict()
blocks = all(torch.equal(grown.state_dict()[k.replace("blocks.0", f"blocks.{i}")], v)
             for k, v in mine.items() for i in range(5) if k.startswith("blocks.0."))
print(json.dumps({"methods": sorted(METHODS), "blocks": blocks, "shape": str(ViTShape.of(grown)),
                  "class_token": torch.equal(grown.cls_token, 3.0 * mine["cls_token"]),
                  "file": __import__("twice_method").__file__}))
"""


def install(folder: Path) -> None:
    """What `pip install --target` leaves: the module, and its dist-info with the entry point."""
    info = folder / "twice_method-0.1.dist-info"
    info.mkdir(parents=True)
    (folder / "twice_method.py").write_text(CODE)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: twice-method\nVersion: 0.1\n")
    (info / "WHEEL").write_text("Wheel-Version: 1.0\nGenerator: hand\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
    (info / "entry_points.txt").write_text("[learngene_hub.methods]\ntwice = twice_method:Twice\n")
    (info / "INSTALLER").write_text("test\n")
    files = ["twice_method.py", *(f"{info.name}/{name}" for name in ("METADATA", "WHEEL", "entry_points.txt"))]
    (info / "RECORD").write_text("".join(f"{name},,\n" for name in [*files, f"{info.name}/RECORD"]))


def test_an_installed_method_of_a_third_party_extracts_saves_and_grows(tmp_path: Path) -> None:
    install(tmp_path / "site")
    ours = Path(learngene_hub.__file__).parents[1]
    path = os.pathsep.join([str(tmp_path / "site"), str(ours), os.environ.get("PYTHONPATH", "")])
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "twice.safetensors")],
        env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    said: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    assert said["methods"] == sorted([*methods.BUILT_IN, "twice"])
    assert said["blocks"] and said["class_token"] and said["shape"] == "5x64"
    assert Path(said["file"]).parent == tmp_path / "site"


class _Point:
    """An entry point whose object is at hand."""

    def __init__(self, name: str, offered: Any) -> None:
        self.name, self.offered = name, offered
        self.dist = type("Dist", (), {"name": "rude-package"})()

    def load(self) -> Any:
        if isinstance(self.offered, Exception):
            raise self.offered
        return self.offered


class Good(Lsamd):
    name = "good"  # type: ignore[misc]


class Nameless:
    """No name, no methods."""


class Hollow:
    """The right name, and nothing that a method does."""

    name = "hollow"


def offer(monkeypatch: pytest.MonkeyPatch, *points: Any) -> None:
    monkeypatch.setattr(methods, "entry_points", lambda group: points if group == "learngene_hub.methods" else ())


def test_entry_points_join_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, _Point("good", Good))
    assert dict(methods._table()) == dict(methods.BUILT_IN) | {"good": Good}


@pytest.mark.parametrize(
    ("point", "told"),
    [
        (_Point("lsamd", Good), "rude-package.*'lsamd'.*taken"),
        (_Point("nameless", Nameless), "'nameless' of rude-package"),
        (_Point("other", Good), "'other' of rude-package"),
        (_Point("good", Good()), "'good' of rude-package"),
        (_Point("hollow", Hollow), "'hollow' of rude-package"),
        (_Point("broken", ImportError("no module named x")), "'broken' of rude-package"),
    ],
)
def test_entry_points_that_are_no_method_are_refused_by_package(
    monkeypatch: pytest.MonkeyPatch, point: Any, told: str
) -> None:
    offer(monkeypatch, point)
    with pytest.raises(SettingsError, match=told) as caught:
        methods._table()[point.name]
    assert "\n" not in str(caught.value)


def test_a_broken_entry_point_breaks_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, _Point("broken", ImportError("no module named x")), _Point("good", Good))
    table = methods._table()
    assert list(table) == [*methods.BUILT_IN, "broken", "good"]
    assert table["lsamd"] is Lsamd and table["good"] is Good


def test_the_same_name_offered_twice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, _Point("good", Good), _Point("good", Good))
    with pytest.raises(SettingsError, match="'good'.*taken"):
        methods._table()


def test_the_group_is_the_one_that_is_documented() -> None:
    assert methods.ENTRY_POINTS == "learngene_hub.methods" == EntryPoint("x", "y", methods.ENTRY_POINTS).group
    assert methods.BUILT_IN["lsamd"] is Lsamd and methods.METHODS["lsamd"] is Lsamd


def test_the_table_cannot_be_written() -> None:
    with pytest.raises(TypeError):
        methods.METHODS["mine"] = Lsamd  # type: ignore[index]


def test_an_unknown_method_answers_with_the_known_ones() -> None:
    with pytest.raises(SettingsError, match="unknown method 'lsmad'; did you mean 'lsamd'.*known methods: .*lsamd"):
        methods.get_method("lsmad")
    with pytest.raises(SettingsError, match="unknown method 'zzz'; known methods: .*lsamd"):
        methods.get_method("zzz")


def test_settings_reach_the_method_and_unknown_ones_are_told() -> None:
    assert methods.get_method("lsamd", {"keep": 5}) == Lsamd(keep=5)
    assert methods.get_method("lsamd") == Lsamd()
    with pytest.raises(SettingsError, match="'depth'.*epochs, "):
        methods.get_method("lsamd", {"depth": 5})


def test_a_method_without_fields_tells_unknown_settings_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A third party's class need not be a dataclass for its error to be one line."""
    monkeypatch.setattr(methods, "METHODS", {"hollow": Hollow})
    with pytest.raises(SettingsError, match="settings of hollow"):
        methods.get_method("hollow", {"depth": 5})


def test_an_unknown_setting_is_named_with_the_nearest() -> None:
    with pytest.raises(SettingsError, match="^tleg has no setting 'epoch'; did you mean 'epochs'"):
        methods.get_method("tleg", {"epoch": 3})
