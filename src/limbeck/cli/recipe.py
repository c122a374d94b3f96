"""limbeck recipe: a recipe or a study as a file to start one's own from."""

import ast
import inspect
import io
import textwrap
import tokenize
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from limbeck.cli import app
from limbeck.core.console import output
from limbeck.core.errors import LimbeckError, suggest_closest

LINE_WIDTH = 120  # of a line that has its comment behind it


@app.command()
def recipe(
    name: Annotated[
        str, typer.Argument(help="A built-in recipe, study or teacher, or a YAML file of a recipe.")
    ] = "quickstart",
) -> None:
    """Print a recipe with all of its keys and what each one is, to start your own from: > recipe.yaml."""
    from limbeck.core.recipe import BUILT_IN, Recipe

    recipes = sorted(path.stem for path in BUILT_IN.glob("*.yaml"))
    folders = BUILT_IN.with_name("studies"), BUILT_IN / "teachers"
    others = {path.stem: path for folder in folders for path in sorted(folder.glob("*.yaml"))}
    if name in others:
        output.out(others[name].read_text(encoding="utf-8"), end="")
        return
    if name not in recipes and not name.endswith((".yaml", ".yml")):
        raise LimbeckError(
            f"there is no recipe '{name}'{suggest_closest(name, [*recipes, *others])}",
            expected=f"a YAML file, or one of: {', '.join([*recipes, *others])}",
        )
    output.out("\n".join(render_with_comments(Recipe.load(name))))


def render_with_comments(settings: Any, indent: str = "") -> Iterator[str]:
    """The lines of settings as YAML, each key with the comment that its field has in the code.

    Args:
        settings: a pydantic model.
    """
    import yaml
    from pydantic import BaseModel

    notes = _notes(type(settings))
    for key in sorted(type(settings).model_fields, key=lambda key: key not in ("name", "stage")):
        value, note = getattr(settings, key), notes.get(key, "")
        inner: list[str] = []
        if isinstance(value, BaseModel):
            inner, text = list(render_with_comments(value, indent + "  ")), f"{indent}{key}:"
        elif isinstance(value, list) and value and isinstance(value[0], BaseModel):
            for one in value:
                first, *more = render_with_comments(one, indent + "    ")
                inner += [f"{indent}  - {first.strip()}", *more]
            text = f"{indent}{key}:"
        else:
            plain = settings.model_dump(mode="json", include={key})
            flow = yaml.safe_dump(plain, default_flow_style=True, width=10**6, allow_unicode=True).strip()
            text = indent + flow.removeprefix("{").removesuffix("}")
        if not note:
            yield text
        elif len(text) + len(note) + 4 <= LINE_WIDTH:
            yield f"{text}  # {note}"
        else:
            yield from (f"{indent}# {line}" for line in textwrap.wrap(note, LINE_WIDTH - len(indent) - 2))
            yield text
        yield from inner


def _notes(kind: type) -> dict[str, str]:
    """By field, the comment behind it in the code of its class or those it inherits from, or right above it."""
    found: dict[str, str] = {}
    for cls in reversed(kind.__mro__):
        if not cls.__module__.startswith("limbeck."):
            continue
        source = textwrap.dedent(inspect.getsource(cls))
        comments, alone = {}, set()
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.COMMENT:
                comments[token.start[0]] = token.string.lstrip("# ")
                if not token.line[: token.start[1]].strip():
                    alone.add(token.start[0])
        (tree,) = ast.parse(source).body
        for node in getattr(tree, "body", []):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                above = node.lineno
                while above - 1 in alone:
                    above -= 1
                lines = [comments[i] for i in range(above, (node.end_lineno or node.lineno) + 1) if i in comments]
                found[node.target.id] = " ".join(lines).replace("None", "null")  # as YAML calls it
    return found
