"""The only home of Celery's and kombu's private parts, and of version comparisons.

What is touched here is pinned by ``tests/integration/test_celery_internals.py``, which fails
loudly when an upgrade moves it.
"""
