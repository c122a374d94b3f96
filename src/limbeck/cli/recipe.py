"""limbeck recipe: print a recipe or a study as a file to start your own from."""

import textwrap
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from limbeck.cli.completion import complete_recipes_and_studies
from limbeck.cli.options import STUDIES_FOLDER, Json, Quiet
from limbeck.cli.results import print_json
from limbeck.cli.verbs import verb
from limbeck.core.console import output
from limbeck.core.errors import LimbeckError, suggest_closest

LINE_WIDTH = 120  # of a line with its comment; longer comments stand above their line


@verb("limbeck recipe > recipe.yaml", "limbeck recipe paper-experiment-1 > study.yaml")
def recipe(
    name: Annotated[
        str,
        typer.Argument(
            help="A built-in recipe, study or teacher, or a YAML file of a recipe.",
            autocompletion=complete_recipes_and_studies,
        ),
    ] = "limbeck",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Print a recipe with every key explained, to start from."""
    # late, for a fast --help
    from limbeck.core.config import read_yaml
    from limbeck.core.recipe import BUILT_IN, Recipe

    recipes = sorted(path.stem for path in BUILT_IN.glob("*.yaml"))
    folders = STUDIES_FOLDER, BUILT_IN / "teachers"
    others = {path.stem: path for folder in folders for path in sorted(folder.glob("*.yaml"))}
    if name in others and as_json:
        print_json(read_yaml(others[name], "file of settings", "keys and values"))
        return
    if name in others:
        output.out(others[name].read_text(encoding="utf-8"), end="")
        return
    if name not in recipes and not name.endswith((".yaml", ".yml")):
        raise LimbeckError(
            f"unknown recipe '{name}'{suggest_closest(name, [*recipes, *others])}",
            expected=f"a YAML file, or one of: {', '.join([*recipes, *others])}",
        )
    if as_json:
        print_json(Recipe.load(name))
        return
    output.out("\n".join(render_with_comments(Recipe.load(name))))


def render_with_comments(settings: Any, indent: str = "") -> Iterator[str]:
    """Write settings as lines of YAML, each key with the description of its field as a comment.

    Args:
        settings: a pydantic model.
    """
    # late, for a fast --help
    import yaml
    from pydantic import BaseModel

    fields = type(settings).model_fields
    for key in sorted(fields, key=lambda key: key not in ("name", "stage")):
        value, comment = getattr(settings, key), " ".join((fields[key].description or "").split())
        nested: list[str] = []
        if isinstance(value, BaseModel):
            nested, text = list(render_with_comments(value, indent + "  ")), f"{indent}{key}:"
        elif isinstance(value, list) and value and isinstance(value[0], BaseModel):
            for one in value:
                first, *more = render_with_comments(one, indent + "    ")
                nested += [f"{indent}  - {first.strip()}", *more]
            text = f"{indent}{key}:"
        else:
            content = settings.model_dump(mode="json", include={key})
            flow = yaml.safe_dump(content, default_flow_style=True, width=10**6, allow_unicode=True).strip()
            text = indent + flow.removeprefix("{").removesuffix("}")
        if not comment:
            yield text
        elif len(text) + len(comment) + 4 <= LINE_WIDTH:
            yield f"{text}  # {comment}"
        else:
            yield from (f"{indent}# {line}" for line in textwrap.wrap(comment, LINE_WIDTH - len(indent) - 2))
            yield text
        yield from nested
