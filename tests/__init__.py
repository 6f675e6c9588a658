"""What the pair promises, as tests: `python -W error -m unittest` runs them all."""
