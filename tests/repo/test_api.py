"""docs/api.md is made from the docstrings: it is up to date, and nothing that is public is missing."""

from __future__ import annotations

import importlib.util
import pkgutil
import re
from pathlib import Path
from types import ModuleType

import pytest

import longlora_ext

DOCS = Path(__file__).resolve().parents[2] / "docs"
#: Public modules that are no API: a program, and the definition that the tests go by.
OTHERS = {"env", "reference"}


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_api", DOCS / "make_api.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MAKE_API = script()
PAGE = (DOCS / "api.md").read_text()


def test_the_page_is_up_to_date() -> None:
    assert MAKE_API.page() == PAGE, "run python docs/make_api.py"


def test_every_public_module_is_on_the_page() -> None:
    public = {name for _, name, _ in pkgutil.iter_modules(longlora_ext.__path__) if not name.startswith("_")}
    on_page = set(re.findall(r"^## longlora_ext\.(\w+)$", PAGE, re.M))
    assert on_page == public - OTHERS


@pytest.mark.parametrize("module", [longlora_ext, *MAKE_API.modules()], ids=lambda module: module.__name__)
def test_every_public_name_is_described(module: ModuleType) -> None:
    """By something, and its arguments by the items of a list."""
    for name in module.__all__:
        entries = re.findall(rf"^### {name}\n(.*?)(?=^##|\Z)", PAGE, re.M | re.S)
        assert len(entries) == 1, name
        if callable(getattr(module, name)):
            assert getattr(module, name).__doc__, name
        for items in re.findall(r"^\*\*(?:Args|Raises|Attributes)\*\*\n\n(.*?)\n\n", entries[0] + "\n\n", re.M | re.S):
            assert all(line.startswith("- `") for line in items.splitlines()), f"{name}: {items}"


def test_what_the_script_makes_of_a_docstring() -> None:
    doc = """Does something.

    Sees `x`:

        something(1)   # so

    Args:
        x: A number, and
            more of it: this.
        y, z (`int`): Others.

    Returns:
        What: it says,
        in two lines.

    Raises:
        ValueError: It is none.
    """
    made = MAKE_API.markdown(MAKE_API.inspect.cleandoc(doc))
    assert made == (
        "Does something.\n\nSees `x`:\n\n```python\nsomething(1)   # so\n```\n\n"
        "**Args**\n\n- `x`: A number, and more of it: this.\n- `y, z`: Others.\n\n"
        "**Returns**\n\n- What: it says, in two lines.\n\n**Raises**\n\n- `ValueError`: It is none.\n"
    )


def test_long_signatures_have_a_line_for_each_parameter() -> None:
    def function(first: list[int], *, second_with_a_long_name: dict[str, int] | None = None, **rest: float) -> int:
        return 0

    made = MAKE_API.signature("function_with_a_long_name", function)
    assert made == (
        "function_with_a_long_name(\n    first: list[int],\n    *,\n"
        "    second_with_a_long_name: dict[str, int] | None = None,\n    **rest: float,\n) -> int"
    )
