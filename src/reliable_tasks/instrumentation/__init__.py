"""What happens to tasks and claims, told to whoever listens."""
