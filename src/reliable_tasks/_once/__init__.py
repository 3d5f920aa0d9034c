"""``@once``: at most one live task per key."""
