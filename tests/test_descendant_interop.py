"""A descendant among its neighbours: plain timm and plain transformers without learngene_hub, Trainer, pipeline."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import build_pico
from PIL import Image
from planted import planted, variant
from torch import nn

from learngene_hub.descendant import Descendant, wrap
from learngene_hub.shape import IMAGENET, ViTShape

ANIMALS = {0: "cat", 1: "dog", 2: "fox"}
TINY = ViTShape(depth=2, width=64, heads=2, patch=8, image_size=32, classes=3)

STRANGER = """
import json, sys
sys.modules["learngene_hub"] = None  # as where it is not installed
try:
    import learngene_hub
except ImportError:
    pass
else:
    raise SystemExit("learngene_hub can be imported")
import timm, torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

torch.set_grad_enabled(False)
found = {}
for folder in sys.argv[2:]:
    pixels = torch.load(folder + ".pixels", weights_only=True)
    hugging = AutoModelForImageClassification.from_pretrained(folder)
    plain = timm.create_model("local-dir:" + folder, pretrained=True).eval()
    processor = AutoImageProcessor.from_pretrained(folder)
    picture = Image.linear_gradient("L").convert({1: "L", 3: "RGB", 4: "RGBA"}[pixels.shape[1]])
    found[folder] = {
        "transformers": hugging(pixel_values=pixels).logits,
        "timm": plain.to(pixels.dtype)(pixels),
        "processed": processor(picture, return_tensors="pt")["pixel_values"],
        "kind": type(hugging).__name__,
        "dtype": str(hugging.dtype),
        "labels": json.dumps(hugging.config.id2label),
        "timm_labels": list(plain.pretrained_cfg["label_names"]),
        "answers": [],
    }
    if pixels.shape[1] == 3:
        found[folder]["answers"] = pipeline("image-classification", model=folder, device="cpu")(picture)
