"""Docstrings as Markdown: tables, examples, and names in single backticks, which become links."""

import re
from collections.abc import Iterator

import griffe

LAYERS = "hypergrad.optimizers.kfac.layers"  # public as a whole
RULE = re.compile(r"^=+(?: +=+)+$", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Rewrites every docstring of the package, once it is loaded."""

    def on_package(self, *, pkg: griffe.Module, **_: object) -> None:
        """Called by griffe."""
        for thing in _inside(pkg):
            if thing.docstring:
                text = tabulated(thing.docstring.value)
                if thing.is_class and "NamedTuple" in map(str, thing.bases):  # its fields have the types
                    text = text.replace("\nArgs:\n", "\nAttributes:\n")
                thing.docstring.value = linked(thing, fenced(text))
        for thing in _inside(pkg["optimizers"]):  # its files are shown, and its face says what is public
            if thing.parent.is_module and thing.module.path != LAYERS:
                thing.public = thing.name in pkg["optimizers"].exports


def _inside(thing: griffe.Object) -> Iterator[griffe.Object]:
    yield thing
    for member in thing.members.values():
        if isinstance(member, griffe.Object):
            yield from _inside(member)


def tabulated(text: str) -> str:
    """Tables between rules of ``====`` in the form that Markdown has."""
    lines, out = iter(text.splitlines()), []
    for line in lines:
        out += _table(line, lines) if RULE.match(line) else [line]
    return "\n".join(out)


def _table(rule: str, lines: Iterator[str]) -> Iterator[str]:
    """The rows after the first rule of a table, to its last one."""
    spans = [match.span() for match in re.finditer("=+", rule)]
    spans[-1] = (spans[-1][0], 10_000)
    yield _row(next(lines), spans)
    yield "|" + "---|" * len(spans)
    next(lines)
    for line in iter(lambda: next(lines), rule):
        yield _row(line, spans)


def _row(line: str, spans: list[tuple[int, int]]) -> str:
    return "| " + " | ".join(line[low:high].strip() for low, high in spans) + " |"


def fenced(text: str) -> str:
    """Examples in fences, from their first prompt to the next blank line."""
    return re.sub(r"^>>> .*?(?=\n\n|\Z)", r"```pycon\n\g<0>\n```", text, flags=re.DOTALL | re.MULTILINE)


def linked(thing: griffe.Object, text: str) -> str:
    """A link for every name in single backticks that means something where it stands."""

    def link(match: re.Match[str]) -> str:
        try:
            path = thing.resolve(match[1])
        except griffe.NameResolutionError:
            path = match[1]
        return f'<autoref identifier="{path}" optional><code>{match[1]}</code></autoref>'

    return re.sub(r"(?<!`)`([A-Za-z_][\w.]*)`(?!`)", link, text)
