"""Several processes that work as one: how they meet, watch over each other and agree. Public: `start`, `agreement`."""
