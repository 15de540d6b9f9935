"""Which cells select: probe streams, the search over them, and the report that the engine takes."""
