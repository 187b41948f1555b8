"""Exported descendants: onnxruntime and torch.export give the model's logits, and a bad file is never left behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from conftest import build_pico
from kinds import SHAPES, model_of
from planted import variant
from torch import Tensor, nn
from typer.testing import CliRunner

from learngene_hub import cli, exporting
from learngene_hub.descendant import Descendant, wrap
from learngene_hub.errors import ExportError, SettingsError, StoreError
from learngene_hub.exporting import export
from learngene_hub.shape import IMAGENET, ViTShape

PLAIN: dict[str, ViTShape] = {
    "64 px": ViTShape(depth=2, width=64, heads=2, patch=16, image_size=64, classes=10),
    "224 px": ViTShape(depth=1, width=96, heads=3, patch=32, image_size=224, classes=5),
    "average, grey": variant("avg", in_chans=1),  # no class token, as descendants of tleg, sws and lets
}
TINY = ViTShape(depth=1, width=32, heads=1, patch=16, image_size=32, classes=3)
TOLERANCE = 1e-5  # of the largest logit, or of 1


def descendant(shape: ViTShape, **more: Any) -> Descendant:
    return wrap(build_pico(shape), shape=shape, preprocessing=IMAGENET, **more)


def of_file(path: Path) -> Callable[[Tensor], Tensor]:
    """The logits of a file, as a reader without learngene_hub gets them."""
    if path.suffix == ".pt2":
        return torch.export.load(path).module()
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda pixels: torch.from_numpy(session.run(["logits"], {"pixel_values": pixels.numpy()})[0])


def difference(path: Path, model: nn.Module, side: int, channels: int = 3) -> float:
    """The largest one, relative to the largest logit or 1, of batches of 1, 2 and 5."""
    run, worst = of_file(path), 0.0
    for count in (1, 2, 5):
        pixels = torch.randn(count, channels, side, side, generator=torch.Generator().manual_seed(9))
        with torch.no_grad():
            wanted, found = model(pixels), run(pixels)
        assert found.shape == wanted.shape and found.dtype == wanted.dtype
        worst = max(worst, ((found - wanted).abs().max() / wanted.abs().max().clamp(min=1)).item())
    return worst


@pytest.mark.parametrize("suffix", ["onnx", "pt2"])
@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_descendant_gives_the_same_logits(name: str, suffix: str, tmp_path: Path) -> None:
    shape = PLAIN[name]
    model = descendant(shape)
    found = export(model, tmp_path / f"model.{suffix}")
    assert (found.format, found.opset, found.dtype) == (suffix, 20 if suffix == "onnx" else None, "float32")
    assert found.difference <= TOLERANCE
    assert difference(found.path, model.timm_model, shape.image_size, shape.in_chans) <= TOLERANCE
    assert [path.name for path in tmp_path.iterdir()] == [f"model.{suffix}"]


@pytest.mark.parametrize("suffix", ["onnx", "pt2"])
@pytest.mark.parametrize("kind", [kind for kind in SHAPES if kind != "vit"])
def test_the_other_kinds_give_the_same_logits(kind: str, suffix: str, tmp_path: Path) -> None:
    model = model_of(kind) if kind in ("resnet", "vgg") else build_pico(SHAPES[kind])
    found = export(wrap(model, preprocessing=IMAGENET), tmp_path / f"model.{suffix}")
    assert difference(found.path, model, 32) <= TOLERANCE


def test_both_files_say_what_the_model_is_and_nothing_of_this_machine(tmp_path: Path) -> None:
    labels = {0: "cat", 1: "dog", 2: "fox"}
    model = descendant(TINY, id2label=labels, provenance={"name": "pico", "license": "Apache-2.0"})
    paths = [export(model, tmp_path / f"model.{suffix}").path for suffix in ("onnx", "pt2")]
    session = onnxruntime.InferenceSession(paths[0])
    extra = {"descendant": ""}
    torch.export.load(paths[1], extra_files=extra)
    for told in (session.get_modelmeta().custom_metadata_map["descendant"], extra["descendant"]):
        facts = json.loads(told)
        assert facts.pop("label_names") == ["cat", "dog", "fox"]
        assert facts.pop("learngene") == {"name": "pico", "license": "Apache-2.0"}
        assert facts == {"image_size": 32, "in_chans": 3, **IMAGENET.to_dict()}
    assert [each.name for each in session.get_inputs()] == ["pixel_values"]
    assert session.get_inputs()[0].shape == ["batch", 3, 32, 32] and session.get_outputs()[0].shape == ["batch", 3]
    here = [str(tmp_path), str(Path(exporting.__file__).parents[1]), "site-packages"]
    assert not [word for word in here for path in paths if word.encode() in path.read_bytes()]


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    model = descendant(TINY).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    export(model, tmp_path / "model.pt2", dtype="float16")
    assert model.training and model.dtype == torch.float32
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(("suffix", "dtype", "opset"), [("onnx", torch.float16, 18), ("pt2", "bfloat16", None)])
def test_half_precision(suffix: str, dtype: torch.dtype | str, opset: int | None, tmp_path: Path) -> None:
    found = export(descendant(TINY), tmp_path / f"half.{suffix}", dtype=dtype, opset=opset)
    assert found.opset == opset
    assert found.difference <= 2e-3 and found.dtype == str(dtype).removeprefix("torch.")
    assert of_file(found.path)(torch.zeros(1, 3, 32, 32).to(getattr(torch, found.dtype))).shape == (1, 3)


def test_the_newest_opset(tmp_path: Path) -> None:
    newest = exporting.OPSETS[-1]
    found = export(descendant(TINY), tmp_path / "model.onnx", opset=newest)
    assert found.opset == newest and found.difference <= TOLERANCE
    assert {each.version for each in onnx.load(found.path).opset_import if not each.domain} == {newest}


def test_a_compiled_model_is_exported_as_what_was_compiled(tmp_path: Path) -> None:
    model = descendant(TINY)
    plain = model.timm_model
    model.timm_model = torch.compile(plain)  # pyright: ignore[reportAttributeAccessIssue]
    found = export(model, tmp_path / "model.pt2")
    assert difference(found.path, plain, 32) == 0.0


def test_other_logits_are_an_error_and_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    traced, wrong = exporting._traced, build_pico(TINY, seed=1)
    monkeypatch.setattr(
        exporting,
        "_traced",
        lambda network: traced(exporting._Logits(wrap(wrong, preprocessing=IMAGENET), network.dtype)),
    )
    (tmp_path / "model.pt2").write_bytes(b"an older file")
    with pytest.raises(ExportError, match="logits differ by .* from the model's, 0.0001 is allowed"):
        export(descendant(TINY), tmp_path / "model.pt2")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"an older file"]


def test_logits_that_are_no_numbers_are_an_error(tmp_path: Path) -> None:
    model = descendant(TINY)
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(ExportError, match="differ by nan"):
        export(model, tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())


def test_a_file_that_onnxruntime_cannot_read_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no model")
    with pytest.raises(ExportError, match="onnxruntime .* cannot read the file"):
        exporting._onnx_run(tmp_path / "model.onnx")


@pytest.mark.parametrize(
    ("name", "asked", "line"),
    [
        ("model.bin", {}, "the suffix says the format: .onnx or .pt2 would work"),
        ("model.onnx", {"opset": 17}, "opset 17 asked; 18 to 23 would work"),
        ("model.pt2", {"opset": 20}, "a .pt2 file has none"),
        ("model.onnx", {"dtype": "bfloat16"}, "dtype float32, or .pt2, would work"),
        ("model.pt2", {"dtype": "int8"}, "dtype int8 asked; there are float32, float16, bfloat16"),
    ],
)
def test_what_cannot_be_written_is_refused(name: str, asked: dict[str, Any], line: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=line):
        export(descendant(TINY), tmp_path / name, **asked)
    assert not list(tmp_path.iterdir())


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = descendant(TINY)
    with monkeypatch.context() as patch:
        patch.setattr(exporting, "find_spec", lambda name: None if name == "onnxscript" else name)
        with pytest.raises(SettingsError, match=r"onnxscript is not .* pip install 'learngene-hub\[export\]'"):
            export(model, tmp_path / "model.onnx")
    monkeypatch.setattr(exporting, "ONNX_BYTES", 1000)
    with pytest.raises(SettingsError, match="one file takes 1,000: .pt2, or float16, would work"):
        export(model, tmp_path / "model.onnx")
    with pytest.raises(StoreError, match="No such file or directory"):
        export(model, tmp_path / "missing" / "model.pt2")
    (tmp_path / "model.pt2").mkdir()
    with pytest.raises(StoreError, match="model.pt2 could not be written"):
        export(model, tmp_path / "model.pt2")
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt2"]


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*args: str) -> Any:
        return CliRunner().invoke(cli.app, ["export", *args])

    monkeypatch.chdir(tmp_path)
    descendant(TINY).save_pretrained("grown")
    done = run("grown", "model.onnx", "--json")
    told = json.loads(done.stdout)
    assert done.exit_code == 0 and told["difference"] <= TOLERANCE and told["opset"] == 20, done.stderr
    assert told["bytes"] == Path("model.onnx").stat().st_size and told["format"] == "onnx"
    there = run("grown", "model.onnx")
    assert there.exit_code == 1 and "--yes writes over it" in there.stderr
    assert run("grown", "model.pt2", "--dtype", "float16", "-q").stdout == "model.pt2\n"
    again = run("grown", "model.pt2", "--yes", "--json")
    assert again.exit_code == 0 and json.loads(again.stdout)["dtype"] == "float32"
    nothing = run("nothing", "other.onnx")
    assert nothing.exit_code == 1 and "nothing is not a saved descendant" in nothing.stderr
    assert len(nothing.stderr.splitlines()) == 1 and not Path("other.onnx").exists()
