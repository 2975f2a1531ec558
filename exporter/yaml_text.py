"""YAML as recipes use it: safe, no duplicate keys, `1e-3` is a number, errors with a line number."""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml

from exporter.errors import InputError


class _Loader(yaml.SafeLoader):
    """`yaml.SafeLoader` (plain values only: nothing in a file can run) with YAML 1.2's floats."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """A mapping; a key given twice is an error, where PyYAML silently keeps the last."""
        seen: set[object] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is there twice", key_node.start_mark
                )
            if isinstance(key, Hashable):
                seen.add(key)
        return super().construct_mapping(node, deep=deep)


# PyYAML follows YAML 1.1, where `1e-3` is text because it has no dot.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def parse_yaml(text: str, where: str) -> object:
    """The plain value that `text` describes. Raises `InputError` naming `where` and the line."""
    loader: _Loader | None = None
    try:
        loader = _Loader(text)
        return loader.get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise InputError(f"{where}{line}: not valid YAML: {error.problem or error.context}") from error
    except yaml.reader.ReaderError as error:
        raise InputError(f"{where}: not a text file: unexpected character {error.character!r}") from error
    except RecursionError as error:
        raise InputError(f"{where}: nested too deeply") from error
    except ValueError as error:
        raise InputError(f"{where}: not valid YAML: {error}") from error
    finally:
        if loader is not None:
            loader.dispose()


def dump_yaml(value: object) -> str:
    """`value` as YAML in block style, keys in their own order."""
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=110)
