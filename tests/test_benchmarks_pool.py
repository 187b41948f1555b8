"""The comparison of pools: what arms cost, which rows count, what they say; that a route is what the pool has."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from test_cli import Call
from test_cli import run as run  # the fixture
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))  # scripts, not a package

import _pool_arms  # noqa: E402
import _pool_cost  # noqa: E402
import _pool_stitches  # noqa: E402
import _pool_summary  # noqa: E402
import pool  # noqa: E402
from _pool_arms import Bench, Sources  # noqa: E402
from _pool_cost import Arm, cost_of  # noqa: E402

from learngene_hub import Descendant, Learngene, factory  # noqa: E402
from learngene_hub.methods._stitch_growth import accuracies, net_of  # noqa: E402
from learngene_hub.methods._stitch_net import resized  # noqa: E402
from learngene_hub.methods.learngene_pool import Auxiliary  # noqa: E402
from learngene_hub.shape import ViTShape, shape_of  # noqa: E402

SETTINGS = yaml.safe_load((pool.ROOT / "benchmarks" / "pool.yaml").read_text())
DEIT = ViTShape(depth=12, width=192, heads=3, image_size=64, classes=100)
SMALL = ViTShape(depth=4, width=32, heads=4, image_size=64, classes=2)  # of the ancestor in these tests


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    """The arms of pool.yaml, made small."""
    common = SETTINGS["common"] | {"batch_size": 8, "precision": "fp32", "held_out": 0.2, "init_images": 5}
    small = {"widths": [8, 16], "depth": 2}
    return SETTINGS | {"common": common, "pool": small, "train": 40, "test": 12}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory, config: dict[str, Any]) -> Sources:
    """Two classes of plain pictures."""
    folder = tmp_path_factory.mktemp("pool")
    for split, count in (("train", 20), ("test", 6)):
        for name, shade in (("dark", 40), ("light", 220)):
            there = folder / "cifar100" / split / name
            there.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (64, 64), (shade + i, shade, shade)).save(there / f"{i}.png")
    (folder / "pool.yaml").write_text(yaml.safe_dump(config))
    for name in ("ancestor", "learned/ancestor"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / f"{name}.safetensors").write_bytes(name.encode())
    return Sources(
        data=folder, ancestor=folder / "ancestor.safetensors", work=folder / "work", learned=folder / "learned",
        config=folder / "pool.yaml",
    )  # fmt: skip


@pytest.fixture(scope="module")
def ancestor() -> nn.Module:
    return factory.expand(_bare(), seed=3).eval()


def _bare() -> Learngene:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return factory.extract("net2net", SMALL.build(), {})


def bench(config: dict[str, Any], sources: Sources, ancestor: nn.Module, arm: str) -> Bench:
    return Bench(arm=Arm(config=config, name=arm, seed=1), sources=sources, ancestor=ancestor)


@pytest.fixture(scope="module")
def pools(config: dict[str, Any], sources: Sources, ancestor: nn.Module) -> dict[str, Learngene]:
    """The three arms that make a pool of two instances of two blocks."""
    makers = {"pool": _pool_arms.make_pool, "pool-ls": _pool_arms.make_pool, "sn-net-scratch": _pool_arms.make_scratch}
    sources.work.mkdir()
    for arm, make in makers.items():
        made = make(bench(config, sources, ancestor, arm))
        assert made.digest == Learngene.load(sources.stored(arm, 1)).digest
    return {arm: Learngene.load(sources.stored(arm, 1)) for arm in makers}


# ---- what an arm costs


def test_every_arm_has_the_compute_of_the_pool() -> None:
    """One share of 18 for each of the small ViTs."""
    want = cost_of(Arm(config=SETTINGS, name="pool"), DEIT).total
    for name, told in SETTINGS["arms"].items():
        if name.endswith("-start"):
            continue
        networks = len(told.get("shapes", [""]))
        share = networks / told.get("shares", 1)
        assert cost_of(Arm(config=SETTINGS, name=name), DEIT).total / share == pytest.approx(want, rel=0.07), name


def test_costs_are_what_the_pools_say_of_themselves(config: dict[str, Any], pools: dict[str, Learngene]) -> None:
    """The provenance has forwards alone, and no maps: here two at each of 2 positions, and two at 1, of 64 images."""
    for arm, learngene in pools.items():
        cost, told = cost_of(Arm(config=config, name=arm), SMALL), learngene.provenance
        first = cost.first_students if arm != "sn-net-scratch" else 0  # `stitch` knows nothing of it
        maps = 2 * 32 * (2 * 2 * 17 * 32) * (8 * 2 + 16 * 1) * 2 if first else 0
        assert first + cost.second_students - maps == pytest.approx(3 * told["flops"], abs=3)  # type: ignore[operator]
        assert cost.first_teacher + cost.second_teacher == told["teacher_flops"]
        assert (cost.solving > 0) == (arm != "pool")


def test_a_step_of_distillation_costs_what_torch_counts(config: dict[str, Any], ancestor: nn.Module) -> None:
    """But for the gradient of the images, which nobody needs: that of the patch convolution's input."""
    arm = Arm(config=config, name="pool")
    shapes = arm.pool.instances(SMALL)
    student = Auxiliary(arm.pool, shapes[0], SMALL, 0, 2)
    seen = resized(ancestor, 64)
    for block in [*student.vit.blocks, *seen.blocks]:
        block.attn.fused_attn = False
    loss = student.lesson(arm.pool, seen, arm.pool.recipe(first=True))
    with FlopCounterMode(display=False) as counter:
        loss(student, (torch.zeros(5, 3, 64, 64), torch.zeros(5, dtype=torch.int64))).backward()
    cost = _pool_cost._first([shapes[0]], arm, SMALL, places=[2], taught=True)
    mine = 5 * (cost.first_students + cost.first_teacher) // arm.seen("first_epochs")
    assert counter.get_total_flops() == mine - 5 * 2 * 16 * 8 * 3 * 16**2


