"""Settings of every test run: repeatable random cases, and no threads that fight with the workers of pytest-xdist."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)

# The same cases on every machine and in every run, so that a failure is a change of the code. To look for new ones:
# pytest --hypothesis-profile explore
settings.register_profile(
    "repeatable",
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile(
    "explore",
    deadline=None,
    max_examples=5000,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("repeatable")
