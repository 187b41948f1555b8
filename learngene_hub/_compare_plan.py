"""What a comparison compares: ``Plan`` and ``Start``, read from a mapping (a YAML file, or the command line).

    starts      a list of names, or name -> facts (below)
    shapes      a list of DEPTHxWIDTH
    data        a list of sources, or name -> source, or name -> {source, images, per_class}
    seeds       a list of numbers [0]
    ancestor    of the methods and baselines: a folder, or a name of timm's; ancestor_weights its safetensors file
    image_size  pixels [64]; images, per_class: training images of a data set, per class; tested: test images [all]
    recipe      settings of ``Recipe`` for what inherits, fresh: those that differ for what inherits nothing; where no
                epochs are said, what inherits has those of ``default_epochs``
    head        "fresh", "means" or "whitened" (``fit_head``) ["means"]; of a fresh start always "fresh"
    tested_after, fresh_tested_after   the epochs after which a run is tested [all]
    work        the folder of learngenes that are made here [beside the CSV]

A start's name says what it is, unless its facts do:

    learngene   a name of a registry, a path, org/repo; settings: of growth, over those of its file
    method      one of METHODS, with settings, and data (name -> source), limit, of its extraction from the ancestor, of
                which with ``blocks`` so many, evenly spaced, are kept first
    baseline    "random" (timm's own), "mimetic" (``_mimetic.py``); "even", "first": net2net of evenly spaced, of the
                first blocks; "full": the ancestor at its own shape, whatever shapes are asked; "distilled": a random
                ViT of each shape that learns what the ancestor says of ``data``, at ``flops`` / ``sizes`` each;
                "adapted": the ancestor, learning at the plan's image size what it said of ``data`` at teacher_size,
                at ``flops`` / ``sizes`` once, then net2net
    recipe, head  of this start alone, over the plan's
    extraction_flops  of a learngene whose file does not say
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from learngene_hub._compare_row import Job
from learngene_hub._first_head import HEADS
from learngene_hub.data import called
from learngene_hub.errors import SettingsError
from learngene_hub.methods import METHODS
from learngene_hub.training import Recipe, default_epochs

BASELINES = ("random", "mimetic", "even", "first", "full", "distilled", "adapted")
FRESH = ("random", "mimetic")  # inherit nothing
TAUGHT = ("distilled", "adapted")  # by the ancestor
RECIPE = {"lr": 3e-4, "batch_size": 64, "schedule": "one-cycle", "warmup": 0.3}  # as `learngene finetune`
FRESH_RECIPE = {"epochs": 20, "lr": 1e-3, "schedule": "cosine", "warmup": 0.1}
FACTS = (
    "learngene",
    "method",
    "baseline",
    "settings",
    "data",
    "limit",
    "blocks",
    "recipe",
    "head",
    "flops",
    "sizes",
    "teacher_size",
    "extraction_flops",
)


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where the weights of a run come from."""

    name: str
    kind: str  # learngene, method, or one of BASELINES
    source: str = ""  # the learngene's name, or the method's
    settings: Mapping[str, Any] = field(default_factory=dict)  # of the method; of a learngene its growth
    data: Mapping[str, str] = field(default_factory=dict)  # of its extraction
    limit: int | None = None  # images of each of them
    blocks: int | None = None  # the ancestor is cut to so many, evenly spaced, before a method gets it
    recipe: Mapping[str, Any] = field(default_factory=dict)
    head: str | None = None
    flops: float = 0.0  # of what the ancestor teaches: training FLOPs of all sizes together
    sizes: int = 1
    teacher_size: int = 0  # pixels at which its teacher sees images; 0: its own size
    extraction_flops: float | None = None

    @property
    def is_fresh(self) -> bool:
        """Whether it inherits nothing."""
        return self.kind in FRESH

    @classmethod
    def of(cls, name: str, facts: Mapping[str, Any] | None = None) -> Start:
        """The start of this name, and what is said of it.

        Raises:
            SettingsError: the facts contradict each other, or one is unknown.
        """
        facts = dict(facts or {})
        if unknown := [key for key in facts if key not in FACTS]:
            raise SettingsError(f"start {name}: {unknown[0]!r} is none of its facts, which are {', '.join(FACTS)}")
        said = {kind: facts.pop(kind) for kind in ("learngene", "method", "baseline") if kind in facts}
        if len(said) > 1:
            raise SettingsError(f"start {name} is {' and '.join(said)}; one of them would work")
        kind, source = next(iter(said.items())) if said else (_kind_of(name), name)
        if kind == "baseline":
            if source not in BASELINES:
                raise SettingsError(f"start {name}: no baseline {source!r}; there are {', '.join(BASELINES)}")
            kind = source
        if kind == "method" and source not in METHODS:
            raise SettingsError(f"start {name}: no method {source!r}; `learngene methods` lists them")
        if kind in ("even", "first"):
            kind, source, facts["settings"] = "method", "net2net", {"select": kind}
        facts["data"] = named_sources(facts.get("data") or {})
        start = cls(name=name, kind=kind, source=str(source), **facts)
        if kind in TAUGHT and not (start.data and start.flops > 0 and start.sizes >= 1):
            raise SettingsError(
                f"start {name} needs data (what it learns from), flops (of all sizes) and sizes (how many)"
            )
        if start.head not in (None, *HEADS):
            raise SettingsError(f"start {name}: head {start.head!r} asked; there are {', '.join(HEADS)}")
        return start


