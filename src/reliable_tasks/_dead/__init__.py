"""What becomes of tasks that will not run again by themselves."""
