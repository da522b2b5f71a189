"""Recorded runs, read and judged: tables, statistics, figures, and the pages that are made of them.

Lives here: whatever turns run folders and recorded grids into something to read. Does not: anything that trains.
"""
