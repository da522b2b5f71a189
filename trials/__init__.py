"""What puts this repository itself to the test: its speed, injected faults, endurance.

Lives here: measurements of the program. Does not: measurements of models, which are in `stability`.
"""