def test_least_squares_cost_what_torch_counts(config: dict[str, Any]) -> None:
    """5 images of 17 tokens, 8 and 16 numbers each, four maps, and the features of both."""
    arm = Arm(config=config, name="pool-ls")
    x, y = torch.zeros(85, 9, dtype=torch.float64), torch.zeros(85, 16, dtype=torch.float64)
    with FlopCounterMode(display=False) as counter:
        for _ in range(4):
            _ = x.T @ x, x.T @ y
    features = 5 * sum(shape.flops() for shape in arm.pool.instances(SMALL).values())
    assert cost_of(arm, SMALL).solving == counter.get_total_flops() + features


def test_a_share_is_spent_on_as_many_images_as_it_reaches() -> None:
    arm = Arm(config=SETTINGS, name="net2net")
    share = cost_of(Arm(config=SETTINGS, name="pool"), DEIT).total / 18
    for shape in _pool_cost.shapes_of(arm, DEIT):
        epochs, images = _pool_cost.passes(arm, shape, DEIT)
        assert images <= 3800 and images % 32 == 0 and (epochs - 1) * 3800 < share / (3 * shape.flops())
        assert 3 * shape.flops() * epochs * images == pytest.approx(share, rel=0.03)


# ---- what an arm makes


def test_arms_share_the_first_stage(pools: dict[str, Learngene]) -> None:
    losses: list[Any] = [pools[arm].provenance["loss"] for arm in ("pool", "pool-ls")]
    assert losses[0]["first"] == losses[1]["first"] and losses[0]["pool"] != losses[1]["pool"]
    assert pools["pool"].settings["init"] == "transpose" and pools["pool-ls"].settings["init"] == "least-squares"


def test_a_route_by_itself_is_the_pools(pools: dict[str, Learngene], sources: Sources, tmp_path: Path) -> None:
    """Grown from the file; and, of the last route of each pool, saved and read again."""
    x = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for arm, learngene in pools.items():
        net = net_of(learngene, nearest=learngene.method == "sn-net")
        for number in net.routes:
            model = Descendant.from_learngene(str(sources.stored(arm, 1)), settings={"route": number})
            with torch.no_grad():
                assert torch.equal(model.eval()(pixel_values=x).logits, net(x, number)), (arm, number)
        model.save_pretrained(tmp_path / arm)
        again = Descendant.from_pretrained(tmp_path / arm)
        with torch.no_grad():
            assert torch.equal(again.eval()(pixel_values=x).logits, net(x, max(net.routes)))


def test_a_budget_chooses_the_best_stored_route_under_it(
    pools: dict[str, Learngene], run: Call, tmp_path: Path
) -> None:
    """From Python and from the shell; by the accuracies of the file, whatever they are."""
    learngene = pools["pool"]
    table: Any = learngene.provenance["routes"]
    rows = [[*row[:4], float(value)] for row, value in zip(table["rows"], (50, 40, 60, 30, 70, 20), strict=True)]
    learngene = replace(learngene, provenance={**learngene.provenance, "routes": {**table, "rows": rows}})
    file = tmp_path / "pool.safetensors"
    learngene.save(file)
    for _, _, budget, _, _ in rows:
        best = max((row for row in rows if row[2] <= budget), key=lambda row: row[4])
        shape = factory.plan(learngene, settings={"route": best[0]})
        model = Descendant.from_learngene(str(file), max_params=budget)
        assert shape_of(model.timm_model) == shape and model.num_parameters() == best[2]
        shown = json.loads(run("show", file, "--max-params", str(budget), "--json").out)
        told = next(value for value in shown.values() if isinstance(value, dict) and "bytes" in value)
        assert told["params"] == best[2] and told["flops"] == best[3]


