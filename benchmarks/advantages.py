"""The four advantages that Auto-Learngene claims for its descendants, measured on real images by one command.

    python benchmarks/advantages.py --data DIR --ancestor deit_tiny.safetensors
    python benchmarks/advantages.py --data DIR --ancestor deit_tiny.safetensors --measures curve,shots --seeds 3,4,5
    python benchmarks/advantages.py --summarise

DIR holds SET/train.parquet and test.parquet (--set, cifar100); the ancestor is a safetensors file of timm's
deit_tiny_patch16_224. Measured are

    1  epochs until a fixed test accuracy
    2  the spread of the accuracy over a grid of learning rates and weight decays
    3  the accuracy after a fixed number of updates
    4  the accuracy after as many updates on 1, 5, 10 and 20 images per class

and, before any training, how far the classes are apart in the class token and in the patch tokens (``probe``); of ViTs
that differ in nothing but what they start from:

    auto      the blocks that the search found                  (``learngene_hub/methods/auto.py``)
    random    as many of the ancestor's blocks, drawn by the seed, in its order: the control for the search
    first     its first blocks
    last      its last blocks
    published the list that the authors' code has for a ViT of twelve blocks: the first two and the last four
    scratch   nothing
    ancestor  the whole ancestor, twice the depth

The protocol is the published one as far as it is known, small: 5-way tasks of 20 images per class from novel classes,
SGD with momentum 0.9 at one rate. The classes of the set are shuffled once; a sixth is for the search (open-world), a
fifth for tasks (novel); the two share none. The seed of a task draws its classes and images, and an order of the images
for all arms alike. The grid is ours, the paper's is unknown; so are the rates of the search, whose published ones are
for a hundred times as many updates. An "epoch" is one pass over 20 images per class, whatever the task has.

Two stages, each of which is skipped where its result is there, so that a second call goes on: the search makes
WORK/auto.safetensors; every run is one row of the CSV. A row made from another learngene is stale and is made again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from _advantages_summary import ARMS, EPOCHS, MEASURES, Job, Row, as_text, draw, summarise
from _arms import file_digest, machine, open_ancestor
from _runs import read_rows, run
from torch import Tensor, nn

from learngene_hub.data import Augment, Images, load_images, normalise, seed_of
from learngene_hub.factory import evaluate, expand, extract
from learngene_hub.learngene import Learngene
from learngene_hub.methods.auto import PUBLISHED
from learngene_hub.shape import IMAGENET, ViTShape
from learngene_hub.training import Recipe, Step, image_batches

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SIZE = 64  # pixels
WAYS, SHOTS = 5, (1, 5, 10, 20)
BATCH = 20
BASE = (3e-3, 5e-4)  # learning rate and weight decay outside of the grid; the rate was chosen on task 100
RATES, DECAYS = (1e-4, 1e-3, 1e-2, 1e-1), (0.0, 1e-4, 5e-4, 1e-3)
PER_EPOCH = WAYS * max(SHOTS) // BATCH  # updates
GRID_EPOCHS = 6
TARGET = 55.0  # test accuracy, per cent, of WAYS classes
SEARCH = {  # few updates, so phi is faster than published (1e-4) and P is a little slower (0.1)
    "epochs": 10,
    "batch_size": 32,
    "lr": 0.03,
    "meta_lr": 0.03,
    "crop_padding": 4,
}


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Where a worker finds what it needs."""

    data: str
    set: str
    ancestor: str
    work: str
    limit: int | None  # images of the train split that are read, and a quarter as many of the test split

    @property
    def learngene(self) -> Path:
        return Path(self.work) / "auto.safetensors"

    def load(self, split: str) -> Images:
        limit = self.limit if split == "train" or self.limit is None else max(1, self.limit // 4)
        return _load(str(Path(self.data) / self.set), split, limit)


@lru_cache(maxsize=2)
def _load(folder: str, split: str, limit: int | None) -> Images:
    return load_images(folder, split=split, size=SIZE, limit=limit)


def split_classes(count: int) -> tuple[list[int], list[int]]:
    """(open-world, novel) classes of a set: 16 and 20 of 100, as published; at least 2 and as many as a task has.

    Raises:
        SystemExit: the set has too few.
    """
    if count < WAYS + 2:
        raise SystemExit(f"a set of {count} classes given; {WAYS + 2} are the least")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    novel = max(WAYS, count // 5)
    return order[: max(2, min(count * 16 // 100, count - novel))], order[count - novel :]


def of_classes(images: Images, classes: Sequence[int], per_class: int | None, seed: int) -> Images:
    """The images of these classes, relabelled in this order; ``per_class`` of each, drawn with the seed.

    A smaller number of images is always a part of a larger one.
    """
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed_of("shots", seed)))
    chosen = [order[images.labels[order] == label][:per_class] for label in classes]
    labels = torch.cat([torch.full((len(part),), place) for place, part in enumerate(chosen)])
    names = tuple(images.classes[label] for label in classes)
    return Images(images.pixels[torch.cat(chosen)], labels, names, images.name)


def task(sources: Sources, seed: int, shots: int) -> tuple[Images, Images]:
    """(train, test) of the task number ``seed``."""
    train = sources.load("train")
    novel = split_classes(len(train.classes))[1]
    drawn = torch.randperm(len(novel), generator=torch.Generator().manual_seed(seed_of("task", seed)))[:WAYS]
    classes = [novel[i] for i in drawn.tolist()]
    return of_classes(train, classes, shots, seed), of_classes(sources.load("test"), classes, None, seed)


def search(sources: Sources, settings: dict[str, Any], per_class: int, watch: Callable[..., Any]) -> Learngene:
    """The learngene of the arm auto, found on the open-world classes; made once."""
    path = sources.learngene
    if not path.exists():
        train = sources.load("train")
        images = of_classes(train, split_classes(len(train.classes))[0], per_class, 0)
        facts = {"name": "deit_tiny_patch16_224", "sha256": file_digest(sources.ancestor), "license": "Apache-2.0"}
        path.parent.mkdir(parents=True, exist_ok=True)
        ancestor = open_ancestor(sources.ancestor)
        extract("auto", ancestor, {sources.set: images}, settings=settings, facts=facts, watch=watch).save(path)
    return Learngene.load(path)


def blocks_of(arm: str, count: int, depth: int, seed: int) -> list[int]:
    """Which ``count`` of an ancestor's ``depth`` blocks an arm without a search inherits."""
    if arm == "published":
        family, there, blocks = PUBLISHED["dino-vits16"]
        if (there, len(blocks)) != (depth, count):
            raise SystemExit(
                f"arm published keeps {len(blocks)} of {there} blocks of a {family}, not {count} of {depth}"
            )
        return list(blocks)
    if arm == "random":
        generator = torch.Generator().manual_seed(seed_of("blocks", seed))
        return sorted(torch.randperm(depth, generator=generator)[:count].tolist())
    return list(range(count)) if arm == "first" else list(range(depth - count, depth))


def learngene_of(arm: str, sources: Sources, seed: int) -> Learngene | None:
    """What an arm is grown from; None: nothing."""
    if arm == "scratch":
        return None
    ancestor = open_ancestor(sources.ancestor)
    if arm == "ancestor":
        return extract("net2net", ancestor, {})
    found = Learngene.load(sources.learngene)
    if arm == "auto":
        return found
    kept = blocks_of(arm, found.reach.depths[0], found.shape.depth, seed)
    return extract("auto", ancestor, {}, settings={"layers": kept})


def start(learngene: Learngene | None, depth: int | None, like: ViTShape, seed: int) -> nn.Module:
    """The ViT of a task at its start; where nothing is inherited, as timm starts it."""
    if learngene is not None:
        return expand(learngene, depth=depth, num_labels=WAYS, image_size=SIZE, seed=seed)
    shape = ViTShape(**{**asdict(like), "depth": depth or like.depth, "classes": WAYS, "image_size": SIZE})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return shape.build()


def train(model: nn.Module, images: Images, job: Job) -> Iterator[int]:
    """SGD with momentum 0.9 at one rate; yields the number of each epoch of PER_EPOCH updates that is done."""
    recipe = Recipe(epochs=1, batch_size=min(BATCH, len(images)), seed=job.seed, augment=Augment(flip=True))
    batches, per_pass = image_batches(images, recipe, IMAGENET)
    optimizer = torch.optim.SGD(model.parameters(), lr=job.lr, momentum=0.9, weight_decay=job.decay)
    stream = (batch for number in range(job.epochs * PER_EPOCH) for batch in batches(number))
    model.train()
    for update in range(1, job.epochs * PER_EPOCH + 1):
        x, y = next(stream)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        if update % PER_EPOCH == 0:
            yield update // PER_EPOCH


def measure(job: Job, sources: Sources) -> Row:
    """One run."""
    began = time.perf_counter()
    images, test = task(sources, job.seed, job.shots)
    learngene = learngene_of(job.arm, sources, job.seed)
    found = Learngene.load(sources.learngene)
    depth = None if job.arm == "ancestor" else found.reach.depths[0]
    model = start(learngene, depth, found.shape, job.seed)
    if job.measure == "probe":
        accuracies = probe(model, images, test)
    else:
        accuracies = [
            evaluate(model, test).accuracy
            for epoch in train(model, images, job)
            if job.measure == "curve" or epoch == job.epochs
        ]
    return Row(
        **asdict(job),
        accuracies=" ".join(f"{accuracy:.2f}" for accuracy in accuracies),
        params=sum(p.numel() for p in model.parameters()),
        seconds=round(time.perf_counter() - began, 2),
        digest=digest_of(job.arm, sources),
        machine=machine("cpu"),
    )


def digest_of(arm: str, sources: Sources) -> str:
    """What a row of this arm depends on beside its job: all but auto on the number of kept blocks and the ancestor."""
    found = Learngene.load(sources.learngene)
    return found.digest[:12] if arm == "auto" else f"{file_digest(sources.ancestor)[:12]}-{found.reach.depths[0]}"


@torch.no_grad()
def probe(model: nn.Module, train: Images, test: Images) -> list[float]:
    """How far classes are apart before any training: ``nearest_mean`` of the class token, and of the mean patch token.

    Both are taken after the last norm.
    """
    model.eval()
    sides = [model.forward_features(normalise(each.pixels, IMAGENET)) for each in (train, test)]  # type: ignore[operator]
    return [
        nearest_mean(take(sides[0]), train.labels, take(sides[1]), test.labels)
        for take in (lambda tokens: tokens[:, 0], lambda tokens: tokens[:, 1:].mean(1))  # (B, D)
    ]


def nearest_mean(train: Tensor, labels: Tensor, test: Tensor, wanted: Tensor) -> float:
    """Accuracy, per cent, of the nearest class mean by the cosine; features (B, D), centred on the training mean."""
    centre = train.mean(0)
    means = torch.stack([(train - centre)[labels == label].mean(0) for label in range(int(labels.max()) + 1)])
    nearest = torch.cosine_similarity((test - centre)[:, None], means[None], dim=-1).argmax(1)
    return 100.0 * float((nearest == wanted).float().mean())


def jobs(arms: Sequence[str], seeds: Iterable[int], measures: Sequence[str] = MEASURES) -> list[Job]:
    """Every run of these measures, seed by seed, the grid last."""
    found = []
    for seed in seeds:
        base = {"lr": BASE[0], "decay": BASE[1], "seed": seed}
        most = max(SHOTS)
        found += [Job(measure="probe", arm=arm, shots=most, epochs=0, **base) for arm in arms]
        found += [Job(measure="curve", arm=arm, shots=most, epochs=EPOCHS, **base) for arm in arms]
        fewer = [shots for shots in SHOTS if shots != most]
        found += [Job(measure="shots", arm=arm, shots=n, epochs=EPOCHS, **base) for n in fewer for arm in arms]
        for lr in RATES:
            for decay in DECAYS:
                cell = {"lr": lr, "decay": decay, "seed": seed, "shots": most, "epochs": GRID_EPOCHS}
                found += [Job(measure="grid", arm=arm, **cell) for arm in arms]
    return [job for job in found if job.measure in measures]


def _told(job: Job, row: Row) -> str:
    return f"{job.measure} {job.arm} lr {job.lr:g} wd {job.decay:g} {job.shots}/class seed {job.seed}: {row.final:.1f}"


def _show(steps: Iterator[Step]) -> Iterator[Step]:
    for step in steps:
        if step.epoch_done:
            print(f"search, epoch {step.epoch + 1}: loss {step.loss:.3f}, {step.seconds:.0f} s", flush=True)
        yield step


class _Work:
    """``measure`` with its sources, which a worker process can be handed."""

    def __init__(self, sources: Sources) -> None:
        self.sources = sources

    def __call__(self, job: Job) -> Row:
        return measure(job, self.sources)


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with one folder of parquet files (train, test) per data set")
    parser.add_argument("--set", default="cifar100", help="default: cifar100")
    parser.add_argument("--ancestor", help="safetensors file of timm's deit_tiny_patch16_224")
    parser.add_argument("--arms", default=",".join(ARMS), help=f"default: {','.join(ARMS)}")
    parser.add_argument("--seeds", default="0,1,2", help="tasks; default: 0,1,2")
    parser.add_argument("--measures", default=",".join(MEASURES), help=f"default: {','.join(MEASURES)}")
    parser.add_argument("--limit", type=int, default=20_000, help="images read of the train split; default: 20000")
    parser.add_argument("--search-images", type=int, default=40, help="per class of the search; default: 40")
    parser.add_argument("--search-epochs", type=int, default=SEARCH["epochs"], help="default: %(default)s")
    parser.add_argument("--target", type=float, default=TARGET, help="accuracy of measure 1; default: %(default)s")
    parser.add_argument("--jobs", type=int, help="make at most so many of the missing runs")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each; default: 2")
    parser.add_argument("--work", default=str(ROOT / "build" / "advantages"), help="default: build/advantages")
    parser.add_argument("--out", type=Path, default=RESULTS / "advantages.csv")
    parser.add_argument("--summarise", action="store_true", help="only summarise the rows of --out, beside it")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, then summarise; or only that."""
    args = arguments(argv)
    failed = 0
    if not args.summarise:
        if args.data is None or args.ancestor is None:
            raise SystemExit("--data and --ancestor are needed: the images, and the weights to inherit")
        if unknown := set(args.arms.split(",")) - set(ARMS):
            raise SystemExit(f"no arm {', '.join(sorted(unknown))}; there are {', '.join(ARMS)}")
        measures = args.measures.split(",")
        if unknown := set(measures) - set(MEASURES):
            raise SystemExit(f"no measure {', '.join(sorted(unknown))}; there are {', '.join(MEASURES)}")
        sources = Sources(data=args.data, set=args.set, ancestor=args.ancestor, work=args.work, limit=args.limit)
        search(sources, SEARCH | {"epochs": args.search_epochs}, args.search_images, _show)
        wanted = jobs(args.arms.split(","), [int(seed) for seed in args.seeds.split(",")], measures)
        digests = {arm: digest_of(arm, sources) for arm in args.arms.split(",")}
        done = {row.job for row in read_rows(args.out, Row) if row.digest == digests.get(row.arm)}
        todo = [job for job in wanted if job not in done]
        print(f"{len(wanted)} runs, {len(wanted) - len(todo)} there already", flush=True)
        failed = run(todo[: args.jobs], _Work(sources), _told, args.workers, args.out)
    rows = read_rows(args.out, Row)
    if not rows:
        raise SystemExit("no rows to summarise; run the comparison first")
    summary = summarise(rows, args.target)
    args.out.with_suffix(".json").write_text(json.dumps(summary, indent=1) + "\n")
    draw(summary, args.out.with_suffix(".png"))
    print(as_text(summary))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
