"""Write docs/api.md, a page of everything public in the package, from its docstrings: `python docs/make_api.py`."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import sys
import textwrap
from pathlib import Path
from types import ModuleType
from typing import Any

import longlora_ext

PAGE = Path(__file__).with_name("api.md")

_HEAD = """\
# API

Made from the docstrings by `python docs/make_api.py`.

`import longlora_ext` offers the names of the first section, and imports transformers and PEFT only once one of them
needs them.
"""
_SECTIONS = ("Args", "Attributes", "Returns", "Raises")
_HEADING = re.compile(rf"^({'|'.join(_SECTIONS)}):\n((?:[ ]{{4}}.*\n|\n)*)", re.M)
_CODE = re.compile(r"(?:^ {4}.*\n(?:\n(?= {4}))?)+", re.M)


def modules() -> list[ModuleType]:
    """The public modules of the package that say what is public in them."""
    names = [module.name for module in pkgutil.iter_modules(longlora_ext.__path__) if not module.name.startswith("_")]
    found = [importlib.import_module(f"longlora_ext.{name}") for name in sorted(names)]
    return [module for module in found if hasattr(module, "__all__")]


def page() -> str:
    """The whole page."""
    parts = [_HEAD, section(longlora_ext, longlora_ext.__all__)]
    parts += [section(module, [name for name in module.__all__ if name not in longlora_ext.__all__], module.__all__)
              for module in modules()]  # fmt: skip
    return "\n".join(parts)


def section(module: ModuleType, names: list[str], offered: list[str] | None = None) -> str:
    """What a module is for, and the names that are public in it.

    Args:
        module: The module.
        names: The names to describe.
        offered: All names of the module; those that are not described here are with the package.
    """
    elsewhere = ", ".join(f"[`{name}`](#{name})" for name in offered or () if name not in names)
    above = f"\nAlso here: {elsewhere}.\n" if elsewhere else ""
    text = markdown(inspect.getdoc(module) or "")
    return "\n".join([f"## {module.__name__}\n\n{text}{above}", *(entry(module, name) for name in names)])


def entry(module: ModuleType, name: str) -> str:
    """One name: its signature, or its value, and what is said of it."""
    value = getattr(module, name)
    if inspect.isclass(value):
        parts = [f"### {name}\n\n{code(signature(name, value))}\n{markdown(inspect.getdoc(value) or '')}"]
        for method, member in vars(value).items():
            if not method.startswith("_") and inspect.getdoc(member):
                shown = method if isinstance(member, property) else signature(method, inspect.unwrap(member))
                parts.append(f"`{name}.{shown}`: {markdown(inspect.getdoc(member) or '')}")
        return "\n".join(parts)
    if callable(value):
        return f"### {name}\n\n{code(signature(name, value))}\n{markdown(inspect.getdoc(value) or '')}"
    said = comment(module, name)
    return f"### {name}\n\n{code(f'{name} = {value!r}')}" + (f"\n{said}" if said else "")


def signature(name: str, value: Any) -> str:
    """As in the source, annotations too, a line for each parameter if one line is too long."""
    found = inspect.signature(value)
    parameters = [  # PEP 563 leaves annotations as text, others are shown so
        p.replace(annotation=Shown(p.annotation)) if p.annotation is not p.empty else p
        for p in found.parameters.values()
        if p.name != "self"
    ]
    has_result = found.return_annotation is not found.empty and not inspect.isclass(value)
    returns = Shown(found.return_annotation) if has_result else found.empty
    text = name + str(found.replace(parameters=parameters, return_annotation=returns))
    if len(text) <= 100:
        return text
    shown, had_star = [], False
    for p in parameters:
        if p.kind is p.KEYWORD_ONLY and not had_star and not any(q.kind is q.VAR_POSITIONAL for q in parameters):
            shown, had_star = [*shown, "*"], True
        shown.append(str(p))
    lines = "".join(f"    {p},\n" for p in shown)
    return f"{name}(\n{lines})" + (f" -> {returns!r}" if returns is not found.empty else "")


class Shown:
    """An annotation that is shown as it is written."""

    def __init__(self, annotation: Any) -> None:
        text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
        self.text = re.sub(r"\b(?:torch|collections\.abc|pathlib|transformers|os)\.(?:\w+\.)*(?=[A-Z])", "", text)

    def __repr__(self) -> str:
        return self.text


def code(text: str) -> str:
    """A block of Python."""
    return f"```python\n{text}\n```\n"


def comment(module: ModuleType, name: str) -> str:
    """The lines of comment above a constant, in the module or where the module has it from."""
    ours = [other for path, other in sorted(sys.modules.items()) if path.startswith("longlora_ext.")]
    for source in (module, *(other for other in ours if hasattr(other, name))):
        lines = inspect.getsource(source).splitlines()
        place = next((n for n, line in enumerate(lines) if re.match(rf"{name}\b.* = ", line)), None)
        if place is None:
            continue
        above: list[str] = []
        while place and lines[place - 1].startswith("#"):
            place -= 1
            above.insert(0, lines[place].lstrip("#: "))
        if above:
            return " ".join(above) + "\n"
    return ""


def markdown(doc: str) -> str:
    """A docstring of Google's style in Markdown: its sections as lists, its indented lines as blocks of Python."""
    doc = _HEADING.sub(lambda found: f"**{found[1]}**\n\n{_items(found[1], found[2])}\n", doc + "\n")
    parts = re.split(r"(^\*\*\w+\*\*\n\n(?:- .*\n)*)", doc, flags=re.M)
    parts[::2] = [_CODE.sub(lambda found: code(textwrap.dedent(found[0]).strip("\n")), part) for part in parts[::2]]
    return re.sub(r"\n{3,}", "\n\n", "".join(parts)).strip("\n") + "\n"


def _items(title: str, body: str) -> str:
    """The items of a section, one a line; what is returned is one."""
    texts = textwrap.dedent(body).strip("\n")
    found = re.split(r"\n(?=\S)", texts) if title != "Returns" else [texts]
    items = [" ".join(item.split()) for item in found]
    if title == "Returns":
        return f"- {items[0]}\n"
    # A type in brackets, or a name in quotes, is another style of the same.
    return "".join(re.sub(r"^`?([\w., *]+?)`?(?: \([`\[].*?\))?:", r"- `\1`:", item) + "\n" for item in items)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
