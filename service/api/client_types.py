"""The client's types from the interface's description: `python -m service.api.client_types`.

Writes service/client/types.py, a TypedDict for each document that the service sends.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fastapi import FastAPI

import service
from service.api.app import include_routes
from service.api.description import described, operation_id

PATH = Path(service.__file__).parent / "client" / "types.py"
HEAD = '''"""Documents of the service: made by `make client` from its description, not by hand."""

from __future__ import annotations

from typing import Any, Literal, NotRequired, TypedDict
'''
_SCALARS = {
    "string": "str",
    "integer": "int",
    "number": "float",
    "boolean": "bool",
    "null": "None",
}
_WIDTH = 96


def module(document: Mapping[str, Any]) -> str:
    """The module's source."""
    schemas = document["components"]["schemas"]
    named = [name for name in sorted(schemas) if "properties" in schemas[name]]
    kinds = [_class(name, schemas[name]) for name in named]
    return "\n\n".join([HEAD, *kinds])


def _class(name: str, schema: Mapping[str, Any]) -> str:
    lines = [f"class {name}(TypedDict):", *_docstring(schema.get("description", name))]
    required = schema.get("required", ())
    for field, own in schema["properties"].items():
        kind = _kind(own) if field in required else f"NotRequired[{_kind(own)}]"
        lines.append(f"    {field}: {kind}")
    return "\n".join(lines) + "\n"


def _docstring(text: str) -> Iterator[str]:
    paragraph = text.partition("\n\n")[0].replace("\n", " ")
    first, *rest = textwrap.wrap(paragraph, _WIDTH - 10)
    if not rest:
        yield f'    """{first}"""\n'
        return
    yield f'    """{first}'
    yield from (f"    {line}" for line in rest)
    yield '    """\n'


def _kind(schema: Mapping[str, Any]) -> str:
    """A schema as a type's expression."""
    if "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2]
    if "anyOf" in schema:
        return " | ".join(dict.fromkeys(map(_kind, schema["anyOf"])))
    if values := schema.get("enum", [schema["const"]] if "const" in schema else None):
        return f"Literal[{', '.join(map(json.dumps, values))}]"
    kind = schema.get("type")
    if kind == "array":
        return f"list[{_kind(schema.get('items', {}))}]"
    if kind == "object":
        more = schema.get("additionalProperties")
        return f"dict[str, {_kind(more) if isinstance(more, Mapping) else 'Any'}]"
    return _SCALARS.get(str(kind), "Any")


def main() -> None:
    """Write the module."""
    app = FastAPI(openapi_url=None, generate_unique_id_function=operation_id)
    include_routes(app)
    PATH.write_text(module(described(app)))


if __name__ == "__main__":
    main()
