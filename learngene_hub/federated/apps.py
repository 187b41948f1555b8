"""``client`` and ``server`` as ``flwr run`` starts them, a run on this machine, and the folder it takes."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path

from learngene_hub.errors import LearngeneError, SettingsError, StoreError, TrainingError
from learngene_hub.federated._app_files import app_files
from learngene_hub.federated._saved import FILE
from learngene_hub.federated.client import make_client_app
from learngene_hub.federated.memory import MemoryGrid, as_server
from learngene_hub.federated.server import Outcome, conduct, make_server_app
from learngene_hub.federated.settings import FLOWERS, Federation
from learngene_hub.federated.site import CLIENT_FILE, Site, require_writable

client = make_client_app()
server = make_server_app()

ENGINES = ("process", "flower")
SIMULATION_FILE = "simulation.json"  # in `out`: among how many clients a simulation divides the data
CLIENTS = "clients"  # folder in `out`: the private parts of clients that are simulated here


def simulate(settings: Federation, clients: int, *, engine: str = "process") -> Outcome:
    """A run with ``clients`` that divide the data, on this machine.

    Args:
        engine: "process": one after the other in this process; "flower": Flower's simulation runtime on Ray, several at
            a time (through ``run_simulation``, which Flower will replace by ``flwr run``). The numbers are the same.

    With ``out`` the private parts of the clients are kept in ``out/clients``, where ``client_state`` names no other
    folder; a run that begins anew there begins with new ones.

    Raises:
        TrainingError, SettingsError, StoreError, DataError: as ``conduct``.
    """
    if engine not in ENGINES:
        raise SettingsError(f"engine {engine!r} asked; there are {', '.join(ENGINES)}")
    require_clients(settings, clients)
    for client in range(clients):  # what each of them would raise in round 1, all at once and at the start
        Site.of(settings, {"partition-id": client, "num-partitions": clients})
    if settings.out:
        require_writable(Path(settings.out), "out")
        _require_same_clients(Path(settings.out), clients)
    settings = _with_client_state(settings)
    if settings.client_state:
        require_writable(Path(settings.client_state), "client_state")
    if engine == "process":
        as_server()
        return conduct(MemoryGrid.of(make_client_app(settings), clients), settings)
    return _in_flower(settings, clients)


def _require_same_clients(folder: Path, clients: int) -> None:
    """Nothing, where a run that goes on in ``folder`` divides the data among as many clients as it did; the number of a
    run that begins is written down.

    Raises:
        SettingsError: it divided them among another number: every client would go on with images of others.
        StoreError: the file does not say.
    """
    path = folder / SIMULATION_FILE
    if path.exists() and (folder / FILE).exists():
        try:
            before = int(json.loads(path.read_text("utf-8"))["clients"])
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise StoreError(f"{path} does not say among how many clients the data is divided; remove it") from error
        if before != clients:
            raise SettingsError(
                f"{clients} clients asked; the run in {folder} divided its data among {before}: {before}, or another "
                "out folder, would work"
            )
        return
    path.write_text(json.dumps({"clients": clients}) + "\n", "utf-8")


def require_clients(settings: Federation, clients: int) -> None:
    """Nothing, where so many clients are enough.

    Raises:
        SettingsError: they are fewer than one, or than the run waits for.
    """
    said, least = f"{clients} client{'' if clients == 1 else 's'} asked", max(settings.min_clients, 1)
    if clients < 1:
        raise SettingsError(f"{said}; {max(least, 2)} or more would work")
    if clients < least:
        raise SettingsError(
            f"{said}; a run waits for min_clients {least}: {least} or more, or the setting min_clients={clients}, "
            "would work"
        )


def _with_client_state(settings: Federation) -> Federation:
    """The settings with a folder for the clients' private parts, where a run is kept and clients have any.

    Those of a run of which the server kept nothing are removed: they are of rounds that no longer count.
    """
    if not settings.out or settings.client_state or settings.strategy in FLOWERS:
        return settings
    folder = Path(settings.out) / CLIENTS
    if not (Path(settings.out) / FILE).exists():
        try:
            for path in folder.glob(CLIENT_FILE.format("*")):
                path.unlink()
        except OSError as error:
            raise StoreError(f"cannot write into {folder}: {error.strerror}; another out folder would work") from error
    return replace(settings, client_state=str(folder))


def _in_flower(settings: Federation, clients: int) -> Outcome:
    from flwr.simulation import run_simulation

    found: list[Outcome] = []
    failed: list[LearngeneError] = []
    backend = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": {"log_to_driver": False}}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Tip: In future versions of Ray")  # of GPUs, which none asks for
            run_simulation(
                make_server_app(settings, found.append, failed.append), make_client_app(settings), clients,
                backend_config=backend,  # type: ignore[arg-type]
            )  # fmt: skip
    except (SystemExit, RuntimeError) as error:  # Flower leaves so, after it has logged why
        if failed:
            raise failed[0] from error
        raise TrainingError(f"Flower's simulation ended ({type(error).__name__} {error}); its log says why") from error
    if not found:
        raise TrainingError("Flower's simulation ended without a result; its log says why")
    return found[0]


def write_app(folder: Path, settings: Federation, clients: int) -> list[Path]:
    """The files of a Flower app in ``folder``, with these settings as its run_config; its README.md says how it is run,
    in simulation with so many ``clients``.

    Raises:
        SettingsError: fewer clients than the run waits for.
        StoreError: a file is there already, or cannot be written.
    """
    require_clients(settings, clients)
    text = app_files(settings, clients)
    paths = [folder / name for name in text]
    if there := [path for path in paths if path.exists()]:
        raise StoreError(f"{there[0]} is there already; an empty folder would work")
    try:
        for path, content in zip(paths, text.values(), strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content, encoding="utf-8")
    except OSError as error:
        raise StoreError(f"cannot write into {folder}: {error.strerror}; another folder would work") from error
    return paths
