"""Celery on Redis without loss: the transport, the leases of what was taken, and the sweep.

The private parts of kombu's Redis transport are touched in ``channel.py``, ``fetching.py`` and
``transport.py`` alone, and are pinned by ``tests/integration/test_kombu_internals.py``.
"""
