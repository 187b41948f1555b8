"""The files of a Flower app: what ``flwr run`` takes, and a README for whoever runs it. Private to ``apps.py``."""

from __future__ import annotations

import json

from learngene_hub._version import __version__
from learngene_hub.federated.settings import FLOWERS, Federation

_TEMPLATE = """\
# A Flower app: `flwr run .` runs it in simulation, `flwr run . NAME` on the SuperLink of that name in Flower's config.
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "gene-fl"
version = "0.1.0"
description = "Learngenes condensed, exchanged and inherited across clients that cannot share data"
license = "Apache-2.0"
dependencies = ["flwr[simulation]>=1.41", "learngene-hub[federated]>={version}"]

[tool.hatch.build.targets.wheel]
packages = ["gene_fl"]

[tool.flwr.app]
publisher = "learngene"

[tool.flwr.app.components]
serverapp = "gene_fl.server_app:app"
clientapp = "gene_fl.client_app:app"

# `learngene federate --list-settings` says what these are; `--run-config "rounds=20 mu=0.1"` changes some for one run.
[tool.flwr.app.config]
{config}
"""
_MODULE = """\
\"\"\"The {what}.\"\"\"

from learngene_hub.federated.apps import {what} as app

__all__ = ["app"]
"""
_README = """\
# GENE-FL on Flower

Learngenes condensed, exchanged and inherited across clients that cannot share data, by `learngene_hub`. The settings
are the run_config in `pyproject.toml`; `learngene federate --list-settings` says what each of them is.

## In simulation, on one machine

    pip install 'learngene-hub[federated]'
    export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1   # all is installed: Flower need not do it again
    flwr run . --federation-config 'num-supernodes={clients}' --stream

Flower's own default is 2 SuperNodes. Here {clients} clients divide the data set `{data}`; the run waits for {least}.
`--run-config 'rounds=3 lr=0.0005'` changes settings for one run.

## On a SuperLink with SuperNodes

1. On the server, with learngene-hub[federated] installed (for TLS and authentication see Flower's documentation):

       flower-superlink --insecure --host 0.0.0.0 --disable-runtime-dependency-installation

2. On each client's machine, with learngene-hub[federated] installed and its own images:

       flower-supernode --insecure --superlink SERVER:8000 --node-config 'data="/absolute/path/of/its/images"'

   `data` is a folder of images by class, a parquet file or a Hub data set. Classes must agree in number and order at
   all clients; give their number as `classes`, for the server has no images. To divide one data set instead, as an
   experiment: `--node-config 'partition-id=0 num-partitions={clients}'`, and 1, 2, ... at the others. Several
   SuperNodes of one machine need a `--port` each.
3. On your machine, in Flower's `config.toml` (in `~/.flwr`, or where FLWR_HOME says):

       [superlink.mine]
       address = "SERVER:8000"
       insecure = true

4. `flwr run . mine --stream`; `flwr log RUN_ID mine` shows the log later.

The run begins when `min-clients` ({least}) SuperNodes are there.

## What it leaves

{leaves}
Private parts of clients are kept between rounds by Flower. To outlive a SuperNode they need `client-state`, a folder
on the client's machine that no two clients share (now {state}).
"""


def app_files(settings: Federation, clients: int) -> dict[str, str]:
    """Name -> text of each file, for so many ``clients`` in simulation."""
    config = "\n".join(f"{name} = {_toml(value)}" for name, value in settings.to_run_config().items())
    readme = _README.format(
        clients=clients, data=settings.data, least=settings.min_clients, leaves=_leaves(settings),
        state=f"`{settings.client_state}`" if settings.client_state else "empty",
    )  # fmt: skip
    return {
        "pyproject.toml": _TEMPLATE.format(version=__version__, config=config),
        "gene_fl/__init__.py": '"""GENE-FL, from learngene_hub."""\n',
        "gene_fl/server_app.py": _MODULE.format(what="server"),
        "gene_fl/client_app.py": _MODULE.format(what="client"),
        "README.md": readme,
    }


def _leaves(settings: Federation) -> str:
    """What lies in ``out`` after the run."""
    if not settings.out:
        return (
            "Nothing, for `out` is empty: set it to an absolute path on the machine of the ServerApp, in\n"
            "`pyproject.toml` or by `--run-config 'out=\"/absolute/path\"'`.\n"
        )
    model = settings.strategy in (*FLOWERS, "local")
    what = "no learngene (a baseline)" if model else "a learngene per cluster with its card"
    return (
        f"In `{settings.out}` on the machine of the ServerApp (an absolute path is safest): {what},\n"
        "`rounds.jsonl`, `traffic.jsonl`, `traffic.png`, and `server.npz`, with which the same command goes on after\n"
        "an interruption. That one holds what clients told of their data: keep it to yourself.\n"
    )


def _toml(value: str | int | float | bool) -> str:
    """A value as TOML writes it; a string's escapes are JSON's."""
    return json.dumps(value)
