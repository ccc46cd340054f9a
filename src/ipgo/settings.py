"""Settings before they are checked: nested, from bundled presets and YAML files, one over the other."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import yaml

from ipgo.errors import InputError, first_line, unknown

PRESETS = Path(__file__).parent / "presets"  # {name}.yaml


def presets() -> list[str]:
    """The names of the bundled settings."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def read_settings(preset: str | None, file: str | None) -> dict[str, Any]:
    """Nested settings of a bundled preset, overridden by those of a YAML file, which may name the preset itself.

    Raises:
        InputError: an unknown preset, or a file that is missing or is not a YAML mapping of settings.
    """
    over = _read_yaml(Path(file).expanduser()) if file is not None else {}
    stated = over.pop("preset", None)
    name = preset if preset is not None else stated
    if name is None:
        return over
    if name not in presets():
        raise unknown("preset", name, presets())
    base = _read_yaml(PRESETS / f"{name}.yaml")
    if "name" in over.get("method", {}):
        base["method"] = settings_for(over["method"]["name"], base.get("method", {}))
    return merge(base, over)


def settings_for(method: str, given: dict[str, Any]) -> dict[str, Any]:
    """The settings of the method that is asked for: those given, unless these are of another."""
    if given.get("name", method) == method:
        return {**given, "name": method}
    if given.keys() - {"name"}:
        text = "settings of the method %s are left out: the method is %s"
        logging.getLogger("ipgo").info(text, given["name"], method)
    return {"name": method}


def method_settings(given: Any) -> dict[str, Any]:
    """What stands under `method`: a name, or settings that may have one; nothing is {}."""
    if given is None or isinstance(given, str):
        return {} if given is None else {"name": given}
    name = given.get("name", "") if isinstance(given, dict) else None
    if not isinstance(name, str):
        raise InputError(f"method is {given!r}; it must be a name, or settings that include one")
    return dict(given)


def method_of(settings: dict[str, Any]) -> str:
    """The method that nested settings name."""
    return str(settings.get("method", {}).get("name", "ipgo"))


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Nested `base` with the values of nested `over` put in."""
    merged = dict(base)
    for key, value in over.items():
        nested = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if nested else value
    return merged


def flatten(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} to {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat.update(
            flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
        )
    return flat


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        settings = yaml.load(path.read_text(encoding="utf-8"), _OnceEach)
    except FileNotFoundError:
        raise InputError(f"config file {str(path)!r} does not exist") from None
    except UnicodeDecodeError:
        raise InputError(f"config file {str(path)!r} is not UTF-8 text") from None
    except (OSError, yaml.YAMLError) as error:
        raise InputError(f"config file {str(path)!r} cannot be read: {_reason(error)}") from None
    if not isinstance(settings or {}, dict):
        raise InputError(f"config file {str(path)!r} holds no 'key: value' settings")
    settings = settings or {}
    entries = settings.pop("entries", None)  # whose labels may hold dots
    settings = _nested(settings)
    if entries is not None:
        settings["entries"] = entries
    if isinstance(entries, dict):
        settings["entries"] = {
            label: _nested(entry) if isinstance(entry, dict) else entry for label, entry in entries.items()
        }
    for name in ("config", "text", "redraw", "help"):
        if name in settings:
            raise InputError(f"config file {str(path)!r} has {name!r}, which only the command line takes")
    if method := method_settings(settings.pop("method", None)):
        settings["method"] = method
    return settings


class _OnceEach(yaml.SafeLoader):
    """YAML without its leave to say the same thing twice, of which the last would count."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue  # the first are refused by YAML itself, the second may stand more than once
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"{key.value!r} a second time", problem_mark=key.start_mark
                )
            seen.add(key.value)
        found: dict[Any, Any] = super().construct_mapping(node, deep)
        return found


def _nested(settings: dict[Any, Any], prefix: str = "") -> dict[Any, Any]:
    """With `method.ascent.lr: 0.1` as the nested settings that it stands for."""
    found: dict[Any, Any] = {}
    for key, value in settings.items():
        first, dot, rest = str(key).partition(".")
        name, own = (first, {rest: value}) if dot and rest else (key, value)
        if f"{prefix}{name}" == "method" and isinstance(own, str):
            own = {"name": own}
        if isinstance(own, dict):
            own = _nested(own, f"{prefix}{name}.")
        there = found.get(name)
        if name in found and not (isinstance(there, dict) and isinstance(own, dict)):
            raise InputError(f"{prefix}{name} is given twice")
        if isinstance(there, dict) and (twice := sorted(flatten(there).keys() & flatten(own).keys())):
            raise InputError(f"{prefix}{name}.{twice[0]} is given twice")
        found[name] = merge(there, own) if isinstance(there, dict) else own
    return found


def _reason(error: Exception) -> str:
    """Of a file that cannot be read; YAML's says the line."""
    mark = getattr(error, "problem_mark", None)
    if mark is not None:
        return f"{getattr(error, 'problem', None) or 'invalid YAML'} in line {mark.line + 1}"
    return getattr(error, "strerror", None) or first_line(error)
