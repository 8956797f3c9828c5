"""How hard the fuzzers try: a little, and the same each time, by default; VTPM_FUZZ_EXAMPLES times for a soak.

A soak draws anew each time; Hypothesis prints the `reproduce_failure` line of what it finds. With VTPM_FUZZ_TRACED they
try a third as much, the same each time too: every line is then watched (test_codec_coverage.py), which is slow.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

SOAK_EXAMPLES = int(os.environ.get("VTPM_FUZZ_EXAMPLES", "0"))
_SHARE = 3 if "VTPM_FUZZ_TRACED" in os.environ else 1

codec = settings(
    max_examples=SOAK_EXAMPLES or 150 // _SHARE,
    derandomize=not SOAK_EXAMPLES,
    database=None,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
"""For one codec and one property."""

machine = settings(codec, max_examples=SOAK_EXAMPLES or 60 // _SHARE, stateful_step_count=40)
"""For state machines."""
