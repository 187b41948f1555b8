"""The benchmarks' own arithmetic: what is run, what is stale, what the rows say."""

from __future__ import annotations

import csv
import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))  # scripts, not a package

import _arms  # noqa: E402
import _runs  # noqa: E402
import _summary  # noqa: E402
import demo  # noqa: E402
import grow_speed  # noqa: E402
import transfer  # noqa: E402
from _arms import Job, Row, Sources, evenly, initialise, untrained  # noqa: E402

from learngene_hub import Learngene, expand  # noqa: E402

BY_HAND = """\
arm,shape,set,seed,precision,epoch_1,epoch_2,epoch_3,params,seconds,digest,numerics,machine
rows,2x64,a,0,bf16,1,2,50,100,1.5,aa,1f,m
rows,2x64,a,1,bf16,1,2,60,100,1.5,aa,1f,m
rows,2x64,b,0,bf16,1,2,40,100,1.5,aa,1f,m
lsamd-base,2x64,a,0,bf16,1,2,99,100,1.5,old,1f,m
lsamd-base,2x64,a,0,bf16,1,2,53,100,1.5,new,1f,m
lsamd-base,2x64,a,1,bf16,1,2,61,100,1.5,new,1f,m
lsamd-base,2x64,b,0,bf16,1,2,38,100,1.5,new,1f,m
base-even,2x64,b,0,bf16,1,2,38,100,1.5,old,1f,m
"""


@pytest.fixture
def rows(tmp_path: Path) -> list[Row]:
    """Eight rows of which two, of the digest "old", are stale."""
    path = tmp_path / "by_hand.csv"
    path.write_text(BY_HAND)
    return _runs.read_rows(path, Row)


def job(arm: str, data: str = "a", seed: int = 0) -> Job:
    return Job(arm=arm, shape="2x64", set=data, seed=seed, precision="bf16")


def test_summary_by_hand(rows: list[Row]) -> None:
    """Differences 3, 1 and -2: mean 2/3, variance 19/3, so the standard error is sqrt(19/9)."""
    with_current_even = [*rows, Row(**vars(rows[-1]) | {"digest": "new", "epoch_3": 44.0})]
    summary = _summary.summarise(with_current_even)
    assert summary["overall"]["rows"] == {"mean": 50.0, "sd": pytest.approx(10.0), "n": 3}
    assert summary["overall"]["lsamd-base"]["mean"] == pytest.approx(152 / 3)
    cell = next(c for c in summary["cells"] if c["set"] == "a")["arms"]
    assert cell["rows"] == {"mean": 55.0, "sd": pytest.approx(50**0.5), "n": 2}
    assert cell["lsamd-base"] == {"mean": 57.0, "sd": pytest.approx(32**0.5), "n": 2}
    assert "base-even" not in cell
    against = summary["minus_rows"]["lsamd-base"]
    assert against["overall"] == {
        "mean": pytest.approx(2 / 3),
        "se": pytest.approx((19 / 9) ** 0.5),
        "n": 3,
        "wins": 2,
        "losses": 1,
    }
    assert against["per_set"]["a"] == {"mean": 2.0, "se": pytest.approx(1.0), "n": 2, "wins": 2, "losses": 0}
    assert against["per_set"]["b"] == {"mean": -2.0, "se": None, "n": 1, "wins": 0, "losses": 1}
    assert against["per_shape"]["2x64"] == against["overall"]
    assert summary["minus_rows"]["base-even"]["overall"]["mean"] == 4.0
    assert summary["digests"] == {"rows": "aa", "lsamd-base": "new", "base-even": "new"}


def test_another_arm_can_be_the_base(rows: list[Row]) -> None:
    summary = _summary.summarise(rows[:-1], base="lsamd-base")
    assert summary["minus_lsamd-base"]["rows"]["overall"]["mean"] == pytest.approx(-2 / 3)
    assert "rows - lsamd-base, paired: -0.67" in _summary.as_text(summary)


