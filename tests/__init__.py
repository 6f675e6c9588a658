"""What the pair promises, as tests: `python -W error -m unittest` runs them all."""

import os

os.environ.setdefault("ASYNC_TEST_TIMEOUT", "60")  # seconds; Tornado's own 5 are a speed test
