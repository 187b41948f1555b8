"""The command line: what it prints where, its exit statuses, and one line for each thing that can go wrong."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from learngene_hub import cli
from learngene_hub.learngene import Learngene
from learngene_hub.training import default_epochs

HEADER = "name\tmethod\tancestor\treach\tbytes\tlicense\torigin\tdescription"
COMMANDS = [
    "list", "show", "fit-size", "methods", "extract", "expand", "finetune", "evaluate", "export", "push", "pull",
    "verify", "hf-extension", "federate",
]  # fmt: skip
SMALL = ["--depth", "2", "--width", "32", "--num-labels", "10", "--image-size", "32"]


class Result:
    """What a call left behind."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    def refused(self) -> str:
        """The one line of a refusal."""
        lines = self.err.splitlines()
        assert (self.code, self.out, len(lines)) == (1, "", 1), (self.code, self.out, self.err)
        assert lines[0].startswith("Error: ") and "(next: " in lines[0] and "Traceback" not in self.err
        return lines[0]


Call = Callable[..., Result]


@pytest.fixture
def run() -> Call:
    """``run("list", "--json")``: the command in this process, not a terminal."""

    def call(*args: str | Path) -> Result:
        found = CliRunner().invoke(cli.app, [str(arg) for arg in args])
        return Result(found.exit_code, found.stdout, found.stderr)

    return call


