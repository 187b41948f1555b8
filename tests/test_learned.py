"""The comparison of the learned methods: what its rows say, and the whole of it once on a few images."""

from __future__ import annotations

import json
import math
import shutil
import sys
from importlib import resources
from pathlib import Path

import pytest
import timm
import torch
import yaml
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))  # scripts, not a package

import _learned_summary as told  # noqa: E402
import _runs  # noqa: E402
import learned  # noqa: E402
from learned import EPOCHS, Job, Row, Sources  # noqa: E402

from learngene_hub import Learngene  # noqa: E402

NAN = math.nan


def row(arm: str, seed: int, accuracies: list[float], shape: str = "2x64") -> Row:
    reached = {f"epoch_{epoch}": value for epoch, value in zip(EPOCHS, map(float, accuracies), strict=True)}
    return Row(
        arm=arm, shape=shape, seed=seed, **reached, params=10, flops=1_000_000_000_000, stored_bytes=3_000_000,
        extraction_images=50, extraction_flops=200_000_000_000_000, extraction_seconds=1.5 * seed, seconds=1.0,
        digest="d", machine="m",
    )  # fmt: skip


ROWS = [
    row("ldr", 1, [1, 10, 14, 20, NAN, NAN]),
    row("ldr", 2, [1, 12, 16, 24, NAN, NAN]),
    row("net2net", 1, [1, 9, 15, 21, NAN, NAN]),
    row("net2net", 2, [1, 9, 15, 19, NAN, NAN]),
    row("random", 1, [1, 2, 4, 8, 14, 21]),
    row("random", 2, [1, 2, 6, 12, 16, 23]),
]


def test_paired_differences_by_hand() -> None:
    # After 5 epochs: 20 - 21 = -1 and 24 - 19 = 5: mean 2, deviation sqrt(18), over sqrt(2): 3.
    assert told.difference(ROWS, "ldr", "net2net", 5) == {"mean": 2.0, "se": 3.0, "n": 2, "won": 1}
    assert told.difference(ROWS, "ldr", "net2net", 1) == {"mean": 2.0, "se": 1.0, "n": 2, "won": 2}
    assert told.difference(ROWS, "ldr", "front", 1) == {"n": 0}


def test_scratch_catches_up_where_its_mean_reaches_that_of_the_arm() -> None:
    # ldr: 11 after 1 epoch, 15 after 2, 22 after 5; scratch: 2, 5, 10, 15, 22 after 1, 2, 5, 10, 20.
    assert told.caught_up(ROWS, "ldr", "2x64", 1) == 10
    assert told.caught_up(ROWS, "ldr", "2x64", 2) == 10
    assert told.caught_up(ROWS, "ldr", "2x64", 5) == 20
    assert told.caught_up([row for row in ROWS if row.seed == 1], "ldr", "2x64", 5) == 20
    assert told.caught_up([*ROWS[:2], *ROWS[4:], row("ldr", 3, [1, 2, 3, 90, NAN, NAN])], "ldr", "2x64", 5) is None


def test_compute_by_hand() -> None:
    # 3 x 2e14 of the extraction; 3 x 5 epochs x 100 images x 1e12 of the one shape.
    found = told.compute(ROWS, "ldr", 100)
    assert found["extraction_petaflops"] == 0.6 and found["tuning_petaflops"] == 1.5
    assert found["stored_megabytes"] == 3.0 and found["extraction_seconds"] == 2.2  # (1.5 + 3) / 2, to even
    assert told.compute(ROWS, "random", 100)["tuning_epochs"] == 20


def test_of_two_rows_of_a_cell_the_last_counts_and_rows_survive_the_file(tmp_path: Path) -> None:
    again = row("ldr", 1, [1, 11, 15, 21, NAN, NAN])
    assert told.newest([*ROWS, again])[0] == again
    for each in ROWS:
        _runs.append_row(tmp_path / "rows.csv", each)
    back = _runs.read_rows(tmp_path / "rows.csv", Row)
    assert [repr(each) for each in back] == [repr(each) for each in ROWS]  # nan is not equal to itself


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    """Hand signs under the name of the data set, a random DeiT-Tiny, and settings of a few seconds."""
    root = tmp_path_factory.mktemp("learned")
    shutil.copytree(Path(str(resources.files("learngene_hub"))) / "samples" / "signdigits", root / "cifar100")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model("deit_tiny_patch16_224")
    save_file({name: tensor.half() for name, tensor in model.state_dict().items()}, root / "ancestor.safetensors")
    config = yaml.safe_load((Path(learned.__file__).with_name("learned.yaml")).read_text())
    config["ancestor"] |= {"images": 64, "test": 32, "epochs": 1}
    config["extraction"]["images"] = 64
    config["tuning"] |= {"images": 64, "test": 32, "epochs": [1], "random_epochs": [1, 2]}
    config |= {"shapes": ["1x64", "2x128"], "seeds": [1]}
    config["arms"] = {name: config["arms"][name] for name in ("tleg", "net2net", "random")}
    config["arms"]["tleg"]["settings"] |= {"epochs": 1, "batch_size": 32, "teacher_size": 64}
    (root / "settings.yaml").write_text(yaml.safe_dump(config))
    return Sources(data=root, ancestor=root / "ancestor.safetensors", work=root / "work", config=root / "settings.yaml")


@pytest.mark.slow
def test_all_stages_once_and_a_second_call_does_nothing_more(
    sources: Sources, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "learned.csv"
    command = ["--data", str(sources.data), "--ancestor", str(sources.ancestor), "--work", str(sources.work)]
    command += ["--config", str(sources.config), "--out", str(out), "--workers", "1"]
    assert learned.main(command) == 0
    rows = _runs.read_rows(out, Row)
    assert {each.job for each in rows} == {
        Job(arm=arm, shape=shape, seed=1) for arm in ("tleg", "net2net", "random") for shape in ("1x64", "2x128")
    }
    by_arm = {each.arm: each for each in rows if each.shape == "1x64"}
    by_arm_wide = next(each for each in rows if (each.arm, each.shape) == ("tleg", "2x128"))
    tleg = Learngene.load(sources.stored("tleg", 1))
    assert by_arm["tleg"].digest == tleg.digest and by_arm["tleg"].stored_bytes == 2 * tleg.params
    assert by_arm["tleg"].extraction_images == 64 and by_arm["net2net"].extraction_images == 0
    assert math.isnan(by_arm["tleg"].epoch_2) and not math.isnan(by_arm["random"].epoch_2)
    capfd.readouterr()
    assert learned.main(command) == 0
    assert len(_runs.read_rows(out, Row)) == 6 and "1/" not in capfd.readouterr().out
    assert learned.main([*command, "--summarise"]) == 0
    assert "| tleg | " in capfd.readouterr().out
    found = json.loads((tmp_path / "learned.json").read_text())
    assert found["ancestor"]["images_seen"] == 64 and len(found["ancestor"]["accuracy"]) == 1
    assert found["accuracy"]["tleg"]["2x128"]["1"] == {"mean": round(by_arm_wide.epoch_1, 2), "sd": None, "n": 1}
    assert (tmp_path / "learned.png").stat().st_size > 10_000
