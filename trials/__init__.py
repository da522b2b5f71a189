"""Trials of this repository itself: its speed, its reaction to injected faults, its endurance.

Lives here: measurements of the program. Does not: measurements of models, which are in `stability`.
"""
