"""Ways to this library from others."""
