"""Programs that measure the pair: they print tables, and test nothing."""
