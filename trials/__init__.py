"""Trials of this repository itself: its speed, its reaction to injected faults, its endurance.

This package measures the program. Measurements of models are in `stability`.
"""