def test_single_vits_are_made_and_tested(config: dict[str, Any], sources: Sources, ancestor: nn.Module) -> None:
    arms = config["arms"] | {
        "net2net": config["arms"]["net2net"] | {"shapes": ["2x8", "3x16"], "shares": 2},
        "sn-net": config["arms"]["sn-net"]
        | {"settings": {"init": "least-squares", "widths": [8, 32], "epochs": 1, "first_epochs": 1}},
    }
    small = config | {"arms": arms}
    made = {
        "alone-128": _pool_arms.make_alone(bench(small, sources, ancestor, "alone-128")),
        "net2net": _pool_arms.make_net2net(bench(small, sources, ancestor, "net2net")),
        "sn-net": _pool_arms.make_sn_net(bench(small, sources, ancestor, "sn-net")),
    }
    assert [str(each.shape) for each in made["alone-128"].networks] == ["2x16"]
    assert [str(each.shape) for each in made["net2net"].networks] == ["2x8", "3x16"]
    straight = made["sn-net"].networks
    assert [str(each.shape) for each in straight] == ["4x8", "4x32", "1x8+3x32", "2x8+2x32", "3x8+1x32"]
    stored = Learngene.load(sources.stored("sn-net", 1))
    told: Any = stored.provenance
    cost = made["sn-net"].cost
    assert cost.first_students + cost.second_students == pytest.approx(3 * told["flops"], abs=3)
    assert cost.first_teacher + cost.second_teacher == told["teacher_flops"]
    test = sources.images("test")
    for each in straight:
        assert 0 <= factory.evaluate(each.model(), test).accuracy <= 100
        assert each.held_out == accuracies(stored)[each.number]


def test_stitches_are_compared_with_what_the_end_expects(pools: dict[str, Learngene], sources: Sources) -> None:
    """By hand: two tokens of two numbers, whose mean is (1, 1)."""
    wanted = torch.tensor([[[2.0, 0.0], [0.0, 2.0]]])
    assert _pool_stitches.compared(wanted, wanted) == {"error": 0, "cosine": 1, "norm": 1}
    assert _pool_stitches.compared(torch.ones(1, 2, 2), wanted) == {"error": 1, "cosine": 0.707, "norm": 0.707}
    assert _pool_stitches.compared(-wanted, wanted) == {"error": 8, "cosine": -1, "norm": 1}
    told = _pool_stitches.look(pools["pool-ls"], sources.images("test"))
    assert list(told["routes"]) == ["0[0-0] > 2[0-1]", "0[0-0] > 2[1-1]", "0[0-1] > 2[0-1]", "0[0-1] > 2[1-1]"]
    assert [len(norms) for norms in told["norms"].values()] == [3, 3]


# ---- which rows count


def row(arm: str, seed: int, route: str, accuracy: float, **more: Any) -> pool.Row:
    recipe = _pool_cost.recipe_of(SETTINGS, arm)
    facts: dict[str, Any] = dict(
        number=0, held_out=accuracy, params=100, flops=10, stored_bytes=8, first_students=1 * 10**9
    )
    facts |= dict(
        first_teacher=2 * 10**9, second_students=3 * 10**9, second_teacher=4 * 10**9, solving=0, seconds=1.0, networks=2
    )
    facts |= dict(recipe=recipe, ancestor="a", digest="d", machine="m", precision="fp32")
    return pool.Row(arm=arm, seed=seed, route=route, accuracy=accuracy, **(facts | more))


def test_rows_of_other_settings_are_stale() -> None:
    recipes = {arm: _pool_cost.recipe_of(SETTINGS, arm) for arm in SETTINGS["arms"]}
    rows = [row("pool", 1, "6x64", 5, recipe="old"), row("pool", 1, "6x64", 6), row("pool", 1, "6x64", 7)]
    assert [each.accuracy for each in pool.current(rows, recipes)] == [7]
    other = json.loads(json.dumps(SETTINGS))
    other["arms"]["pool"]["settings"]["epochs"] = 3
    changed = [arm for arm in recipes if _pool_cost.recipe_of(other, arm) != recipes[arm]]
    assert changed == ["pool", "net2net", "net2net-all"]  # whose share of the pool's compute is another


