"""Every command and every block of code of docs/*.md, and of README.md, run as a reader would; see ``pages.py``."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as parquet
import pytest
from _loopback_store import ACCOUNTS, Account
from loopback import TOKEN, Hub, serve
from pages import FENCE, ROOT, Block, Shell, Shells, blocks_of, same_output, shells

import learngene_hub

MADE = ("api.md", "cli.md")  # by docs/reference.py, without blocks to run
PAGES = sorted(page for page in (ROOT / "docs").glob("*.md") if page.name not in MADE)
SIGNS = Path(learngene_hub.__file__).parent / "samples/signdigits"
CLASSES = ("circle", "point", "victory")  # of photos/
READY = "ready/work"  # in the home of all: photos/ and finetuned/
ANCESTOR = "timm/deit_tiny_patch16_224.fb_in1k"

# What a test runs in place of what a page says: the whole list. (page, what it says, what is run)
INSTEAD = [
    ("training.md", r"--multi_gpu --num_processes 2", "--cpu"),  # the tests have no two GPUs
    ("training.md", r"--workers 2", "--workers 0"),
    # README.md's numbers are those of work, not of an example
    ("README.md", r"( --data signdigits)", r"\1 --limit 32"),
    ("README.md", r"(learngene finetune .*)", r"\1 --epochs 1"),
    ("README.md", r"size=64\) for split", "size=64, limit=32) for split"),
    ("README.md", r"(--constrained --data photos/)", r"\1 --limit 16"),
    ("README.md", r"epochs=3", "epochs=1"),
    ("README.md", r"max_latency_ms=20", "max_params=1e7"),  # it measures for up to a minute
    ("README.md", r"--epochs 30", "--epochs 1"),
    (
        "README.md",
        r"ANCESTOR --teacher \S+",
        f"{ANCESTOR} --teacher {ANCESTOR} --set epochs=1 --set depth=4 --limit 16",
    ),
    # its blocks are not one story: what a line reads or writes under a name that an earlier line used otherwise
    ("README.md", r"extract ldr ANCESTOR", f"extract ldr {ANCESTOR} --set phases=[1,2] --set epochs=1 --limit 16"),
    ("README.md", r"mine-ldr grown", "mine-ldr grown-9"),
    ("README.md", r"mine-ldr(.*) --out trained( .*|$)", r"mine-ldr\1 --out trained-12\2"),
    ("README.md", r"push mine", "push lsamd-base"),
    ("README.md", r"org/mine@v1.0 --to mine", "org/name@v1.0 --to pulled"),
]


def photos(folder: Path, classes: tuple[str, ...] = CLASSES, train: int = 16, test: int = 8) -> None:
    """A folder of class folders, as a reader has one, from the images that ship with the package."""
    for split, count in (("train", train), ("test", test)):
        table = parquet.read_table(SIGNS / f"{split}.parquet")
        labels = table["label"].to_pylist()
        for label, name in enumerate(classes):
            (folder / split / name).mkdir(parents=True)
            for i, row in enumerate([row for row, there in enumerate(labels) if there == label][:count]):
                (folder / split / name / f"{i}.jpg").write_bytes(table["image"][row]["bytes"].as_py())


def fill(hub: Hub, shell: Shell) -> None:
    """What the pages find on the Hub: DeiT-Tiny's shape under its name, and a learngene at the tag v1.0; and, beside
    ``photos``, a model that was finetuned."""
    text = "learngene expand lsamd-base finetuned --num-labels 3 --image-size 64 -q\n"
    text += "learngene expand lsamd-base model --num-labels 1000 -q\nlearngene pull lsamd-mini --to name -q\n"
    shell.run(Block("what is there before a page", 0, "sh", text), text)
    hub.repo(ANCESTOR).commit({path.name: path.read_bytes() for path in (shell.folder / "model").iterdir()})
    hub.repo("org/name").commit({path.name: path.read_bytes() for path in (shell.folder / "name").iterdir()})
    hub.repo("org/name").tag("v1.0")


@pytest.fixture
def reader(served: tuple[Hub, Shells]) -> Shells:
    """Shells with a home and a Hub of their own; what another page pushed there is gone."""
    hub, made = served
    for name in hub.repos.keys() - {ANCESTOR, "org/name"}:
        del hub.repos[name]
    return made


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Hub, Shells]]:
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch, serve() as hub:
        patch.setitem(ACCOUNTS, TOKEN, Account("author", ("org",)))
        own = {"HOME": str(home), "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}
        kept = {k: v for k, v in hub.environment(home / "hf").items() if not k.startswith(("LEARNGENE", "XDG"))}
        with shells({**kept, **own}) as made:
            shell = made.at(home / "ready")
            photos(shell.folder / "photos")
            fill(hub, shell)
            yield hub, made


def run(page: Path, reader: Shells, folder: Path, kinds: tuple[str, ...], **more: str) -> None:
    """Runs the blocks of a page in their order: the plain ones, and those of ``kinds``."""
    shell = reader.at(folder, **more)
    shutil.copytree(Path(shell.environment["HOME"], READY, "photos"), shell.folder / "photos")
    for block in blocks_of(page):
        if block.kind in ("", "file", *kinds):
            shell.run(block, replaced(block))


def test_every_block_of_the_readme_runs(reader: Shells, tmp_path: Path) -> None:
    """But those of `make`, and the indented ones of `learngene federate`, which test_federate_cli.py has."""
    run_readme(reader, tmp_path, ())


@pytest.mark.slow
def test_every_block_of_the_readme_runs_the_slow_ones_too(reader: Shells, tmp_path: Path) -> None:
    run_readme(reader, tmp_path, ("slow",))


def run_readme(reader: Shells, folder: Path, kinds: tuple[str, ...]) -> None:
    shell = reader.at(folder)
    ready = Path(shell.environment["HOME"], READY)
    for name in ("photos", "maps", "few", "finetuned"):
        shutil.copytree(ready / ("finetuned" if name == "finetuned" else "photos"), shell.folder / name)
    for block in blocks_of(ROOT / "README.md"):
        if block.kind in ("", *kinds):
            shell.run(block, replaced(block))


def replaced(block: Block) -> str:
    """The text of a block that is run."""
    text = block.text
    for page, told, instead in INSTEAD:
        text = re.sub(told, instead, text, flags=re.MULTILINE) if page == block.page else text
    return text


def test_nothing_is_replaced_that_no_page_says() -> None:
    for page, told, _ in INSTEAD:
        path = ROOT / page if page == "README.md" else ROOT / "docs" / page
        assert any(re.search(told, block.text, re.MULTILINE) for block in blocks_of(path)), told


@pytest.mark.parametrize(
    ("told", "same"),
    [
        ("epoch 1: loss 1.1, accuracy 83.00 %\nparams  2,822,602\nseconds  9.00 s", True),
        ("epoch 1: loss 1.1, accuracy 99.00 %\nparams  2,822,602\nseconds  9.00 s", False),
        ("epoch 1: loss 9.1, accuracy 81.00 %\nparams  2,822,602\nseconds  9.00 s", False),
        ("epoch 1: loss 1.018, accuracy 81.00 %\nparams  2,822,603\nseconds  9.00 s", False),
        ("...\nparams  2,822,602\n...", True),
        ("...\nseconds  9.00 s", True),
        ("params  2,822,602\n...", False),
        ("epoch 1: loss 1.018, accuracy 81.00 %\n...", True),
        ("epoch 1: loss 1.018, accuracy 81.00 %", False),
    ],
)
def test_what_is_the_same_output(told: str, same: bool) -> None:
    printed = "epoch 1: loss 1.018, accuracy 81.00 %\nparams\t2,822,602\nseconds\t31.78 s\n"
    assert same_output(told, printed) is same


def test_percentages_in_the_tutorials_prose_are_those_of_its_outputs() -> None:
    page = ROOT / "docs/tutorial.md"
    outputs = " ".join(block.text for block in blocks_of(page) if block.language == "text")
    printed = {round(float(number) + 1e-9) for number in re.findall(r"([\d.]+) %", outputs)}
    told = {int(number) for number in re.findall(r"(\d+) %", FENCE.sub("", page.read_text(encoding="utf-8")))}
    assert told and told <= printed


def test_the_index_has_every_page() -> None:
    index = (ROOT / "docs/README.md").read_text(encoding="utf-8")
    assert [page.name for page in PAGES if page.name != "README.md" and f"]({page.name})" not in index] == []


def test_links_lead_somewhere() -> None:
    for page in [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]:
        for link in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text(encoding="utf-8"))):
            place, _, anchor = link.partition("#")
            if not place.startswith("http"):
                path = page.parent / place if place else page
                assert path.exists(), f"{page.name}: {link}"
                assert not anchor or anchor in anchors(path), f"{page.name}: {link}"


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def having(kind: str) -> list[Path]:
    return [page for page in PAGES if any(block.kind == kind for block in blocks_of(page))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_of_a_page_runs(page: Path, reader: Shells, tmp_path: Path) -> None:
    run(page, reader, tmp_path, ())


@pytest.mark.slow
@pytest.mark.parametrize("page", having("slow"), ids=lambda page: page.stem)
def test_every_block_of_a_page_runs_the_slow_ones_too(page: Path, reader: Shells, tmp_path: Path) -> None:
    run(page, reader, tmp_path, ("slow",))


@pytest.mark.network
@pytest.mark.parametrize("page", having("network"), ids=lambda page: page.stem)
def test_every_block_of_a_page_runs_with_a_network(page: Path, reader: Shells, tmp_path: Path) -> None:
    run(page, reader, tmp_path, ("network",), DOCS_NETWORK="1")
