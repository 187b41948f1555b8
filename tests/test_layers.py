"""Imports point one way, third-party libraries enter by one door each, and only the CLI prints."""

from __future__ import annotations

import ast
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import learngene_hub

PACKAGE = Path(learngene_hub.__file__).parent

# A room imports itself and what stands above it. Its first file is the public one, the others were split from that.
ROOMS = [
    ["_version"],
    ["errors"],
    ["_check"],
    [
        "shape",
        "_building",
        "_kinds",
        "_reach",
        "_plain",
        "_heads",
        "_heads_vit",
        "_stitched",
        "_stitched_vit",
        "_conv",
        "_conv_models",
        "architectures",
        "_ancestors",
    ],
    ["transforms", "_parts"],
    ["data", "_augment", "_decode"],
    ["learngene", "_format", "_lock"],
    ["training", "_fit", "_processes", "_state", "_steps"],
    ["teacher", "_teacher_cache"],
    ["methods"],
    ["factory", "_first_head", "_folder", "_growth", "_latency", "_planning", "_sizing"],
    ["widening"],
    [
        "pool",
        "_pool_file",
        "_pool_features",
        "_pool_amounts",
        "_pool_baselines",
        "_pool_select",
        "_pool_grow",
        "_pool_merge",
        "_pool_write",
    ],
    ["descendant"],
    ["exporting"],
    ["registry", "_registry_file"],
    ["card", "_card_descendant", "_card_facts", "_card_federation", "_card_results", "_card_shapes"],
    ["hub", "_push", "_pool_push", "_send", "_remote", "_store", "_client"],
    ["federated"],
    [
        "comparison",
        "_compare_make",
        "_compare_plan",
        "_compare_row",
        "_compare_run",
        "_compare_summary",
        "_jobs",
        "_mimetic",
    ],
    [
        "cli",
        "_workshop",
        "_finetune",
        "_export",
        "_extraction",
        "_exchange",
        "_shelf",
        "_registry_commands",
        "_pool_commands",
        "_pool_add",
        "_pool_choose",
        "_pool_options",
        "_compare",
        "_federate",
        "_fit_size",
        "_hf_extension",
        "_plain_help",
        "_resume",
        "_command",
        "_output",
    ],
    ["__init__"],
]
FLOOR = {name: floor for floor, room in enumerate(ROOMS) for name in room}
PUBLIC = {name: room[0] for room in ROOMS for name in room}

# Conveniences of Learngene that forward downwards, from inside a function so that importing stays one-way.
LAZY = {
    ("learngene", "methods"),
    ("learngene", "hub"),
    ("learngene", "factory"),
    ("descendant", "hub"),
}

DOORS = {  # third-party library -> the one room that imports it, named after its public file
    "accelerate": {"training"},
    "datasets": {"data"},
    "flwr": {"federated"},
    "huggingface_hub": {"hub"},
    "matplotlib": {"federated"},
    "onnxruntime": {"exporting"},
    "packaging": {"hub"},
    "PIL": {"data"},
    "pyarrow": {"data"},
    "rich": {"cli"},
    "safetensors": {"learngene"},
    "timm": {"shape"},
    "tqdm": {"training"},
    "transformers": {"descendant"},
    "typer": {"cli"},
    "yaml": {"registry", "card", "cli"},  # a registry, the head of a card, the settings given to extract
}


@dataclass(frozen=True)
class Import:
    """One ``import`` of a file: where it stands, what it names, and whether it runs when the file is imported."""

    path: Path
    line: int
    module: str
    lazy: bool
    typing: bool

    @property
    def room(self) -> str:
        return self.path.relative_to(PACKAGE).with_suffix("").parts[0]

    @property
    def target(self) -> str:
        """The file or folder of this package that is imported, "" for another package."""
        top, _, rest = self.module.partition(".")
        return (rest.split(".")[0] or "__init__") if top == "learngene_hub" else ""

    def __str__(self) -> str:
        return f"{self.path.relative_to(PACKAGE)}:{self.line} imports {self.module}"


def _modules(node: ast.Import | ast.ImportFrom, path: Path) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    package = ["learngene_hub", *path.relative_to(PACKAGE).parent.parts]
    base = (
        ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])
        if node.level
        else node.module
    )
    if base == "learngene_hub":  # from learngene_hub import shape: a module; import Learngene: the public surface
        return [f"{base}.{alias.name}" if alias.name in FLOOR else base for alias in node.names]
    return [base or ""]


def _imports(path: Path) -> list[Import]:
    found: list[Import] = []

    def walk(node: ast.AST, lazy: bool, typing: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import | ast.ImportFrom):
                found.extend(Import(path, child.lineno, name, lazy, typing) for name in _modules(child, path))
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            guarded = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            walk(child, lazy or inside, typing or guarded)

    walk(ast.parse(path.read_text()), lazy=False, typing=False)
    return found


FILES = sorted(PACKAGE.rglob("*.py"))
IMPORTS = [found for path in FILES for found in _imports(path)]
INTERNAL = [found for found in IMPORTS if found.target]


def test_every_file_has_a_room() -> None:
    homeless = {path.relative_to(PACKAGE).with_suffix("").parts[0] for path in FILES} - FLOOR.keys()
    assert not homeless, f"give {sorted(homeless)} a place in ROOMS, above whatever imports it"


def test_imports_point_one_way() -> None:
    wrong = [
        str(found)
        for found in INTERNAL
        if found.room != "__init__"
        and FLOOR[found.target] > FLOOR[found.room]
        and not ((found.lazy or found.typing) and (found.room, found.target) in LAZY)
    ]
    assert not wrong, "\n".join(wrong)


def test_each_declared_exception_is_still_needed() -> None:
    used = {(found.room, found.target) for found in INTERNAL if FLOOR[found.target] > FLOOR[found.room]}
    assert used - {pair for pair in used if pair[0] == "__init__"} == LAZY


def test_files_of_one_room_do_not_import_each_other_in_a_circle() -> None:
    eager = {(found.room, found.target) for found in INTERNAL if not found.lazy and not found.typing}
    both = [(a, b) for a, b in eager if (b, a) in eager and a < b]
    assert not both


def test_methods_do_not_import_each_other() -> None:
    """A published method is one public file (its private helpers beside it); what two share stands above methods/."""
    folder = PACKAGE / "methods"
    public = {path.stem for path in folder.glob("*.py") if not path.stem.startswith("_")} - {"base"}
    wrong = [
        str(found)
        for found in IMPORTS
        if found.path.parent == folder and found.path.stem != "__init__"
        for name in public - {found.path.stem.lstrip("_").split("_")[0], found.path.stem}
        if found.module == f"learngene_hub.methods.{name}"
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("library", DOORS)
def test_each_library_enters_by_one_door(library: str) -> None:
    wrong = [
        str(found)
        for found in IMPORTS
        if found.module.split(".")[0] == library and PUBLIC[found.room] not in DOORS[library] and not found.typing
    ]
    assert not wrong, "\n".join(wrong)


def test_every_library_has_a_door() -> None:
    free = sys.stdlib_module_names | {"learngene_hub", "torch", "numpy"} | DOORS.keys()
    strangers = [str(found) for found in IMPORTS if found.module.split(".")[0] not in free]
    assert not strangers, "\n".join(strangers)


def test_only_the_cli_prints() -> None:
    wrong = [
        f"{path.relative_to(PACKAGE)}:{node.lineno}"
        for path in FILES
        if path.stem not in {"cli", "_output"}
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert not wrong
