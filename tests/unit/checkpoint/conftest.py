"""Property tests here do real work (images, Reed-Solomon in Python): no deadline per example, machines differ."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("checkpoint", deadline=None)
settings.load_profile("checkpoint")