def test_a_job_is_done_when_all_its_rows_are_there(sources: Sources, config: dict[str, Any]) -> None:
    recipe = _pool_cost.recipe_of(config, "alone-64")
    of = pool.file_digest(str(sources.finetuned))
    facts = {"recipe": recipe, "ancestor": of}
    one, two = (row("alone-64", 1, route, 5, **facts) for route in ("a", "b"))
    assert pool.complete([one], sources) == set()
    assert pool.complete([one, one], sources) == set()
    assert pool.complete([one, two], sources) == {one.job}
    assert pool.complete([one, replace(two, ancestor="other")], sources) == set()
    kept = sources.stored("alone-64", 1)
    kept.parent.mkdir(exist_ok=True)
    kept.write_bytes(b"others")
    assert pool.complete([one, two], sources) == set()
    kept.unlink()


# ---- what they say


@pytest.fixture
def rows() -> list[pool.Row]:
    """Two seeds; the pool is ahead by 1 and 3 (mean over routes), so by 2 with a standard error of 1."""
    found = []
    for seed, gaps in ((1, (0, 2)), (2, (4, 2))):
        for route, params, gap in (("6x64", 350_000, gaps[0]), ("6x128", 1_300_000, gaps[1])):
            found.append(row("pool", seed, route, 10.0 + gap, params=params, held_out=20.0 - gap))
            found.append(row("sn-net-scratch", seed, route, 10.0, params=params))
        found.append(row("alone-128", seed, "6x128", 15.0 + seed, params=1_300_000, networks=1))
        found.append(row("sn-net", seed, "12x192", 60.0, params=5_000_000, networks=1))
    return found


def test_summary_by_hand(rows: list[pool.Row]) -> None:
    found = _pool_summary.summary(rows, SETTINGS)
    assert found["differences"]["pool - sn-net-scratch"] == {"mean": 2.0, "se": 1.0, "n": 2, "routes": 2, "won": 2}
    assert found["differences"]["pool - alone"] == {"mean": -4.5, "se": 0.5, "n": 2, "routes": 1, "won": 0}
    assert found["differences"]["pool - sn-net"] == {"n": 0}
    assert found["networks"]["pool"]["6x64"] == {"params": 350_000, "flops": 10, "mean": 12.0, "sd": 2.83, "n": 2}
    assert found["mean_over_networks"]["pool"] == 12.0
    assert found["compute"]["pool"]["over_reference"] == 1.0
    assert found["chosen"]["pool"]["400000"] == {
        "mean": 12.0, "sd": 2.83, "n": 2, "best": 12.0, "routes": ["6x64", "6x64"]
    }  # fmt: skip
    # seed 1: 20 held out for the small one (test 10), 18 for the large one (12); seed 2: 16 (14) and 18 (12)
    assert found["chosen"]["pool"]["1400000"]["routes"] == ["6x64", "6x128"]
    assert found["chosen"]["pool"]["1400000"]["mean"] == 11.0 and found["chosen"]["pool"]["1400000"]["best"] == 13.0
    assert found["chosen"]["sn-net"]["400000"] is None


def test_summarise_writes_json_and_plot(
    tmp_path: Path, rows: list[pool.Row], capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "pool.csv"
    for each in rows:
        pool.append_row(path, each)
    assert pool.main(["--summarise", "--out", str(path)]) == 0
    said = capsys.readouterr().out
    assert "| pool | 2 | 0.0 | 1.00 | 60% | 12.0 ± 2.8 | 12.0 ± 0.0 | 12.0 |" in said
    assert "| 6x128 | 1.30 M | 12.0 ± 0.0 | 10.0 ± 0.0 | 16.5 ± 0.7 |" in said
    assert json.loads((tmp_path / "pool.json").read_text())["seeds"] == [1, 2]
    assert (tmp_path / "pool.png").stat().st_size > 10_000


def test_what_is_missing_is_named() -> None:
    with pytest.raises(SystemExit, match="--data and --ancestor are missing"):
        pool.main([])
    with pytest.raises(SystemExit, match="arm nonsense asked; there are pool, pool-ls"):
        pool.main(["--data", "x", "--ancestor", "y", "--arms", "nonsense"])


def test_a_network_by_itself_has_nothing_held_out(tmp_path: Path) -> None:
    one = row("alone-64", 1, "6x64", 5, held_out=math.nan)
    pool.append_row(tmp_path / "rows.csv", one)
    (again,) = pool.read_rows(tmp_path / "rows.csv", pool.Row)
    assert math.isnan(again.held_out) and replace(again, held_out=0.0) == replace(one, held_out=0.0)
