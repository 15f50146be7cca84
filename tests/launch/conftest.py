"""`make test-launch` has every tool, and LAUNCH_TOOLS says where: there a test that is skipped has failed."""

import os
from collections.abc import Generator
from typing import Any

import pytest


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    report = yield
    if report.skipped and os.environ.get("LAUNCH_TOOLS"):
        report.outcome = "failed"
    return report
