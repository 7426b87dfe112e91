"""Devices, precision, run folders, checkpoints."""
