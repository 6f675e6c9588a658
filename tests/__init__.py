"""What the pair promises, as tests: `python -W error -m unittest` runs them all."""

import os
import signal

# A shell's background job ignores Ctrl-C, and so would every script that a test starts in one.
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("ASYNC_TEST_TIMEOUT", "240")  # seconds; Tornado's own 5 are a speed test
