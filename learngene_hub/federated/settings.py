"""Federation: everything that a run is told, checked; and its two other forms, Flower's run_config and JSON."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from learngene_hub._check import is_number, require_int
from learngene_hub.errors import SettingsError

OURS: Mapping[str, str] = {  # run by GeneFL; they differ in the layers that are sent
    "gene-fl": "the layers that losses hang on most, averaged per cluster; leaves a learngene per cluster",
    "early": "a control: always the first layers, as many as gene-fl sends; leaves a learngene per cluster",
    "late": "a control: always the last layers, as many; leaves a learngene per cluster",
    "local": "a baseline: no weight is sent, each client trains alone; leaves no learngene",
}
FLOWERS: Mapping[str, str] = {  # run by Flower's own FedAvg and FedProx
    "fedavg": "a baseline: Flower's FedAvg of the whole model; leaves no learngene",
    "fedprox": "a baseline: Flower's FedProx of the whole model, with mu; leaves no learngene",
    "fedavg-bytes": "a baseline: FedAvg stopped after the bytes that gene-fl sends in `rounds`, though never before "
    "its first round, which may take more; leaves no learngene",
}
STRATEGIES: Mapping[str, str] = {**OURS, **FLOWERS}  # name -> what it sends and leaves
CHOICES: Mapping[str, tuple[str, ...]] = {
    "strategy": tuple(STRATEGIES),
    "partition": ("dirichlet", "labels", "domain"),
    "family": ("vit", "vgg"),
    "share": ("blocks", "everything"),
    "criterion": ("sensitive", "stable"),
    "weight": ("n", "n*exp(-drift)"),
    "subspace": ("features", "pixels"),
    "distance": ("mean", "smallest"),
    "wire": ("float32", "float16"),
}


@dataclass(frozen=True, kw_only=True)
class Federation:
    """The settings of a federated run. Source: those of GENE-FL and DFL2G where they are known, else our reading.

    Raises:
        SettingsError: a setting is out of its range.
    """

    strategy: str = "gene-fl"  # what is sent, and what the run leaves
    rounds: int = 10  # of training and averaging; of fedavg-bytes as many as its bytes allow, at least one
    seed: int = (
        0  # of the first model, which every client draws for itself, and of every other draw; same seed, same run
    )
    # Data, of a client.
    data: str = "signdigits"  # a sample, folder, parquet file or Hub data set; a SuperNode's own `data` goes before it
    split: str = "train"  # of the data
    limit: int = 0  # images of the whole set that are used, drawn at random; 0: all
    classes: int = 0  # of the classifier; 0: read from the data, which the server must then have too
    partition: str = "dirichlet"  # dirichlet (over labels), labels (a few per client), domain (a column)
    alpha: float = 0.5  # of the Dirichlet distribution; smaller is more uneven
    labels_per_client: int = 2  # of the partition labels
    domain_column: str = "domain"  # of the partition domain
    held_out: float = 0.25  # share of a client's images that it tests on
    # Model.
    family: str = "vit"  # vit, or vgg: VGG-11 with batch norm and a linear classifier
    depth: int = 0  # blocks of the native network; 0: as many as the ancestor has, or 6
    depths: str = ""  # blocks of client 0, 1, ... in turn, as "4,6"; empty: all native
    width: int = 0  # numbers per token; 0: as many as the ancestor has, or 96
    heads: int = 0  # of each block; 0: as wide as the ancestor's, or 3
    patch: int = 0  # pixels, of a random ViT; 0: 8. An ancestor keeps its own
    image_size: int = 32  # pixels, with an ancestor too; its patches must tile them
    ancestor: str = ""  # a learngene, or timm's name of a ViT; empty: random, from the seed
    ancestor_weights: str = ""  # a safetensors file, for a name of timm's
    # What is sent.
    blocks: int = 0  # layers of a learngene; 0: floor(P / (4 layer)), which makes it four times smaller than the model
    share: str = "blocks"  # everything: stem, last norm and classifier are sent too
    criterion: str = "sensitive"  # the layers that are sent: sensitive, or stable
    freeze_round: int = 5  # the choice is made anew until this round, then kept
    smoothing: float = 0.3  # share of a round's own xi in the cluster's
    weight: str = "n"  # of a client in the average: its images; or n*exp(-drift), drift = |update| / |received|
    wire: str = "float32"  # numbers on the wire; float16 halves the bytes, of FedAvg too
    # Clusters.
    clusters: int = 2  # 1: none are sought; 0: as many as stay apart by `threshold`
    threshold: float = 45.0  # degrees, of the average linkage, for clusters 0
    subspace: str = "features"  # of a frozen public encoder; pixels: raw, from which near-images may be recovered
    vectors: int = 3  # singular vectors per class
    min_per_class: int = (  # images that a class needs to show in the subspace; without one all images are one class,
        20  # and a client with fewer in all tells none and joins the cluster of most clients
    )
    noise: float = 0.0  # deviation of normal noise on the basis before it is sent, times 1 / sqrt(D); 0: none
    distance: str = "mean"  # of the principal angles, degrees; or the smallest
    far: float = (
        0.0  # a newcomer farther than this many intra-cluster means takes the global gene; 0: never, 1.5: usual
    )
    # Training at a client.
    epochs: int = 3  # per round
    lr: float = 1e-3  # of AdamW, constant
    batch_size: int = 32  # images per update
    weight_decay: float = 0.05  # of tensors of two and more dimensions; 0: none
    mu: float = 1e-2  # of the smoothing term, and of FedProx; 0: off
    nu: float = 1e-2  # of the term on parameters of high Fisher information; 0: off
    fisher_images: int = 64  # at most, for Fisher information and sensitivity
    quantile: float = 0.8  # of the Fisher information, above which a parameter is held
    paper_mode: bool = False  # one lam for both terms, zeta 1, no weights
    lam: float = 0.1  # of paper_mode: mu = nu = lam^2
    # The run.
    fraction: float = 1.0  # of the clients, in each round
    min_clients: int = 2  # wait for so many
    timeout: float = 3600.0  # seconds that a round waits for replies
    wait: float = 600.0  # seconds to wait for min_clients
    max_drift: float = 10.0  # updates more than so many times the cluster's median are left out
    out: str = ""  # folder of learngenes, traffic and plot; empty: nothing is written
    client_state: str = ""  # folder for clients' private parts, to outlive a run; empty: out/clients if simulated here

    def __post_init__(self) -> None:
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise SettingsError(f"{name} {getattr(self, name)!r} asked; there are {', '.join(known)}")
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if isinstance(least, int):
                require_int(name, value, at_least=least, error=SettingsError)
            elif not (is_number(value) and value >= least):
                raise SettingsError(f"{name} {value!r} asked; it is a number of at least {least:g}")
        for name in ("alpha", "lr", "timeout", "max_drift"):
            if not getattr(self, name) > 0:
                raise SettingsError(f"{name} {getattr(self, name)!r} asked; it is above 0")
        for name in ("held_out", "quantile", "fraction", "smoothing"):
            if not (is_number(getattr(self, name)) and 0 < getattr(self, name) <= 1):
                raise SettingsError(f"{name} {getattr(self, name)!r} asked; it is a share above 0, at most 1")
        if not self.held_out < 1:
            raise SettingsError("held_out 1 asked; nothing would be left to train on: 0.25 would work")
        if self.ancestor_weights and not self.ancestor:
            raise SettingsError("ancestor_weights asked without ancestor; timm's name of the model is its name")
        self.depth_list()

    def depth_list(self) -> tuple[int, ...]:
        """The numbers of ``depths``.

        Raises:
            SettingsError: it is no list of depths.
        """
        parts = [part.strip() for part in self.depths.split(",")] if self.depths.strip() else []
        if not all(part.isdecimal() and 1 <= int(part) <= 1000 for part in parts if len(part) < 5) or any(
            len(part) > 4 for part in parts
        ):
            raise SettingsError(f"depths {self.depths!r} asked; it is a list of blocks such as '4,6'")
        return tuple(int(part) for part in parts)

    @property
    def constraint(self) -> tuple[float, float]:
        """(mu, nu); in paper_mode lam^2 twice."""
        return (self.lam**2, self.lam**2) if self.paper_mode else (self.mu, self.nu)

    def to_run_config(self) -> dict[str, str | int | float | bool]:
        """Flower's run_config: the same names with hyphens."""
        return {field.name.replace("_", "-"): getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_run_config(cls, config: Mapping[str, Any]) -> Federation:
        """The inverse; what is left out has its default.

        Raises:
            SettingsError: an unknown name, or a value of another kind.
        """
        return federation({str(name).replace("-", "_"): value for name, value in config.items()})


_LEAST: Mapping[str, int | float] = {
    "rounds": 1, "seed": 0, "limit": 0, "classes": 0, "labels_per_client": 1, "depth": 0, "width": 0, "heads": 0,
    "patch": 0, "image_size": 1, "blocks": 0, "freeze_round": 1, "clusters": 0, "vectors": 1, "min_per_class": 1,
    "epochs": 1, "batch_size": 1, "fisher_images": 1, "min_clients": 1, "alpha": 0.0, "threshold": 0.0, "noise": 0.0,
    "far": 0.0, "lr": 0.0, "weight_decay": 0.0, "mu": 0.0, "nu": 0.0, "lam": 0.0, "timeout": 0.0, "wait": 0.0,
    "max_drift": 0.0,
}  # fmt: skip
_KINDS: Mapping[str, type] = {"str": str, "int": int, "float": float, "bool": bool}
_KIND_WORDS: Mapping[str, str] = {"str": "a text", "int": "an int", "float": "a number", "bool": "true or false"}


def federation(settings: Mapping[str, Any]) -> Federation:
    """The settings of these names and values, as a file or a command line gives them.

    Raises:
        SettingsError: an unknown name, or a value of another kind than the setting's.
    """
    kinds = {field.name: str(field.type) for field in fields(Federation)}
    if unknown := sorted(map(str, settings.keys() - kinds.keys())):
        near = difflib.get_close_matches(unknown[0].replace("-", "_").lower(), kinds, n=1, cutoff=0.6)
        known = f"did you mean {near[0]}?" if near else f"there are {', '.join(kinds)}"
        raise SettingsError(f"no setting {unknown[0]!r:.60} of a federation; {known}")
    given = {}
    for name, value in settings.items():
        wanted = kinds[name]
        if wanted == "float" and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if wanted == "str" and isinstance(value, int | float) and not isinstance(value, bool):
            value = str(value)  # depths=6 on a command line
        if wanted == "int" and isinstance(value, float) and value.is_integer():
            value = int(value)
        if type(value) is not _KINDS[wanted]:
            raise SettingsError(f"{name} {value!r:.60} asked; it is {_KIND_WORDS[wanted]}")
        given[name] = value
    return Federation(**given)
