"""Several processes that work as one. Public: `start`, `agreement`, `turns`."""
