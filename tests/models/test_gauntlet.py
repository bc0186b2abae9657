"""Every architecture of the registry passes the gauntlet."""

from typing import Any

import pytest

from minillm.models.registry import ARCHITECTURES
from tests.models.gauntlet import Gauntlet


@pytest.fixture(params=sorted(ARCHITECTURES))
def model_type(request: Any) -> str:
    name: str = request.param
    return name


class TestGauntlet(Gauntlet):
    """Collected once for each architecture."""
