"""Grow pre-trained vision transformers of any depth and width from small files called learngenes.

>>> from learngene_hub import Descendant
>>> model = Descendant.from_learngene("lsamd-base", depth=12, width=384, num_labels=10)

Importing this package is cheap: each name below is fetched from its module when it is first used, and torch with it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from learngene_hub._version import __version__ as __version__

if TYPE_CHECKING:
    from learngene_hub.data import Augment as Augment
    from learngene_hub.data import Images as Images
    from learngene_hub.data import load_images as load_images
    from learngene_hub.descendant import Descendant as Descendant
    from learngene_hub.errors import ArtefactError as ArtefactError
    from learngene_hub.errors import BudgetError as BudgetError
    from learngene_hub.errors import DataError as DataError
    from learngene_hub.errors import DigestError as DigestError
    from learngene_hub.errors import ExportError as ExportError
    from learngene_hub.errors import LearngeneError as LearngeneError
    from learngene_hub.errors import RegistryError as RegistryError
    from learngene_hub.errors import SettingsError as SettingsError
    from learngene_hub.errors import ShapeError as ShapeError
    from learngene_hub.errors import StoreError as StoreError
    from learngene_hub.errors import TrainingError as TrainingError
    from learngene_hub.exporting import Exported as Exported
    from learngene_hub.exporting import export as export
    from learngene_hub.factory import constrain as constrain
    from learngene_hub.factory import evaluate as evaluate
    from learngene_hub.factory import expand as expand
    from learngene_hub.factory import extract as extract
    from learngene_hub.factory import finetune as finetune
    from learngene_hub.factory import fit_head as fit_head
    from learngene_hub.hub import find_remote as find_remote
    from learngene_hub.hub import list_learngenes as list_learngenes
    from learngene_hub.learngene import Learngene as Learngene
    from learngene_hub.methods import METHODS as METHODS
    from learngene_hub.pool import Pool as Pool
    from learngene_hub.pool import Selection as Selection
    from learngene_hub.shape import Preprocessing as Preprocessing
    from learngene_hub.shape import Reach as Reach
    from learngene_hub.shape import ViTShape as ViTShape
    from learngene_hub.teacher import Teacher as Teacher
    from learngene_hub.training import Recipe as Recipe
    from learngene_hub.training import Step as Step
    from learngene_hub.training import fit as fit

_HOME = {  # public name -> the module that defines it
    "ArtefactError": "errors",
    "Augment": "data",
    "BudgetError": "errors",
    "DataError": "errors",
    "Descendant": "descendant",
    "DigestError": "errors",
    "ExportError": "errors",
    "Exported": "exporting",
    "Images": "data",
    "Learngene": "learngene",
    "LearngeneError": "errors",
    "METHODS": "methods",
    "Pool": "pool",
    "Preprocessing": "shape",
    "Reach": "shape",
    "Recipe": "training",
    "RegistryError": "errors",
    "Selection": "pool",
    "SettingsError": "errors",
    "ShapeError": "errors",
    "Step": "training",
    "StoreError": "errors",
    "Teacher": "teacher",
    "TrainingError": "errors",
    "ViTShape": "shape",
    "constrain": "factory",
    "evaluate": "factory",
    "expand": "factory",
    "export": "exporting",
    "extract": "factory",
    "find_remote": "hub",
    "finetune": "factory",
    "fit": "training",
    "fit_head": "factory",
    "list_learngenes": "hub",
    "load_images": "data",
}

__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    """The public name, from its home module; kept, so that this runs once per name."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
