"""moeroute's adapters as PEFT knows them.

PEFT is imported here, before any module of this package: its import registers the method, and that
must not happen half-way through one of them.
"""

import peft

__all__ = ["peft"]