def test_rows_of_two_codes_are_named(rows: list[Row]) -> None:
    mixed = [Row(**vars(row) | {"numerics": "2e"}) if row.arm == "rows" else row for row in rows[:-1]]
    assert "numerics" not in _summary.as_text(_summary.summarise(rows[:-1]))
    assert "  rows: 2e\n  lsamd-base: 1f" in _summary.as_text(_summary.summarise(mixed))


def test_pairs_without_a_partner_do_not_count() -> None:
    one, other = {("s", "a", 0): 5.0, ("s", "a", 1): 9.0}, {("s", "a", 0): 4.0, ("s", "b", 0): 1.0}
    assert _summary.paired(one, other) == {"mean": 1.0, "se": None, "n": 1, "wins": 1, "losses": 0}
    assert _summary.paired(one, {}) is None


def test_the_newest_digest_counts_for_both_arms_of_a_learngene(rows: list[Row]) -> None:
    assert {row.digest for row in _summary.current(rows)} == {"aa", "old"}  # the last row of a learngene says "old"
    assert {row.digest for row in _summary.current(rows[:-1])} == {"aa", "new"}
    assert _summary.cells(_summary.current(rows[:-1]))["lsamd-base"]["2x64", "a", 0] == 53.0


def test_stale_rows_are_made_again(rows: list[Row]) -> None:
    wanted = [job("rows"), job("lsamd-base"), job("base-even", "b"), job("random")]
    found = transfer.missing(wanted, rows, {"rows": "aa", "lsamd-base": "new", "base-even": "new", "random": ""})
    assert found == [job("base-even", "b"), job("random")]
    newer = transfer.missing(wanted, rows, {"rows": "aa", "lsamd-base": "newer", "base-even": "newer", "random": ""})
    assert newer == wanted[1:]


def test_rows_with_the_same_start_are_adopted(pico_ancestor: VisionTransformer, tmp_path: Path) -> None:
    """What is learned for width 32 leaves a descendant of width 64 as it was."""
    old = untrained(pico_ancestor)
    gain = {"width.gain.32": torch.full((7, 32), 0.5), "width.bias.32": torch.zeros(7, 32)}
    new = Learngene(**vars(old) | {"tensors": old.tensors | gain})
    sources = []
    for name, learngene in (("old", old), ("new", new)):
        learngene.save(tmp_path / f"{name}.safetensors")
        sources.append(Sources(data="", learngene=str(tmp_path / f"{name}.safetensors")))
    line = dict(set="a", seed=0, precision="bf16", epoch_1=1.0, epoch_2=2.0, epoch_3=3.0, params=1, seconds=1.0)
    line |= dict(numerics="", machine="")
    rows = [
        Row(arm="lsamd-base", shape="2x64", digest=old.digest, **line),
        Row(arm="lsamd-base", shape="2x32", digest=old.digest, **line),
        Row(arm="lsamd-base", shape="3x64", digest="f" * 64, **line),
    ]
    assert transfer.adopt(rows, *sources) == [Row(arm="lsamd-base", shape="2x64", digest=new.digest, **line)]


def test_jobs_go_seed_by_seed() -> None:
    order = transfer.jobs(["rows", "random"], ["2x64", "4x64"], ["a"], [0, 1], "fp32")
    assert [(j.seed, j.shape, j.arm) for j in order][:5] == [
        (0, "2x64", "rows"),
        (0, "2x64", "random"),
        (0, "4x64", "rows"),
        (0, "4x64", "random"),
        (1, "2x64", "rows"),
    ]


def test_rows_survive_the_file(tmp_path: Path, rows: list[Row]) -> None:
    path = tmp_path / "new" / "rows.csv"
    for row in rows:
        _runs.append_row(path, row)
    assert _runs.read_rows(path, Row) == rows
    with path.open() as file:
        assert next(csv.reader(file)) == [field.name for field in dataclasses.fields(Row)]
    assert _runs.read_rows(tmp_path / "none.csv", Row) == []


