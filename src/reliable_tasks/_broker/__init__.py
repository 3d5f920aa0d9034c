"""Celery on Redis without loss: the transport, the leases of what was taken, and the sweep."""
