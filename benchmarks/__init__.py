"""The harness behind `python -m mnops bench` and `python -m mnops report`; README.md beside it tells more."""
