"""The version, stated once: the build and CHANGELOG.md's test read it here."""

from __future__ import annotations

__version__ = "0.1.0"