@pytest.fixture
def here(pico_learngene: Learngene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder to work in whose registry names one learngene, ``pico``; the pico file lies in ``genes/``."""
    path = pico_learngene.save_pretrained(tmp_path / "genes")
    entry = {
        "name": "pico",
        "method": "lsamd",
        "uri": "genes",
        "sha256": pico_learngene.digest,
        "bytes": path.stat().st_size,
        "license": "Apache-2.0",
        "card": "genes/README.md",
        "description": "A learngene for tests.",
    }
    (tmp_path / "registry.yaml").write_text(json.dumps([entry]))  # JSON is YAML
    monkeypatch.setenv("LEARNGENE_REGISTRY", str(tmp_path / "registry.yaml"))
    monkeypatch.chdir(tmp_path)
    yield tmp_path


@pytest.mark.parametrize("command", ["", "finetune", "select", "pool add", "registry add", "federate"])
def test_help_is_plain_text(run: Call, command: str) -> None:
    """typer 0.20 escaped brackets for rich, which does not print this."""
    page = run(*command.split(), "--help").out
    assert "\\" not in page and ("[default: 0]" in page) == (command in ("finetune", "select", "pool add", "federate"))


def test_help_names_every_command_and_gives_examples(run: Call) -> None:
    shown = run("--help")
    assert shown.code == 0
    for command in COMMANDS:
        assert re.search(rf"^  {command} ", shown.out, re.M)
        page = run(command, "--help").out
        assert f"\n  learngene {command}" in page
        for option in ("--format", "--json", "--quiet", "--no-color"):
            assert option in page
    for command in ("add", "remove", "check"):
        assert f"\n  learngene registry {command}" in run("registry", command, "--help").out
    assert shown.out.count("...") == 1  # that of ARGS...: no summary is cut short


def test_no_arguments_and_wrong_usage_exit_2(run: Call) -> None:
    assert run().code == 2
    for wrong in (["nonsense"], ["show"], ["list", "--nope"], ["list", "--format", "xml"], ["list", "--json", "-q"]):
        result = run(*wrong)
        assert (result.code, result.out) == (2, ""), wrong
    assert "contradict each other" in run("list", "--json", "--format", "human").err


def test_what_comes_next_after_a_refusal(run: Call, here: Path) -> None:
    assert run("methods", "lsmd").refused().endswith("(next: learngene methods)")
    run("expand", "pico", "grown", *SMALL)
    there = run("expand", "pico", "grown", *SMALL).refused()
    assert there.endswith("(next: the same command with --yes, or with another name)")


@pytest.mark.parametrize("typed", ["lst", "pool crate", "registry chek"])
def test_a_mistyped_command_is_told_once_what_is_near(run: Call, typed: str) -> None:
    refused = run(*typed.split())
    assert refused.code == 2 and refused.err.count("Did you mean") == 1


def test_version(run: Call) -> None:
    from learngene_hub import __version__

    assert run("--version").out == f"learngene {__version__}\n"


def test_list_in_every_format(run: Call, here: Path) -> None:
    table = run("list").out.splitlines()
    assert table[0] == HEADER
    row = next(line for line in table if line.startswith("pico\t"))
    assert "lsamd\tpico\tdepth 2-6, width 32-128 step 32\t" in row and row.endswith("A learngene for tests.")
    found = {row["name"]: row for row in json.loads(run("list", "--json").out)}["pico"]
    assert found["bytes"] == (here / "genes/learngene.safetensors").stat().st_size and len(found["sha256"]) == 64
    assert "pico" in run("list", "-q").out.splitlines()
    assert run("ls", "--format", "json").out == run("list", "--json").out
    assert run("list").err == ""


def test_list_on_a_terminal_is_a_table_and_no_color_is_obeyed(here: Path) -> None:
    pytest.importorskip("pty")
    plain, colored = _on_a_terminal("list", "--no-color"), _on_a_terminal("list")
    assert "pico" in plain and "\t" not in plain
    assert "\033[3" not in plain and "\033[3" not in _on_a_terminal("list", NO_COLOR="1")
    assert "pico" in colored


def _on_a_terminal(*args: str, **environment: str) -> str:
    """What the command writes when stdout is a pseudo-terminal."""
    import pty

    leader, follower = pty.openpty()
    env = {**os.environ, "COLUMNS": "200", "TERM": "xterm-256color", **environment}
    command = [sys.executable, "-m", "learngene_hub.cli", *args]
    with subprocess.Popen(command, stdout=follower, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, env=env) as child:
        os.close(follower)
        written = b""
        try:
            while chunk := os.read(leader, 65536):
                written += chunk
        except OSError:  # Linux says so when the other end closes
            pass
        assert child.wait() == 0, child.stderr and child.stderr.read()
    os.close(leader)
    return written.decode()


def test_show_tells_the_cost_before_anything_is_grown(run: Call, here: Path) -> None:
    found = json.loads(run("show", "pico", "--depth", "5", "--width", "128", "--num-labels", "7", "--json").out)
    grown = found["descendant"]
    assert (grown["depth"], grown["width"], grown["heads"], grown["num_labels"]) == (5, 128, 4, 7)
    block = 12 * 128 * 128 + 13 * 128
    stem = 3 * 8 * 8 * 128 + 128 + 17 * 128 + 128
    assert grown["params"] == 5 * block + stem + 2 * 128 + 7 * 128 + 7
    assert grown["bytes"] == 4 * grown["params"] and grown["flops"] > 0
    half = json.loads(run("show", "pico", "--depth", "5", "--width", "128", "--dtype", "float16", "--json").out)
    assert half["descendant"]["bytes"] == 2 * half["descendant"]["params"]
    assert f"descendant.params\t{block * 3:,}"[:18] in run("show", "pico").out
    assert run("show", "pico", "-q").out.strip() == "pico"


def test_methods_and_their_settings(run: Call) -> None:
    assert "lsamd" in run("methods", "-q").out.splitlines()
    settings = {row["setting"]: row for row in json.loads(run("methods", "lsamd", "--json").out)}
    assert settings["epochs"]["type"] == "int"
    assert "known methods: " in run("methods", "lsmd").refused()


def test_expand_writes_a_folder_once(run: Call, here: Path) -> None:
    dry = run("expand", "pico", "grown", *SMALL, "--dry-run", "--json")
    assert not json.loads(dry.out)["written"] and not Path("grown").exists()
    said = json.loads(run("expand", "pico", "grown", *SMALL, "--json").out)
    assert said["written"] and said["params"] == json.loads(dry.out)["params"]
    assert {"config.json", "model.safetensors"} <= {path.name for path in Path("grown").iterdir()}
    before = Path("grown/model.safetensors").read_bytes()
    assert "--yes" in run("expand", "pico", "grown", *SMALL, "--seed", "1").refused()
    assert Path("grown/model.safetensors").read_bytes() == before
    assert run("expand", "pico", "grown", *SMALL, "--seed", "1", "--yes", "-q").out == "grown\n"
    assert Path("grown/model.safetensors").read_bytes() != before


def test_finetune_evaluate_and_resume(run: Call, here: Path) -> None:
    run("expand", "pico", "grown", *SMALL)
    train = ["finetune", "grown", "--data", "signdigits", "--limit", "48", "--batch-size", "16", "--epochs", "2"]
    done = run(*train, "--out", "trained", "--log", "steps.csv", "--json")
    assert done.code == 0, done.err
    said = json.loads(done.out)
    assert list(said["epochs"]) == ["0", "1", "2"] and 0 <= said["epochs"]["2"]["accuracy"] <= 100
    assert len(Path("steps.csv").read_text().splitlines()) == 1 + 2 * 3
    assert not list(Path("trained").glob("training*")) and (Path("trained") / "config.json").is_file()
    found = json.loads(run("evaluate", "trained", "--data", "signdigits", "--limit", "48", "--json").out)
    assert found["accuracy"] == said["epochs"]["2"]["accuracy"] and found["images"] == 48
    assert "--yes" in run(*train, "--out", "trained").refused()
    assert run(*train, "--out", "trained", "--yes").code == 0


def test_an_interrupted_finetune_resumes_to_the_same_weights(
    run: Call, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("expand", "pico", "grown", *SMALL)
    train = ["finetune", "grown", "--data", "signdigits", "--limit", "32", "--batch-size", "16", "--epochs", "2"]
    assert run(*train, "--out", "straight").code == 0
    from learngene_hub import factory

    plain, asked = factory.evaluate, []

    def interrupt(*args: Any, **given: Any) -> Any:
        asked.append(1)
        if len(asked) == 2:  # the first is before training
            raise KeyboardInterrupt
        return plain(*args, **given)

    with monkeypatch.context() as patch:
        patch.setattr(factory, "evaluate", interrupt)
        stopped = run(*train, "--out", "stopped")
    assert stopped.code == 130 and "--resume" in stopped.err and not Path("stopped/config.json").exists()
    assert run(*train, "--out", "stopped", "--resume").code == 0
    assert Path("stopped/model.safetensors").read_bytes() == Path("straight/model.safetensors").read_bytes()


def test_what_python_would_warn_of_is_a_line(run: Call, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("learngene_hub._fit.has_bf16", lambda: False)
    sizes = ["--depth", "2", "--width", "32", "--size", "32", "--limit", "16", "--epochs", "1"]
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        done = run(
            "finetune", "pico", *sizes, "--data", "signdigits", "--precision", "bf16", "--out", "t", "--format", "human"
        )
    assert done.code == 0, done.err
    assert "warning: precision 'bf16' asked on a CPU without instructions for it" in done.err
    assert "UserWarning" not in done.err


def test_finetune_grows_a_learngene_that_is_named(run: Call, here: Path) -> None:
    """And makes more passes over few images than over many, where none are asked."""
    sizes = ["--depth", "2", "--width", "32", "--size", "32"]
    done = run("finetune", "pico", *sizes, "--data", "signdigits", "--limit", "32", "--out", "t", "--json")
    assert done.code == 0, done.err
    assert json.loads(Path("t/config.json").read_text())["num_classes"] == 10
    assert list(json.loads(done.out)["epochs"]) == [str(epoch) for epoch in range(11)]
    assert [default_epochs(images) for images in (1, 999, 1000, 50_000)] == [10, 10, 3, 3]


def test_verify_names_the_file_that_is_wrong(run: Call, here: Path) -> None:
    good = json.loads(run("verify", "pico", "genes", "--json").out)
    assert [row["ok"] for row in good] == [True, True]
    file = here / "genes" / "learngene.safetensors"
    whole = bytearray(file.read_bytes())
    whole[-3] ^= 1
    file.write_bytes(whole)
    bad = run("verify", "pico")
    assert bad.code == 1 and "learngene.safetensors" in bad.err and len(bad.err.splitlines()) == 1
    assert bad.out.splitlines()[1].startswith("pico\tno\t")


def test_extract_writes_what_show_reads(run: Call, here: Path) -> None:
    assert run("expand", "pico", "ancestor", *SMALL).code == 0
    from learngene_hub.data import load_images  # two data sets of one kind: a parquet file under another name

    folder = Path(load_images.__globals__["__file__"]).parent / "samples" / "signdigits"
    Path("other.parquet").write_bytes((folder / "test.parquet").read_bytes())
    Path("settings.yaml").write_text("epochs: 1\nlr: 1e-4\nbatch_size: 8\n")
    data = ["--data", "signdigits", "--data", "other.parquet", "--size", "32", "--limit", "24"]
    options = [
        *data,
        "--config",
        "settings.yaml",
        "--set",
        "keep=2",
        "--out",
        "mine",
        "--ancestor-license",
        "Apache-2.0",
    ]
    made = run("extract", "lsamd", "ancestor", *options, "--json")
    assert made.code == 0, made.err
    shown = json.loads(run("show", "mine", "--json").out)
    assert shown["sha256"] == json.loads(made.out)["sha256"] and shown["license"] == "Apache-2.0"
    kept = Learngene.load("mine/learngene.safetensors")
    assert (kept.settings["lr"], kept.settings["keep"], kept.settings["epochs"]) == (1e-4, 2, 1)
    assert "--yes" in run("extract", "lsamd", "ancestor", *options).refused()


def test_extract_adds_the_width_stage_and_stores_half(run: Call, here: Path) -> None:
    import torch

    assert run("expand", "pico", "ancestor", *SMALL, "--width", "64").code == 0  # of one option, the last counts
    sample = Path(cli.__file__).parent / "samples" / "signdigits" / "test.parquet"
    Path("other.parquet").write_bytes(sample.read_bytes())
    train = [*WIDEN, "--set", "epochs=1", "--set", "batch_size=8"]
    plain = run(*train, "--out", "plain", "--json")
    made = run(*train, "--out", "wide.safetensors", *STAGE, "--dtype", "float16", "--json")
    assert (plain.code, made.code) == (0, 0), (plain.err, made.err)
    wide, narrow = Learngene.load("wide.safetensors"), Learngene.load("plain/learngene.safetensors")
    assert {tensor.dtype for tensor in wide.tensors.values()} == {torch.float16}
    assert {name: tuple(tensor.shape) for name, tensor in wide.group("width").items()} == {
        **{"stream": (64,), "heads": (2, 2), "hidden": (2, 256), "rows": (32, 64)},
        **{f"{kind}.{width}": (5, width) for kind in ("gain", "bias") for width in (32, 96)},
    }
    assert not narrow.group("width")
    assert all(torch.equal(wide.tensors[name], tensor.half()) for name, tensor in narrow.tensors.items())
    record = wide.provenance["width"]["settings"]
    assert (record["widths"], record["rows"], record["lr"]) == ([32, 96], 32, 0.01)
    said = json.loads(made.out)
    assert said["sha256"] == wide.digest and said["bytes"] == Path("wide.safetensors").stat().st_size
    assert run("expand", "wide.safetensors", "grown", *SMALL).code == 0


WIDEN = ["extract", "lsamd", "ancestor", "--data", "signdigits", "--data", "other.parquet", "--size", "32"]
WIDEN += ["--limit", "16"]
STAGE = [f"--widen={pair}" for pair in ("widths=[32,96]", "rows=32", "steps_per_epoch=2", "batch_size=8", "lr=1e-2")]


@pytest.mark.parametrize("pair", ["widths=[33]", "lr=-1"])
def test_a_wrong_width_stage_is_refused_before_the_extraction(
    run: Call, here: Path, monkeypatch: pytest.MonkeyPatch, pair: str
) -> None:
    from learngene_hub import factory

    def hours(*_: object, **__: object) -> None:
        raise SystemExit(77)

    run("expand", "pico", "ancestor", *SMALL, "--width", "64")
    monkeypatch.setattr(factory, "extract", hours)
    result = run("extract", "lsamd", "ancestor", "--data", "signdigits", "--size", "32", "--out", "x", "--widen", pair)
    assert result.code == 1 and pair.split("=")[0].rstrip("s") in result.refused()


REFUSALS = {  # what was typed -> what the line must say
    "show pik": "did you mean 'pico'",
    "show pico --width 65": "64 or 96",
    "show pico --width 0": "width 0 asked",
    "show pico --depth -1": "depth",
    "show pico --depth 99": "6",
    "show pico --width 512": "128",
    "show pico --width 64 --heads 3": "2 heads would work",
    "show pico --num-labels 0": "num_labels 0 asked",
    "show pico --image-size 33": "32 or 40",
    "show pico --dtype int8": "float32, float16, bfloat16",
    "show nowhere/learngene.safetensors": "no file or folder",
    "expand pico grown --depth 4 --max-params 1000": "parameters",
    "expand pik grown": "did you mean 'pico'",
    "extract lsmd genes --data signdigits --out x": "did you mean 'lsamd'",
    "extract lsamd genes --data signdigits --out x --set epochs": "KEY=VALUE",
    "extract lsamd genes --data signdigits --out x --set epoch=3": "epoch",
    "extract lsamd genes --data signdigits --out x --widen width=64": "unknown keys width given; the known ones are",
    "extract lsamd genes --data signdigits --out x --widen rows=-1": "rows -1 asked",
    "extract lsamd genes --data signdigits --out x --widen rows": "KEY=VALUE",
    "extract lsamd genes --data signdigits --out x --dtype int8": "float32, float16, bfloat16",
    "extract lsamd genes --data signdigits --out x --config no.yaml": "no.yaml",
    "extract lsamd genes --data signdigits --out x --config list.yaml": "a mapping of settings would work",
    "finetune grown --data signdigits --out x --epochs 0": "epochs",
    "finetune grown --data signdigits --out x --lr nan": "lr",
    "finetune pico --data signdigits --out x --test-split val --size 32": "test",
    "finetune pico --data empty --out x": "empty",
    "finetune pico --data broken --out x --size 32": "0.png",
    "finetune pico --data nothing-here --out x": "nothing-here",
    "evaluate genes --data signdigits": "not a saved descendant",
    "verify renamed.safetensors": "renamed.safetensors",
}


@pytest.mark.parametrize("typed", REFUSALS)
def test_one_line_for_each_refusal(run: Call, here: Path, typed: str) -> None:
    for name in ("empty/train", "broken/train/a", "broken/test/a"):
        Path(name).mkdir(parents=True)
    for split in ("train", "test"):
        Path(f"broken/{split}/a/0.png").write_bytes(b"not an image")
    Path("list.yaml").write_text("[1, 2]")
    Path("renamed.safetensors").write_bytes(b"\x80\x04pickled, not safetensors")
    result = run(*typed.split())
    if typed.startswith("verify"):  # verify also prints its table
        assert result.code == 1 and REFUSALS[typed] in result.err and len(result.err.splitlines()) == 1
    else:
        assert REFUSALS[typed] in result.refused(), result.err
    assert not Path("x").exists() and not Path("grown").exists()


def test_labels_that_the_model_does_not_have(run: Call, here: Path) -> None:
    run("expand", "pico", "grown", "--depth", "2", "--width", "32", "--num-labels", "3", "--image-size", "32")
    refused = run("finetune", "grown", "--data", "signdigits", "--limit", "32", "--out", "x").refused()
    assert "--num-labels 10 would work" in refused
    assert "num_labels=10" in run("evaluate", "grown", "--data", "signdigits", "--limit", "32").refused()


def test_no_space_left_is_one_line(run: Call, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from learngene_hub.descendant import Descendant

    def full(self: Descendant, folder: Path) -> None:
        raise OSError(28, "No space left on device", str(folder))

    monkeypatch.setattr(Descendant, "save_pretrained", full)
    assert "No space left on device" in run("expand", "pico", "grown", *SMALL).refused()


def test_progress_bars_of_libraries_stay_away_where_nobody_watches(here: Path) -> None:
    env = {name: value for name, value in os.environ.items() if name != "HF_HUB_DISABLE_PROGRESS_BARS"}
    code = "from learngene_hub import cli; import sys; cli.app(sys.argv[1:])"
    for args in (
        ["expand", "pico", "grown", *SMALL],
        ["evaluate", "grown", "--data", "signdigits", "--limit", "8", "-q"],
    ):
        shown = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, env=env, check=True)
        assert "%" not in shown.stderr and len(shown.stderr.splitlines()) <= 1


def test_debug_shows_the_traceback() -> None:
    env = {**os.environ, "LEARNGENE_DEBUG": "1"}
    command = [sys.executable, "-m", "learngene_hub.cli", "methods", "lsmd"]
    shown = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tempfile.gettempdir())
    assert shown.returncode == 1 and "Traceback" in shown.stderr and "SettingsError" in shown.stderr


def test_help_and_list_import_nothing_heavy(here: Path) -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from learngene_hub import cli\n"
        "assert CliRunner().invoke(cli.app, sys.argv[1:]).exit_code == 0\n"
        "print(*[m for m in ('torch', 'timm', 'transformers', 'huggingface_hub', 'pyarrow') if m in sys.modules])"
    )
    for args in (["--help"], ["list"], ["finetune", "--help"]):
        shown = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, check=True)
        assert shown.stdout.strip() == "", args


def test_shell_completion_is_on(run: Call) -> None:
    assert "--install-completion" in run("--help").out
