"""The version of moeroute."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("moeroute")
except PackageNotFoundError:
    __version__ = "0+unknown"
