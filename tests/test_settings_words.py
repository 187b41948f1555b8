"""What the command line says of a method's settings, and which of them it takes where: at extraction, or at growth."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from kinds import grown_from
from test_cli import Call
from test_cli import run as run  # the fixture
from test_contract import another_size, learngene_of

import learngene_hub
from learngene_hub import factory
from learngene_hub.errors import SettingsError
from learngene_hub.methods import BUILT_IN, get_method, growth_of, is_planning, words

METHODS = Path(learngene_hub.__file__).parent / "methods"
DECLARED = [name for name in BUILT_IN if growth_of(BUILT_IN[name]) is not None]
# What growth reads of the settings of extraction: facts of the learngene that a call cannot change.
FACTS_OF_EXTRACTION = {"sws": {"stages"}, "ldr": {"basis", "order_offset"}}


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_setting_is_described_by_the_comment_beside_it(name: str) -> None:
    """Found again line by line in the source of its class, or of the class that it comes from."""
    said = words(BUILT_IN[name])
    known = {field.name for field in fields(BUILT_IN[name])}
    assert said.keys() <= known
    if growth_of(BUILT_IN[name]) is not None:
        assert said.keys() == known
    lines = [line for path in METHODS.glob("*.py") for line in path.read_text(encoding="utf-8").splitlines()]
    beside = {(match[1], match[2]) for line in lines if (match := re.match(r"    (\w+): .*?  # (.*)$", line))}
    assert all(any(line.endswith(f"# {text}") for line in lines) for text in said.values())
    assert len([pair for pair in said.items() if pair in beside]) >= len(said) - 2  # some are on a line of their own


def test_words_of_a_class_without_source_are_none() -> None:
    made: dict[str, Any] = {}
    exec("from dataclasses import dataclass\n@dataclass\nclass M:\n    a: int = 1  # said\n", made)
    assert words(made["M"]) == {} and growth_of(made["M"]) is None


class Recorder:
    """Whatever is read of a method's settings while something is grown."""

    def __init__(self, kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
        self.read: set[str] = set()
        known = {field.name for field in fields(kind)}

        def spy(method: Any, name: str) -> Any:
            if name in known:
                self.read.add(name)
            return object.__getattribute__(method, name)

        monkeypatch.setattr(kind, "__getattribute__", spy)


@pytest.mark.parametrize("name", DECLARED)
def test_growth_reads_no_setting_but_those_that_act_there(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    learngene = learngene_of(name, "token")
    asked = another_size(learngene)
    method, acting = get_method(name, learngene.settings), set(growth_of(BUILT_IN[name]) or ())
    assert acting <= {field.name for field in fields(BUILT_IN[name])}
    recorder = Recorder(type(method), monkeypatch)
    if is_planning(method):
        sizes = dict.fromkeys(("depth", "width", "heads", "num_labels", "image_size"))
        own = {size: value for size, value in asked.items() if size != "max_params"}  # a budget is the factory's
        shape = method.plan(learngene, **{**sizes, "in_chans": 3, **own})
    else:
        shape = factory.plan(learngene, **asked)
        recorder.read.clear()  # of the checks when the method was made
    method.expand(learngene, shape)
    assert recorder.read <= acting | FACTS_OF_EXTRACTION.get(name, set()), recorder.read - acting


def pairs() -> Iterator[tuple[str, str]]:
    for name in DECLARED:
        for field in fields(BUILT_IN[name]):
            yield name, field.name


def test_a_setting_of_extraction_is_refused_at_growth_and_one_of_growth_is_taken() -> None:
    for name, setting in pairs():
        learngene, acting = learngene_of(name, "token"), growth_of(BUILT_IN[name]) or ()
        asked = {setting: learngene.settings[setting]}
        if setting in acting:
            assert factory.plan(learngene, settings=asked) == factory.plan(learngene)
            continue
        with pytest.raises(SettingsError) as told:
            factory.plan(learngene, settings=asked)
        assert str(told.value).startswith(f"setting {setting} asked") and ", ".join(acting) in str(told.value)


def test_the_command_line_tells_and_takes_them_so(run: Call, tmp_path: Path) -> None:
    rows = json.loads(run("methods", "cluster", "--json").out)
    acts = [row["acts"] for row in rows]
    assert acts == ["extraction"] * acts.count("extraction") + ["growth"] * 2
    by_name = {row["setting"]: row for row in rows}
    assert by_name["psi_epochs"]["description"] == "passes over the images; 0: no maps, regenerated FFNs are copies"
    assert by_name["select"]["acts"] == by_name["schedule"]["acts"] == "growth"
    assert "heads over the blocks" in run("methods", "cluster").out
    heads = str(grown_from("heads").save_pretrained(tmp_path / "heads"))
    for command in (
        ["show", heads],
        ["expand", heads, tmp_path / "out"],
        ["finetune", heads, "--data", "signdigits", "--out", tmp_path / "out", "--limit", "20"],
    ):
        said = run(*command, "--set", "psi_epochs=10").refused()
        assert "setting psi_epochs asked" in said and "schedule, select act at growth" in said
        assert not (tmp_path / "out" / "config.json").exists()


def test_settings_of_the_tasks_say_so_and_first_labels_explains_itself(run: Call) -> None:
    rows = {row["setting"]: row["description"] for row in json.loads(run("methods", "heuristic", "--json").out)}
    told = {name for name, said in rows.items() if said.startswith("with tasks: ")}
    assert told == {
        *("classes_per_task", "epochs", "batch_size", "lr", "weight_decay"),
        *("sigma", "quantile", "flip", "crop_padding"),
    }
    assert '"with tasks" do nothing' in rows["tasks"]
    pool = {row["setting"]: row["description"] for row in json.loads(run("methods", "learngene-pool", "--json").out)}
    assert pool["first_labels"].startswith("share (a) of the labels in the first stage's loss")
