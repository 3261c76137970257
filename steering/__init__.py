"""Steering vectors, made and measured offline: extraction from pairs, calibration of the strength, their file."""
