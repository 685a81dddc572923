"""Layers of plain data, one over the other, that remember which line of which file set each key."""

from dataclasses import dataclass, field
from typing import Any

from zoo.errors import UserError, nearest

KeyPath = tuple[str | int, ...]

_LATER = ("smoke",)  # a block that is laid over the rest later: its `key+` and `key=` wait until then
_NAMES = ("class_path", "family", "variant")  # what a mapping describes; its other keys mean nothing elsewhere


def dotted(path: KeyPath) -> str:
    """A key path as it is written on the command line."""
    return ".".join(map(str, path))


@dataclass
class Draft:
    """A mapping in the making.

    Attributes:
        config: plain data.
        places: key path -> "FILE:LINE", or the override that set it.
        added: overrides that set a key which no file mentions.
    """

    config: dict[str, Any] = field(default_factory=dict)
    places: dict[KeyPath, str] = field(default_factory=dict)
    added: list[str] = field(default_factory=list)

    def where(self, path: KeyPath) -> str:
        """The line that set `path`, or that of the nearest key above it."""
        for length in range(len(path), -1, -1):
            if path[:length] in self.places:
                return self.places[path[:length]]
        return "recipe"

    def lay(self, above: "Draft") -> None:
        """Lays another draft over this one: mappings merge, `key+` appends to a list, `key=` and the rest replace.

        A mapping with another `class_path`, `family` or `variant` replaces too: its arguments mean nothing there.

        Raises:
            UserError: a key is no text, or `key+` meets something other than lists.
        """
        if () in above.places:
            self.places[()] = above.places[()]
        self._lay(self.config, above.config, above, (), ())

    def _lay(
        self, below: dict[str, Any], values: dict[Any, Any], above: "Draft", into: KeyPath, origin: KeyPath
    ) -> None:
        """Lays the mapping at `origin` of the other draft over the mapping at `into` of this one."""
        for key, value in values.items():
            if not isinstance(key, str):
                raise UserError(f"{above.where(origin)}: the key {key!r} must be text; put it in quotes")
            name = key if into[:1] == _LATER else key.rstrip("+=")
            source, target, old = (*origin, key), (*into, name), below.get(name)
            if "+" in key[len(name) :]:
                if not isinstance(value, list) or not isinstance(old, list | None):
                    raise UserError(f"{above.where(source)}: {dotted(source)} appends to a list; both must be lists")
                self._move(above, source, target, len(old or []))
                below[name] = [*(old or []), *value]
            elif isinstance(old, dict) and _merges(old, value) and key == name:
                self.places[target] = above.where(source)
                self._lay(old, value, above, target, source)
            else:
                for place in [p for p in self.places if p[: len(target)] == target]:
                    del self.places[place]
                self.places[target] = above.where(source)
                if isinstance(value, dict):
                    below[name] = {}
                    self._lay(below[name], value, above, target, source)  # a `key+` inside becomes a plain list
                else:
                    self._move(above, source, target, 0)
                    below[name] = value

    def _move(self, above: "Draft", source: KeyPath, target: KeyPath, start: int) -> None:
        """Takes over the places below a list, whose elements now count from `start`."""
        self.places.setdefault(target, above.where(source))
        for place, line in above.places.items():
            if place[: len(source)] == source and len(place) > len(source):
                number, *rest = place[len(source) :]
                self.places[(*target, int(number) + start, *rest)] = line

    def override(self, key: str, value: object, label: str) -> None:
        """Sets one key given as a dotted path; list elements are numbers.

        Args:
            key: such as "data.init_args.stages.0.batch_size".
            value: plain data.
            label: what errors and `where` say instead of a line.

        Raises:
            UserError: the key leads nowhere. New keys are taken where a class's signature decides about them later.
        """
        *parents, last = key.split(".")
        node: Any = self.config
        path: KeyPath = ()
        for part in parents:
            if part == "init_args" and isinstance(node, dict) and "class_path" in node:
                node.setdefault("init_args", {})
            node, path = _step(node, path, part, label)
        if isinstance(node, list):
            number = _index(node, path, last, label)
            holder = {"element": node[number]}
            Draft(holder).lay(Draft({"element": value}))
            node[number] = holder["element"]
            self.places = {p: line for p, line in self.places.items() if p[: len(path) + 1] != (*path, number)}
            self.places[(*path, number)] = label
            return
        if not isinstance(node, dict):
            raise UserError(f"{label}: {dotted(path)} is {node!r} and has no {last!r}; give {dotted(path)} whole")
        name = last.rstrip("+")
        known = _known(node, path)
        if known is not None and name not in known:
            raise UserError(f"{label}: {dotted(path) or 'a recipe'} has no {name!r}.{nearest(name, known)}")
        if name not in node:
            self.added.append(label)
        if name == "class_path" and node.get("class_path") != value:
            node.pop("init_args", None)
        self._lay(node, {last: value}, Draft(places={(*path, last): label}), path, path)


def _merges(old: dict[str, Any], new: object) -> bool:
    """Whether `new` goes into `old`: it is a mapping, too, and does not name another thing than `old` does."""
    if not isinstance(new, dict):
        return False
    return all(new[key] == old.get(key) for key in _NAMES if key in new) or not any(key in old for key in _NAMES)


def _known(node: dict[str, Any], path: KeyPath) -> list[str] | None:
    """The only keys that an override may set at `path`, or None where a signature decides later."""
    if "class_path" in node:
        return ["class_path", "init_args"]
    return list(node) if path == ("vars",) else None


def _step(node: object, path: KeyPath, part: str, label: str) -> tuple[object, KeyPath]:
    """One step down an override's key."""
    if isinstance(node, list):
        number = _index(node, path, part, label)
        return node[number], (*path, number)
    if isinstance(node, dict) and part in node:
        return node[part], (*path, part)
    known = map(str, node) if isinstance(node, dict) else ()
    raise UserError(f"{label}: {dotted(path) or 'the recipe'} has no {part!r}.{nearest(part, known)}")


def _index(node: list[Any], path: KeyPath, part: str, label: str) -> int:
    if not part.isdecimal() or int(part) >= len(node):
        raise UserError(f"{label}: {dotted(path)} is a list of {len(node)}, so {part!r} is none of its elements")
    return int(part)
