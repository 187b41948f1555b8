"""CNNs: learngenes of a ResNet and of two VGGs that are trained here, and descendants beside their random twins.

    python benchmarks/cnn.py --data DIR
    python benchmarks/cnn.py --data DIR --probe
    python benchmarks/cnn.py --summarise

DIR holds cifar100/ and cifar10/, each with train.parquet and test.parquet. All settings stand in cnn.yaml. The classes
of cifar100 are shuffled once: the ancestors learn 64 of them, the search sees 16, the tasks are of the other 20. Three
stages, each of which is skipped where its result is there, so that a second call goes on:

    1  the ancestors: a ResNet and a VGG learn the 64 classes; a third, the collective, is a VGG that is widened from
       task to task (``heuristic.grow_collective``)
    2  a learngene of each arm, by ``auto`` or ``heuristic``
    3  every (set, arm, seed) is one run and one row of results/cnn.csv. Jobs go seed by seed.

What descendants learn: "tasks", 5-way with 20 images per class, one task per seed; and "cifar10", a set of its own.
``NAME-twin`` is the network of NAME with all that it inherits drawn anew: layers fresh in both start equal, and the
images come in one order. ``NAME+anchor`` has the learngene of NAME, and the quadratic term of
``heuristic.anchored_loss`` in its loss. An arm without a method is the whole ancestor with a fresh classifier, and has
no twin. Everything is trained with SGD at one rate per set, for the tasks the published one of heuristic learngene.

``--probe`` asks before any training how far the classes of the tasks are apart, and writes results/cnn_probe.json.

A row says of what it was made (``digest``: the inherited weights, or of a twin the shape; the recipe; the arm), and is
made again where that changes. ``_cnn_summary.py`` makes the tables and the plot.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from _arms import file_digest, machine
from _cnn_sources import (
    Sources,
    make_ancestor,
    make_learngene,
    open_ancestor,
    open_learngene,
    read_config,
    split_classes,
    write_facts,
)
from _runs import read_rows, run
from advantages import nearest_mean, of_classes
from torch import Tensor, nn

from learngene_hub._conv import ConvShape
from learngene_hub.data import Augment, Images, normalise, seed_of
from learngene_hub.factory import evaluate, expand
from learngene_hub.methods import get_method
from learngene_hub.methods.heuristic import anchor, anchored_loss
from learngene_hub.shape import IMAGENET
from learngene_hub.training import Loss, Recipe, classification_loss, image_batches

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
TWIN, ANCHOR = "-twin", "+anchor"


@dataclass(frozen=True, kw_only=True)
class Job:
    """One cell of the comparison."""

    set: str
    arm: str
    seed: int

    @property
    def base(self) -> str:
        """The arm whose learngene and shape it has."""
        return self.arm.removesuffix(TWIN).removesuffix(ANCHOR)


@dataclass(frozen=True, kw_only=True)
class Row(Job):
    """What a run of a job gave; a line of the CSV."""

    accuracies: str  # test accuracy, per cent, after the set's ``epochs``, with spaces between
    params: int
    inherited: int  # of these
    flops: int  # of one image's forward, two per multiply-add
    images_seen: int
    stored_bytes: int  # of the learngene's file, or of the ancestor's; 0: none
    extraction_seconds: float
    extraction_flops: int  # of forwards, the ancestor's own training left out
    seconds: float  # of growing, training and testing
    digest: str
    machine: str

    @property
    def job(self) -> Job:
        """The cell that this row fills."""
        return Job(set=self.set, arm=self.arm, seed=self.seed)

    @property
    def curve(self) -> list[float]:
        """The accuracies as numbers."""
        return [float(number) for number in self.accuracies.split()]


def images_of(set: str, seed: int, sources: Sources) -> tuple[Images, Images]:
    """(train, test) of a run; a task is drawn with the seed."""
    config = sources.read()
    stage = config["sets"][set]
    if "ways" not in stage:
        return sources.images(set, "train", stage["images"]), sources.images(set, "test", stage["test"])
    train, test = (sources.images(config["data"], split) for split in ("train", "test"))
    novel = split_classes(len(train.classes))[2]
    drawn = torch.randperm(len(novel), generator=torch.Generator().manual_seed(seed_of("task", seed)))[: stage["ways"]]
    classes = [novel[i] for i in drawn.tolist()]
    return of_classes(train, classes, stage["shots"], seed), of_classes(test, classes, None, seed)


def start(job: Job, sources: Sources, classes: int) -> tuple[nn.Module, list[str]]:
    """The network of a run at its start, and the names of what it inherits; of a twin, of what it would."""
    config = sources.read()
    about = config["arms"][job.base]
    if "method" in about:
        learngene = open_learngene(sources.learngene(job.base))
        model = expand(learngene, num_labels=classes, image_size=config["image_size"], seed=job.seed)
        shape = ConvShape.of(model)
        found = get_method(learngene.method, learngene.settings).expand(learngene, shape)
        names = [name for name, tensor in found.items() if tensor is not None]
    else:
        model, names = _whole(open_ancestor(sources.ancestor(about["ancestor"])), classes, job.seed)
    if job.arm.endswith(TWIN):
        redraw(model, names, job.seed)
    return model, names


def _whole(ancestor: nn.Module, classes: int, seed: int) -> tuple[nn.Module, list[str]]:
    """The ancestor with a fresh classifier of so many classes."""
    shape = ConvShape.from_dict(ConvShape.of(ancestor).to_dict() | {"classes": classes})
    model, state = shape.build(), dict(ancestor.state_dict())
    classifier = str(shape.pretrained_cfg(IMAGENET)["classifier"])
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if name.startswith(f"{classifier}."):
            state[name] = shape.fresh(name, tensor.shape, generator)
    model.load_state_dict(state, strict=True)
    return model.eval(), [name for name in state if not name.startswith(f"{classifier}.")]


@torch.no_grad()
def redraw(model: nn.Module, names: Sequence[str], seed: int) -> None:
    """Draw these entries of the state dict anew, as fresh layers are drawn; the others stay."""
    shape, state = ConvShape.of(model), model.state_dict()
    generator = torch.Generator().manual_seed(seed_of("twin", seed))
    for name in sorted(names):
        state[name].copy_(shape.fresh(name, state[name].shape, generator))


def loss_of(job: Job, model: nn.Module, sources: Sources) -> Loss:
    """Cross-entropy, of an anchored arm with the quadratic term around the values that ``model`` has now."""
    config = sources.read()
    plain = classification_loss(Recipe())
    if not job.arm.endswith(ANCHOR):
        return plain
    fisher: dict[str, Tensor] = anchor(open_learngene(sources.learngene(job.base)), ConvShape.of(model))
    return anchored_loss(model, list(fisher), fisher, config["arms"][job.base]["anchor"], plain)


def train(model: nn.Module, images: Images, stage: dict[str, Any], loss: Loss, seed: int, bf16: bool) -> Iterator[int]:
    """SGD at one rate; yields the number of each epoch that is done."""
    how = Recipe(epochs=1, batch_size=stage["batch_size"], seed=seed, augment=Augment(flip=True, crop_padding=4))
    batches, per_epoch = image_batches(images, how, IMAGENET)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=stage["lr"], momentum=stage["momentum"], weight_decay=stage["weight_decay"]
    )
    for epoch in range(max(stage["epochs"])):
        model.train()
        for batch, _ in zip(batches(epoch), range(per_epoch), strict=False):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                value = loss(model, batch)
            value.backward()
            optimizer.step()
        yield epoch + 1


def measure(job: Job, sources: Sources) -> Row:
    """One run of one job."""
    began, config = time.perf_counter(), sources.read()
    stage, precision = config["sets"][job.set], config["precision"]
    images, test = images_of(job.set, job.seed, sources)
    model, names = start(job, sources, len(images.classes))
    parameters = {name: p.numel() for name, p in model.named_parameters()}
    reached = [
        evaluate(model, test, precision=precision).accuracy
        for epoch in train(model, images, stage, loss_of(job, model, sources), job.seed, precision == "bf16")
        if epoch in stage["epochs"]
    ]
    twin, grown = job.arm.endswith(TWIN), "method" in config["arms"][job.base]
    made = open_learngene(sources.learngene(job.base)).provenance if grown and not twin else {}
    return Row(
        **asdict(job),
        accuracies=" ".join(f"{accuracy:.2f}" for accuracy in reached),
        params=sum(parameters.values()),
        inherited=0 if twin else sum(parameters.get(name, 0) for name in names),
        flops=ConvShape.of(model).flops(),
        images_seen=max(stage["epochs"]) * (len(images) // stage["batch_size"]) * stage["batch_size"],
        stored_bytes=0 if twin else stored(job.base, sources).stat().st_size,
        extraction_seconds=round(float(made.get("seconds", 0.0)), 2),
        extraction_flops=int(made.get("flops", 0)),
        seconds=round(time.perf_counter() - began, 2),
        digest=digest_of(job, sources),
        machine=machine("cpu"),
    )


@torch.no_grad()
def probe(job: Job, sources: Sources) -> dict[str, float]:
    """What the last features (B, C), averaged over the pixels, are worth to the first update: before any training.

    BatchNorm sees batch statistics, as it does then. "nearest_mean": accuracy of the nearest class mean, per cent.
    "rank": (sum e)^2 / sum e^2 over the eigenvalues e of their covariance, from 1 to C.
    """
    images, test = images_of(job.set, job.seed, sources)
    model, _ = start(job, sources, len(images.classes))
    model.train()
    features = [
        model.forward_features(normalise(each.pixels, IMAGENET)).mean((2, 3))  # type: ignore[operator]
        for each in (images, test)
    ]
    covariance = torch.cov(features[0].T.double())
    rank = covariance.trace() ** 2 / covariance.square().sum()
    found = nearest_mean(features[0], images.labels, features[1], test.labels)
    return {"nearest_mean": round(found, 2), "rank": round(float(rank), 2)}


def write_probe(arms: Sequence[str], sources: Sources, out: Path) -> None:
    """Probe every arm on every task, and write the numbers; an anchored one starts as the other does."""
    found = {}
    for arm in (arm for arm in arms if not arm.endswith(ANCHOR)):
        each = [
            probe(Job(set="tasks", arm=arm, seed=seed), sources) for seed in sources.read()["sets"]["tasks"]["seeds"]
        ]
        found[arm] = {key: [one[key] for one in each] for key in each[0]}
        print(arm, {key: round(statistics.fmean(values), 1) for key, values in found[arm].items()}, flush=True)
    out.with_name(f"{out.stem}_probe.json").write_text(json.dumps(found, indent=1) + "\n")


def stored(arm: str, sources: Sources) -> Path:
    """The file that an arm's networks are grown from."""
    about = sources.read()["arms"][arm]
    return sources.learngene(arm) if "method" in about else sources.ancestor(about["ancestor"])


