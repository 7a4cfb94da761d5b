import pytest

from trackrec import quantity


@pytest.mark.parametrize(("text", "expected"), [("500m", 0.5), ("8", 8.0), ("0.5", 0.5)])
def test_cores(text: str, expected: float) -> None:
    assert quantity.cores(text) == expected


@pytest.mark.parametrize(("text", "expected"), [("3", 3), ("2Ki", 2048), ("20Gi", 20 * 2**30), ("1G", 10**9)])
def test_bytes(text: str, expected: int) -> None:
    assert quantity.to_bytes(text) == expected


def test_what_is_no_quantity_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^'8 GB' is not a quantity of memory"):
        quantity.to_bytes("8 GB")
