"""Bodies of Kubeflow Pipelines' API as `kfp-server-api` models them."""

import re
from typing import Any

import kfp_server_api as api


class Refused(Exception):
    def __init__(self, status: int, told: str) -> None:
        super().__init__(told)
        self.status = status


def model(kind: str, value: Any, at: str = "body") -> Any:
    """JSON as the model `kind`, as the server's own parser reads it: no unknown field, no wrong type.

    Raises:
        Refused: with where it is wrong.
    """
    if found := re.fullmatch(r"list\[(.+)\]", kind):
        return [model(found[1], one, f"{at}[]") for one in _typed(list, value, at)]
    if found := re.fullmatch(r"dict\(str, (.+)\)", kind):
        return {key: model(found[1], one, f"{at}.{key}") for key, one in _typed(dict, value, at).items()}
    if kind == "object":
        return value
    if kind in ("str", "datetime"):
        return _typed(str, value, at)
    if kind in ("bool", "int"):
        return _typed({"bool": bool, "int": int}[kind], value, at)
    cls = getattr(api, kind)
    if hasattr(cls, "allowable_values"):
        if value not in cls.allowable_values:
            raise Refused(400, f"{at}: {value!r} is no {kind}")
        return value
    attributes = {key: name for name, key in cls.attribute_map.items()}
    if unknown := _typed(dict, value, at).keys() - attributes.keys():
        raise Refused(400, f"{at}: unknown field {', '.join(sorted(unknown))}")
    return cls(
        **{attributes[key]: model(cls.openapi_types[attributes[key]], one, f"{at}.{key}") for key, one in value.items()}
    )


def _typed(kind: type, value: Any, at: str) -> Any:
    if not isinstance(value, kind):
        raise Refused(400, f"{at}: expected {kind.__name__}, got {value!r}")
    return value
