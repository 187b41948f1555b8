"""GENE-FL on Flower: clients that cannot share images exchange learngenes, a few whole layers, instead of models.

    settings   ``Federation``, everything that a run is told; the same names, with hyphens, are Flower's run_config
    partition  who has which images: Dirichlet, pathological labels, by domain
    subspace   one-shot clustering by the principal angles between clients' data subspaces
    models     the network that a client begins with: from a shared seed, or from a pre-trained ancestor
    local      training at a client: cross-entropy, and the quadratic constraint on what was received
    client     the ClientApp's handlers: the subspace, a round, a newcomer
    strategy   ``GeneFL``, a Flower strategy; ``_introduction`` reads what a client tells once, ``_membership`` finds
               its cluster, ``_round`` judges replies and averages them, ``_saved`` keeps a round
    server     the ServerApp: the strategy of the settings, the artefacts and the traffic of a run
    traffic    bytes up and down, by Flower's own record sizes, as JSONL and as a plot
    memory     a Flower Grid in this process, for tests and benchmarks
    apps       ``client`` and ``server`` for ``flwr run``, and the folder that it takes (``_app_files``)

This room needs the extra: pip install 'learngene-hub[federated]'. It is the only one that imports flwr.
"""

from __future__ import annotations

from importlib.util import find_spec

from learngene_hub.errors import SettingsError

if find_spec("flwr") is None:
    raise SettingsError(
        "federated learning asked; Flower is not installed here: pip install 'learngene-hub[federated]' would work"
    )