def test_summarise_writes_json_and_plot(tmp_path: Path, rows: list[Row], capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "transfer.csv"
    for row in rows[:-1]:
        _runs.append_row(path, row)
    assert transfer.main(["--summarise", "--out", str(path)]) == 0
    assert "+0.67 +- 1.45 over 3, 2 won, 1 lost" in capsys.readouterr().out
    assert json.loads((tmp_path / "transfer.json").read_text())["runs"] == 6
    assert (tmp_path / "transfer.png").stat().st_size > 10_000


def test_untrained_is_the_ancestor(pico_ancestor: VisionTransformer) -> None:
    learngene = untrained(pico_ancestor)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        mine = pico_ancestor.forward_features(x)
        assert torch.equal(expand(learngene).forward_features(x), mine)
        wider = expand(learngene, width=128).forward_features(x)
    torch.testing.assert_close(wider, torch.cat([mine, mine], -1), rtol=1e-4, atol=1e-5)


def test_untrained_takes_evenly_spaced_blocks(pico_ancestor: VisionTransformer) -> None:
    grown = expand(untrained(pico_ancestor), depth=2).state_dict()
    own = pico_ancestor.state_dict()
    for place, position in enumerate((0, 2)):
        for name in ("attn.qkv.weight", "mlp.fc2.bias"):
            assert torch.equal(grown[f"blocks.{place}.{name}"], own[f"blocks.{position}.{name}"])


def test_untrained_can_be_saved(pico_ancestor: VisionTransformer, tmp_path: Path) -> None:
    learngene = untrained(pico_ancestor)
    assert learngene.save(tmp_path / "x.safetensors") == Learngene.load(tmp_path / "x.safetensors").digest


def test_evenly_changes_the_rule_alone(pico_ancestor: VisionTransformer) -> None:
    learngene = untrained(pico_ancestor)
    searched = Learngene(**vars(learngene) | {"settings": {"select": "frequency"}})
    assert evenly(searched, 64).settings == {"select": "even"}
    assert evenly(searched, 64).tensors is searched.tensors


def test_spaced_takes_every_second_unit_at_half_the_width(pico_ancestor: VisionTransformer) -> None:
    """Channels 0, 2, 4, ... of 64 at width 32; head 0 of 2."""
    grown = expand(_arms.spaced(untrained(pico_ancestor), 32), width=32).state_dict()
    own = pico_ancestor.state_dict()
    assert torch.equal(grown["norm.weight"], own["norm.weight"][::2])
    assert torch.equal(grown["blocks.1.attn.qkv.bias"][:32], own["blocks.1.attn.qkv.bias"][:32])
    assert torch.equal(grown["blocks.1.mlp.fc1.bias"], own["blocks.1.mlp.fc1.bias"][::2])


def test_heaviest_takes_the_units_with_the_largest_weights(pico_ancestor: VisionTransformer) -> None:
    with torch.no_grad():
        pico_ancestor.blocks[1].mlp.fc1.weight[128:] *= 10.0
        pico_ancestor.blocks[1].attn.proj.weight[:, 32:] *= 10.0
    grown = expand(_arms.heaviest(untrained(pico_ancestor), 32), width=32).state_dict()
    own = pico_ancestor.state_dict()
    assert torch.equal(grown["blocks.1.mlp.fc1.bias"], own["blocks.1.mlp.fc1.bias"][128:])
    assert torch.equal(grown["blocks.1.attn.qkv.bias"][:32], own["blocks.1.attn.qkv.bias"][32:64])


def test_tilting_keeps_the_function(pico_ancestor: VisionTransformer) -> None:
    learngene = untrained(pico_ancestor)
    plain, tilted = expand(learngene, width=128).eval(), expand(learngene, width=128).eval()
    _arms.tilt(tilted, learngene.shape, 128, 0.25)
    assert _arms.shares(2, 5, 0.5).tolist() == [0.5, 0.5, 1.0, 1.5, 1.5]  # unit 0 has 3 copies, unit 1 has 2
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(tilted.forward_features(x), plain.forward_features(x), rtol=1e-4, atol=1e-5)
    assert not torch.equal(tilted.blocks[0].mlp.fc2.weight, plain.blocks[0].mlp.fc2.weight)


def test_stirring_leaves_the_native_channels(pico_ancestor: VisionTransformer) -> None:
    exact = _arms.with_settings(form="exact")(untrained(pico_ancestor), 96)
    still, stirred = expand(exact, width=96), expand(exact, width=96)
    _arms.stir(stirred, 64, 0.25, seed=0)
    for name in ("blocks.0.mlp.fc2.weight", "patch_embed.proj.weight"):
        before, after = still.state_dict()[name], stirred.state_dict()[name]
        assert torch.equal(after[:64], before[:64])
        assert not before[64:].any()
        assert float(after[64:].std()) == pytest.approx(0.25 * float(before[:64].std()), rel=0.05)


def test_one_seed_gives_one_start() -> None:
    one, same, other = (initialise(None, 2, 64, 3, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["blocks.0.attn.qkv.weight"], other["blocks.0.attn.qkv.weight"])


@pytest.fixture
def pico_sources(tmp_path: Path, pico_ancestor: VisionTransformer) -> Sources:
    """A learngene and a data set of 12 images in 2 classes."""
    learngene = tmp_path / "pico.safetensors"
    untrained(pico_ancestor).save(learngene)
    for split in ("train", "test"):
        for name, shade in (("dark", 40), ("light", 220)):
            folder = tmp_path / "data" / "shades" / split / name
            folder.mkdir(parents=True)
            for i in range(6):
                Image.new("RGB", (64, 64), (shade + i, shade, shade)).save(folder / f"{i}.png")
    return Sources(data=str(tmp_path / "data"), learngene=str(learngene))


@pytest.mark.parametrize("arm", ["lsamd-base", "base-even", "random"])
def test_a_run_fills_its_row(arm: str, pico_sources: Sources) -> None:
    asked = Job(arm=arm, shape="2x64", set="shades", seed=3, precision="bf16")
    row = _arms.measure(asked, pico_sources)
    assert row.job == asked
    assert row.digest == pico_sources.digest(arm)
    assert row.numerics == _arms.numerics("bf16", "cpu")
    assert len(row.digest) == (0 if arm == "random" else 64)
    assert all(0 <= accuracy <= 100 for accuracy in (row.epoch_1, row.epoch_2, row.epoch_3))
    repeated = _arms.measure(asked, pico_sources)
    assert (row.epoch_1, row.epoch_3, row.params) == (repeated.epoch_1, repeated.epoch_3, repeated.params)


def test_a_missing_source_is_named(pico_sources: Sources) -> None:
    with pytest.raises(SystemExit, match="--ancestor is missing"):
        pico_sources.digest("rows")
    with pytest.raises(SystemExit, match="no arm nonsense"):
        transfer.main(["--arms", "nonsense", "--data", "x"])


@pytest.mark.slow
def test_workers_resume(pico_sources: Sources, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.csv"
    command = ["--data", pico_sources.data, "--sets", "shades", "--shapes", "2x64", "--seeds", "0", "--workers", "2"]
    command += ["--learngene", str(pico_sources.learngene), "--out", str(out), "--arms"]
    assert transfer.main([*command, "lsamd-base"]) == 0
    assert transfer.main([*command, "lsamd-base,random"]) == 0
    assert "2 runs, 1 there already" in capfd.readouterr().out
    assert [row.arm for row in _runs.read_rows(out, Row)] == ["lsamd-base", "random"]


@pytest.mark.slow
def test_demo_runs(pico_sources: Sources, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "demo"
    assert demo.main(["--quick", "--learngene", str(pico_sources.learngene), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "without learngene_hub by plain timm and plain transformers: equal logits" in said.replace("\n", " ")
    assert sorted(path.name for path in out.iterdir()) == ["4x128", "demo.png"]


@pytest.mark.slow
def test_grow_speed_runs(pico_sources: Sources, tmp_path: Path) -> None:
    out = tmp_path / "speed.json"
    grow_speed.main(["--learngene", str(pico_sources.learngene), "--width", "128", "--rounds", "2", "--out", str(out)])
    report = json.loads(out.read_text())
    assert set(report["within"]) == {"time", "memory"}
    assert report["memory"]["grow"]["peak_growth_bytes"] > 0
    assert len(report["time"]["grow"]["made_ms_all"]) == 2
