"""Breaks workers, servers and networks on purpose, and counts what became of the tasks."""
