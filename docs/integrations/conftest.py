"""Lets the recipes run offline, and beside torchvision, as the tests of frameworks do."""

import tests.integrations.conftest  # noqa: F401
