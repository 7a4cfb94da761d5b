import uuid
from collections.abc import Iterator

import pytest
from google.cloud.storage import Client

from tests import gcs


@pytest.fixture(scope="session")
def gcs_server() -> Iterator[str]:
    with gcs.server() as address:
        yield address


@pytest.fixture
def bucket(gcs_server: str) -> str:
    """An empty bucket's URI."""
    name = f"bucket-{uuid.uuid4().hex[:12]}"
    Client().create_bucket(name)
    return f"gs://{name}"
