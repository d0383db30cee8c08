from __future__ import annotations

from hypothesis import settings

# Processes that share the cores make any example slow now and then; that is no fault.
settings.register_profile("shared_cores", deadline=None)
settings.load_profile("shared_cores")
