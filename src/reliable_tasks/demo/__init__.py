"""The demonstration behind ``reliable-tasks demo``: real workers, killed on purpose."""
