"""A run: epochs, schedule, optimizers, tests, and what it leaves."""
