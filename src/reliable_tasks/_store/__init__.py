"""The lock Redis: clients, keys, scripts and claims. Knows nothing of Celery."""
