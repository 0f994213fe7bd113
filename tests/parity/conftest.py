"""Comparisons with other libraries: importing these alone takes longer than most fast tests."""

import pytest


def pytest_collection_modifyitems(items):
    for item in items:
        if "parity" in item.path.parts:
            item.add_marker(pytest.mark.slow)