def _kind_of(name: str) -> str:
    return "baseline" if name in BASELINES else "method" if name in METHODS else "learngene"


def named_sources(data: Sequence[str] | Mapping[str, str]) -> dict[str, str]:
    """Name -> source of data sets that are listed, or named already."""
    if isinstance(data, Mapping):
        return {str(name): str(source) for name, source in data.items()}
    return {called(source): str(source) for source in data}


@dataclass(frozen=True, kw_only=True)
class Data:
    """A data set of a plan."""

    name: str
    source: str
    images: int | None = None  # to train on, drawn with seed 0; None: all
    per_class: int | None = None  # to train on, of each class

    @classmethod
    def of(cls, name: str, said: Any, plan: Mapping[str, Any]) -> Data:
        """What a plan says of a data set."""
        facts: dict[str, Any] = dict(said) if isinstance(said, Mapping) else {"source": str(said)}
        given = {key: facts.get(key, plan.get(key)) for key in ("images", "per_class")}
        if "source" not in facts:
            raise SettingsError(f"data {name} has no source; a path, a sample or a Hub data set would work")
        return cls(name=name, source=str(facts["source"]), **given)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A comparison: starts x shapes x data x seeds with one recipe."""

    starts: tuple[Start, ...]
    shapes: tuple[str, ...]
    data: tuple[Data, ...]
    seeds: tuple[int, ...] = (0,)
    ancestor: str | None = None
    ancestor_weights: str | None = None
    image_size: int = 64
    tested: int | None = None  # test images of each data set
    recipe: Mapping[str, Any] = field(default_factory=lambda: dict(RECIPE))
    fresh: Mapping[str, Any] = field(default_factory=lambda: dict(FRESH_RECIPE))
    head: str = "means"
    tested_after: tuple[int, ...] = ()  # epochs; all, where none is said; the last one always
    fresh_tested_after: tuple[int, ...] = ()
    head_dim: int = 64  # of what is drawn
    work: str = "."

    @classmethod
    def of(cls, said: Mapping[str, Any]) -> Plan:
        """The plan that a mapping says.

        Raises:
            SettingsError: something is missing, unknown, or of no use.
        """
        known = {each.name for each in dataclasses.fields(cls)} | {"images", "per_class"}
        for key in said:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1)
                hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(sorted(known))}"
                raise SettingsError(f"{key!r} in a plan; {hint}")
        for key in ("starts", "shapes", "data"):
            if not said.get(key):
                raise SettingsError(f"a plan without {key}; at least one is needed")
        starts = said["starts"]
        facts = starts if isinstance(starts, Mapping) else dict.fromkeys(map(str, starts))
        data = said["data"] if isinstance(said["data"], Mapping) else named_sources(said["data"])
        rest = {key: said[key] for key in said if key not in ("starts", "data", "images", "per_class")}
        for key in ("shapes", "seeds", "tested_after", "fresh_tested_after"):
            if key in rest:
                rest[key] = tuple(rest[key])
        for key, default in (("recipe", RECIPE), ("fresh", FRESH_RECIPE)):
            rest[key] = {**default, **numbers(said.get(key) or {})}
        plan = cls(
            starts=tuple(Start.of(name, numbers(each or {})) for name, each in facts.items()),
            data=tuple(Data.of(str(name), each, said) for name, each in data.items()),
            **rest,
        )
        plan._check()
        return plan

    def _check(self) -> None:
        for shape in self.shapes:
            parse_shape(shape)
        if self.head not in HEADS:
            raise SettingsError(f"head {self.head!r} asked; there are {', '.join(HEADS)}")
        for start in self.starts:
            self.recipe_of(start, 0)
        needing = [each.name for each in self.starts if each.kind in ("method", "full", *TAUGHT)]
        if needing and not self.ancestor:
            raise SettingsError(f"start {needing[0]} is made from an ancestor; --ancestor NAME names one")

    def start(self, name: str) -> Start:
        """The start of this name."""
        return next(each for each in self.starts if each.name == name)

    def recipe_of(self, start: Start, seed: int, images: int = 0) -> Recipe:
        """How a run of ``start`` on so many images is trained.

        Raises:
            SettingsError: a setting that a recipe has not, or out of its range.
        """
        asked = {**self.recipe, **(self.fresh if start.is_fresh else {}), **numbers(start.recipe), "seed": seed}
        known = [each.name for each in dataclasses.fields(Recipe) if each.name != "augment"]
        if unknown := [key for key in asked if key not in known]:
            raise SettingsError(f"{unknown[0]!r} in a recipe; known: {', '.join(known)}")
        asked.setdefault("epochs", default_epochs(images))
        return Recipe(**asked)

    def _says_epochs(self, start: Start) -> bool:
        return start.is_fresh or "epochs" in self.recipe or "epochs" in start.recipe

    def head_of(self, start: Start) -> str:
        """How the head of a run of ``start`` begins."""
        return start.head or ("fresh" if start.is_fresh else self.head)

    def epochs_tested(self, start: Start, epochs: int) -> tuple[int, ...]:
        """The epochs after which a run is tested."""
        told = self.fresh_tested_after if start.is_fresh else self.tested_after
        kept = {epoch for epoch in told if 1 <= epoch <= epochs} if told else set(range(1, epochs + 1))
        return tuple(sorted(kept | {epochs}))

    def identity(self, start: Start, data: Data) -> str:
        """A digest of all that decides a run of ``start`` on ``data`` beside its first weights and its seed."""
        facts = {
            "recipe": dataclasses.asdict(self.recipe_of(start, 0)),
            "head": self.head_of(start),
            "size": self.image_size,
            "images": [data.images, data.per_class, self.tested],
            **({} if self._says_epochs(start) else {"epochs": "by images"}),
            **({"growth": start.settings} if start.kind == "learngene" and start.settings else {}),
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:12]

    def jobs(self) -> Iterator[Job]:
        """Every run, seed by seed; a "full" start has one shape, its own."""
        for seed in self.seeds:
            for data in self.data:
                for start in self.starts:
                    for shape in ("native",) if start.kind == "full" else self.shapes:
                        yield Job(start=start.name, shape=shape, data=data.name, seed=seed)


def numbers(facts: Mapping[str, Any]) -> dict[str, Any]:
    """YAML takes 1e-4 for text; people mean the number."""
    return {str(key): _number(value) for key, value in facts.items()}


def _number(value: Any) -> Any:
    if not isinstance(value, str):
        return numbers(value) if isinstance(value, Mapping) else value
    try:
        return float(value)
    except ValueError:
        return value


def parse_shape(written: str) -> tuple[int, int]:
    """(depth, width) of "12x384".

    Raises:
        SettingsError: it says none.
    """
    depth, times, width = str(written).partition("x")
    if not (times and depth.isdecimal() and width.isdecimal() and int(depth) and int(width)):
        raise SettingsError(f"shape {written!r} asked; DEPTHxWIDTH, such as 6x192, would work")
    return int(depth), int(width)
