"""The engine: one operator F, its scheduler, and the sessions that run on it."""
