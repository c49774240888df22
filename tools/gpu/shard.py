"""A pytest plugin: of all tests those of one process, SHARD=i/n; tests of a file take turns, so that all end together.

pytest-xdist does this better; a machine without a network need not have it. SIGTERM ends it as Ctrl-C would, with the
summary: a background process of a script ignores SIGINT.
"""

import os
import signal

import pytest
import torch


def pytest_configure(config):
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def pytest_collection_modifyitems(config, items):
    number, of = map(int, os.environ["SHARD"].split("/"))
    config.hook.pytest_deselected(items=[t for i, t in enumerate(items) if i % of != number])
    items[:] = items[number::of]


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report):
    if report.failed:
        try:
            torch.cuda.synchronize()
        except Exception as error:  # all tests after it would fail, and hide the one that did it
            pytest.exit(f"the GPU's context is lost since {report.nodeid}: {error}", returncode=1)