torch.save(found, sys.argv[1])
"""


def images(shape: ViTShape, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, shape.in_chans, shape.image_size, shape.image_size, generator=generator).to(dtype)


SAVED: dict[str, dict[str, Any]] = {  # what from_learngene is asked for
    "native": {},
    "wider": {"depth": 5, "width": 128},
    "larger": {"image_size": 64, "drop_path_rate": 0.2},
    "grey": {"in_chans": 1},
    "four": {"in_chans": 4},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
    "avg": {},
    "odd": {},
}


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Descendant, torch.Tensor]]:
    """Name -> its saved folder, itself, and its input."""
    root = tmp_path_factory.mktemp("grown")
    found = {}
    for name, asked in SAVED.items():
        gene = root / f"{name}.safetensors"
        planted(build_pico(variant(name if name in ("avg", "odd") else "token"))).save(gene)
        model = Descendant.from_learngene(gene, id2label=ANIMALS, **asked)
        model.save_pretrained(root / name)
        pixels = images(ViTShape.of(model.timm_model), model.dtype)
        torch.save(pixels, root / f"{name}.pixels")
        found[name] = (root / name, model, pixels)
    return found


@pytest.fixture(scope="module")
def elsewhere(grown: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What a process that cannot import learngene_hub makes of every folder, by name."""
    home = tmp_path_factory.mktemp("elsewhere")
    folders = [str(folder) for folder, _, _ in grown.values()]
    command = [sys.executable, "-I", "-c", STRANGER, str(home / "found.pt"), *folders]
    done = subprocess.run(command, cwd=home, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = torch.load(home / "found.pt", weights_only=True)
    return {name: found[str(folder)] for name, (folder, _, _) in grown.items()}


@pytest.mark.parametrize("name", SAVED)
def test_logits_are_equal_without_learngene_hub(name: str, grown: dict[str, Any], elsewhere: dict[str, Any]) -> None:
    _, model, pixels = grown[name]
    with torch.no_grad():
        expected = model(pixel_values=pixels).logits
    assert elsewhere[name]["kind"] == "TimmWrapperForImageClassification"
    assert elsewhere[name]["dtype"] == str(model.dtype)
    assert torch.equal(elsewhere[name]["transformers"], expected)
    assert torch.equal(elsewhere[name]["timm"], expected)


@pytest.mark.parametrize("name", SAVED)
def test_the_processor_makes_what_the_model_takes(name: str, grown: dict[str, Any], elsewhere: dict[str, Any]) -> None:
    _, model, pixels = grown[name]
    assert elsewhere[name]["processed"].shape == (1, *pixels.shape[1:])
    picture = Image.linear_gradient("L").convert({1: "L", 3: "RGB", 4: "RGBA"}[pixels.shape[1]])
    ours = model.image_processor()(picture, return_tensors="pt")["pixel_values"]
    assert torch.equal(ours, elsewhere[name]["processed"])


def test_label_names_are_known_without_learngene_hub(elsewhere: dict[str, Any]) -> None:
    for found in elsewhere.values():
        assert json.loads(found["labels"]) == {str(number): name for number, name in ANIMALS.items()}
        assert found["timm_labels"] == list(ANIMALS.values())


def test_pipeline_from_the_folder_and_from_the_object_agree(grown: dict[str, Any], elsewhere: dict[str, Any]) -> None:
    from transformers import pipeline

    folder, model, _ = grown["native"]
    picture = Image.linear_gradient("L").convert("RGB")
    ours = pipeline("image-classification", model=model, image_processor=model.image_processor(), device="cpu")
    answers = ours(picture)
    assert {answer["label"] for answer in answers} == set(ANIMALS.values())
    assert answers == elsewhere["native"]["answers"]
    assert pipeline("image-classification", model=str(folder), device="cpu")(picture) == answers


def test_pipeline_knows_the_class(grown: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    from transformers import pipeline

    _, model, _ = grown["native"]
    caplog.set_level("ERROR")
    pipeline("image-classification", model=model, image_processor=model.image_processor(), device="cpu")
    assert "is not supported" not in caplog.text


def test_auto_classes_stay_as_they_were(grown: dict[str, Any]) -> None:
    from transformers import AutoModelForImageClassification

    folder, _, _ = grown["native"]
    assert type(AutoModelForImageClassification.from_pretrained(folder)).__name__ == "TimmWrapperForImageClassification"


def test_transformers_keeps_the_record_when_it_saves_again(grown: dict[str, Any], tmp_path: Path) -> None:
    from transformers import AutoModelForImageClassification

    folder, model, pixels = grown["wider"]
    AutoModelForImageClassification.from_pretrained(folder).save_pretrained(tmp_path)
    again = Descendant.from_pretrained(tmp_path)
    assert again.config.learngene == model.config.learngene
    with torch.no_grad():
        assert torch.equal(again(pixel_values=pixels).logits, model(pixel_values=pixels).logits)


class Pictures(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Eight fixed images with labels."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.pixels = torch.randn(8, 3, 32, 32, generator=generator)
        self.labels = torch.arange(8) % 3

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.pixels[i], "labels": self.labels[i]}


def tiny() -> Descendant:
    return wrap(build_pico(TINY), preprocessing=IMAGENET, id2label=ANIMALS)


def trainer(model: Descendant, folder: Path, **more: Any) -> Any:
    from torch.utils.data import SequentialSampler
    from transformers import Trainer, TrainingArguments

    class InOrder(Trainer):
        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
            return SequentialSampler(self.train_dataset)

    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=0.0,
        optim="adamw_torch",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=1,
        **more,
    )
    return InOrder(model=model, args=arguments, train_dataset=Pictures(), eval_dataset=Pictures())


def test_trainer_takes_the_steps_of_a_hand_written_loop(tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        model = tiny()
        run = trainer(model, tmp_path, max_steps=2, save_strategy="no")
        run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]

    twin, data = build_pico(TINY).train(), Pictures()
    optimiser, expected = torch.optim.AdamW(twin.parameters(), lr=1e-3, weight_decay=0.0), []
    for batch in (slice(0, 4), slice(4, 8)):
        loss = nn.functional.cross_entropy(twin(data.pixels[batch]), data.labels[batch])
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        expected.append(loss.item())
    assert losses == pytest.approx(expected, abs=1e-4)
    assert expected[0] != expected[1]
    for name, tensor in twin.state_dict().items():
        assert torch.allclose(model.timm_model.state_dict()[name], tensor, atol=1e-6), name
    assert not torch.equal(model.timm_model.head.weight, build_pico(TINY).head.weight)


def test_trainer_saves_the_same_layout_resumes_and_evaluates(tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        straight = tiny()
        trainer(straight, tmp_path / "straight", max_steps=4, save_strategy="no").train()
        first = trainer(tiny(), tmp_path / "run", max_steps=2, save_steps=2)
        first.train()
        resumed = tiny()
        run = trainer(resumed, tmp_path / "run", max_steps=4, save_strategy="no")
        run.train(resume_from_checkpoint=True)
    for name, tensor in straight.state_dict().items():
        assert torch.allclose(resumed.state_dict()[name], tensor, atol=1e-6), name
    assert np.isfinite(run.evaluate()["eval_loss"])
    saved = Descendant.from_pretrained(tmp_path / "run" / "checkpoint-2")
    assert all(torch.equal(saved.state_dict()[name], tensor) for name, tensor in first.model.state_dict().items())
    assert saved.config.id2label == ANIMALS


@pytest.mark.filterwarnings("ignore:.*Use `activation_checkpointing:FutureWarning")
def test_trainer_with_gradient_checkpointing(tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        plain, kept = tiny(), tiny()
        trainer(plain, tmp_path, max_steps=1, save_strategy="no").train()
        trainer(kept, tmp_path, max_steps=1, save_strategy="no", gradient_checkpointing=True).train()
    assert kept.timm_model.grad_checkpointing
    assert all(torch.equal(kept.state_dict()[name], tensor) for name, tensor in plain.state_dict().items())


def test_average_pooling_and_other_channels_wrap_too() -> None:
    for shape in (replace(TINY, class_token=False, pool="avg"), replace(TINY, in_chans=4)):
        model = wrap(build_pico(shape), preprocessing=IMAGENET)
        assert model.image_processor().data_config["input_size"] == (shape.in_chans, 32, 32)
