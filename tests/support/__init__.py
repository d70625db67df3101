"""What the tests share besides fixtures."""

import pytest

pytest.register_assert_rewrite("support.runs")
