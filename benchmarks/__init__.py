"""The benchmark harness behind `python -m mnops bench` and `python -m mnops report`; see README.md beside this file."""
