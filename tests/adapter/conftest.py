"""Labels that an older transformers refuses by itself."""

from __future__ import annotations

from collections.abc import Generator

import pytest
import transformers
from huggingface_hub.errors import StrictDataclassFieldValidationError
from packaging.version import Version


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    """Skips tests with labels that the config of an older transformers does not accept in the first place."""
    try:
        yield
    except StrictDataclassFieldValidationError as error:
        if Version(transformers.__version__) >= Version("5.23"):
            raise
        pytest.skip(f"this version of transformers refuses such labels itself: {error}")