def digest_of(job: Job, sources: Sources) -> str:
    """Of what a row of this job is made: what is inherited, or of a twin the network; the recipe; the anchor."""
    config = sources.read()
    about, stage = config["arms"][job.base], {k: v for k, v in config["sets"][job.set].items() if k != "seeds"}
    file = stored(job.base, sources)
    if "method" not in about:
        source = file_digest(str(file))
    else:
        source = open_learngene(file).digest
    if job.arm.endswith(TWIN):
        model, names = start(Job(set=job.set, arm=job.base, seed=0), sources, 5)
        source = json.dumps([ConvShape.of(model).to_dict(), sorted(names)])
    weight = about.get("anchor") if job.arm.endswith(ANCHOR) else None
    told = json.dumps([source, stage, weight, config["precision"], config["image_size"]], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def arms_of(config: dict[str, Any]) -> list[str]:
    """Every arm: those of the settings, anchored too where they have a weight, and twins of their own."""
    found = []
    for name, about in config["arms"].items():
        found += [name, *([name + ANCHOR] if "anchor" in about else [])]
        found += [name + TWIN] if "method" in about and "twin" not in about else []
    return found


def told(job: Job, row: Row) -> str:
    """A line of the third stage."""
    return f"{job.set} {job.arm} seed {job.seed}: {row.accuracies} in {row.seconds:.0f} s"


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of cifar100/ and cifar10/")
    parser.add_argument("--config", type=Path, default=ROOT / "benchmarks" / "cnn.yaml")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "cnn", help="where the first two stages write")
    parser.add_argument("--arms", help="of those of the settings; default: all, with their twins")
    parser.add_argument("--sets", help="default: those of the settings")
    parser.add_argument("--seeds", help="default: those of each set")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each; default: 2")
    parser.add_argument("--out", type=Path, default=RESULTS / "cnn.csv")
    parser.add_argument("--probe", action="store_true", help="only probe what the first two stages have made")
    parser.add_argument("--summarise", action="store_true", help="only summarise the rows of --out, beside it")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, then summarise; or only that."""
    args = arguments(argv)
    config = read_config(args.config)
    failed = 0
    if not args.summarise:
        if args.data is None:
            raise SystemExit("--data is missing: the folder of the data sets")
        sources = Sources(data=args.data, work=args.work, config=args.config)
        arms = args.arms.split(",") if args.arms else arms_of(config)
        if unknown := set(arms) - set(arms_of(config)):
            raise SystemExit(f"no arm {', '.join(sorted(unknown))}; there are {', '.join(arms_of(config))}")
        if args.probe:
            write_probe(arms, sources, args.out)
            return 0
        failed = _run(args, sources, arms)
    from _cnn_summary import write_summary

    rows = read_rows(args.out, Row)
    if not rows:
        raise SystemExit("no rows to summarise; run the comparison first")
    print(write_summary(rows, args.out.with_suffix(""), config))
    return 1 if failed else 0


def _run(args: argparse.Namespace, sources: Sources, arms: Sequence[str]) -> int:
    """The three stages; how many runs failed."""
    config = sources.read()
    bases = list(dict.fromkeys(Job(set="", arm=arm, seed=0).base for arm in arms))
    torch.set_num_threads(1)
    for name in dict.fromkeys(config["arms"][arm]["ancestor"] for arm in bases):
        make_ancestor(name, sources)
    for arm in bases:
        if "method" in config["arms"][arm]:
            make_learngene(arm, sources)
    write_facts(args.out, sources)
    chosen = args.sets.split(",") if args.sets else list(config["sets"])
    wanted = []
    for set in chosen:
        seeds = [int(seed) for seed in args.seeds.split(",")] if args.seeds else config["sets"][set]["seeds"]
        wanted += [Job(set=set, arm=arm, seed=seed) for seed in seeds for arm in arms]
    digests = {(set, arm): digest_of(Job(set=set, arm=arm, seed=0), sources) for set in chosen for arm in arms}
    done = {row.job for row in read_rows(args.out, Row) if row.digest == digests.get((row.set, row.arm))}
    todo = [job for job in wanted if job not in done]
    print(f"{len(wanted)} runs, {len(wanted) - len(todo)} there already", flush=True)
    return run(todo, functools.partial(measure, sources=sources), told, args.workers, args.out)


if __name__ == "__main__":
    sys.exit(main())
