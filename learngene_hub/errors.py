"""Every error this package raises on purpose.

LearngeneError
  ShapeError(ValueError)      the asked descendant cannot exist, or cannot be grown from this learngene
    BudgetError               it would have more parameters than allowed
  SettingsError(ValueError)   a setting is out of its range, or a method is unknown
    OtherRunError             an interrupted run is to go on with other settings than it began with
    NameTakenError            of an entry of a pool, by another process during the training; what was trained is kept
  ArtefactError(ValueError)   a file is not the learngene it claims to be
    DigestError               its bytes differ from the sha256 that was promised
  RegistryError(LookupError)  no such name (the nearest are listed), or a name used twice
  StoreError(OSError)         a store could not be read or written
    NoPoolError               a folder is no pool
  DataError(ValueError)       images or labels that cannot be used
  TrainingError(RuntimeError) a run that cannot go on, such as a loss that is not finite
  ExportError(RuntimeError)   an exported file that cannot be run, or gives other logits than its model

Each message says what was asked, what is there, and what would work, on one line.
"""

from __future__ import annotations


class LearngeneError(Exception):
    """Root of the tree: catch this to catch them all."""


class ShapeError(LearngeneError, ValueError):
    """The asked descendant cannot exist, or cannot be grown from this learngene."""


class BudgetError(ShapeError):
    """The asked descendant would have more parameters than allowed; nothing was allocated."""


class SettingsError(LearngeneError, ValueError):
    """A setting is out of its range, or a method is unknown."""


class OtherRunError(SettingsError):
    """An interrupted run is to go on with other settings, images or weights than it began with."""


class NameTakenError(SettingsError):
    """Another process gave the name of an entry to one of its own during the training; what was trained is kept."""


class ArtefactError(LearngeneError, ValueError):
    """A file is not the learngene it claims to be."""


class DigestError(ArtefactError):
    """The bytes of a file differ from the sha256 that was promised for it."""


class RegistryError(LearngeneError, LookupError):
    """No entry has this name, or two entries share one."""


class StoreError(LearngeneError, OSError):
    """A store could not be read or written."""


class NoPoolError(StoreError):
    """A folder is no pool."""


class DataError(LearngeneError, ValueError):
    """Images or labels that cannot be used."""


class TrainingError(LearngeneError, RuntimeError):
    """A training run that cannot go on."""


class ExportError(LearngeneError, RuntimeError):
    """An exported file cannot be run, or gives other logits than its model; it is not kept."""
