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
from pages import ROOT, Block, Shells, blocks_of, same_output, shells

import learngene_hub
from learngene_hub import Descendant, Learngene

PAGES = sorted((ROOT / "docs").glob("*.md"))
SIGNS = Path(learngene_hub.__file__).parent / "samples/signdigits"
CLASSES = ("circle", "point", "victory")  # of photos/
ANCESTOR = "timm/deit_tiny_patch16_224.fb_in1k"

# What a test runs in place of what a page says: the whole list. (page, what it says, what is run)
INSTEAD = [
    ("training.md", r"--multi_gpu --num_processes 2", "--cpu"),  # the tests have no two GPUs
    ("training.md", r"--workers 2", "--workers 0"),
]


def photos(folder: Path, classes: tuple[str, ...] = CLASSES, train: int = 16, test: int = 8) -> None:
    """A folder of class folders, as a reader has one, from the images that ship with the package."""
    for split, count in (("train", train), ("test", test)):
        rows = parquet.read_table(SIGNS / f"{split}.parquet").to_pylist()
        for label, name in enumerate(classes):
            chosen = [row for row in rows if row["label"] == label][:count]
            (folder / split / name).mkdir(parents=True)
            for i, row in enumerate(chosen):
                (folder / split / name / f"{i}.jpg").write_bytes(row["image"]["bytes"])


def fill(hub: Hub, folder: Path) -> None:
    """What the pages find on the Hub: DeiT-Tiny's shape under its name, and a learngene at the tag v1.0."""
    Descendant.from_learngene("lsamd-base", num_labels=1000).save_pretrained(folder)
    hub.repo(ANCESTOR).commit({path.name: path.read_bytes() for path in folder.iterdir()})
    path = Learngene.from_pretrained("lets-cifar100").save_pretrained(folder / "name")
    card = b"---\nlicense: apache-2.0\nlibrary_name: learngene_hub\ntags: [learngene, lets]\n---\n# name\n"
    hub.repo("org/name").commit({path.name: path.read_bytes(), "README.md": card})
    hub.repo("org/name").tag("v1.0")


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shells]:
    """Shells with a home and a Hub of their own."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch, serve() as hub:
        patch.setitem(ACCOUNTS, TOKEN, Account("author", ("org",)))
        fill(hub, home / "model")
        own = {"HOME": str(home), "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}
        kept = {k: v for k, v in hub.environment(home / "hf").items() if not k.startswith(("LEARNGENE", "XDG"))}
        photos(home / "photos")
        with shells({**kept, **own}) as made:
            yield made


def run(page: Path, reader: Shells, folder: Path, kinds: tuple[str, ...], **more: str) -> None:
    """Runs the blocks of a page in their order: the plain ones, and those of ``kinds``."""
    shell = reader.at(folder, **more)
    shutil.copytree(Path(shell.environment["HOME"]) / "photos", shell.folder / "photos")
    for block in blocks_of(page):
        if block.kind in ("", "file", *kinds):
            shell.run(block, replaced(block))


def replaced(block: Block) -> str:
    """The text of a block that is run."""
    text = block.text
    for page, told, instead in INSTEAD:
        text = re.sub(told, instead, text) if page == block.page else text
    return text


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
