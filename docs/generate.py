"""Write the parts of the reference pages that come from the code: keys, commands, mixers, claims.

    python docs/generate.py              # rewrites docs/reference/*.md, as `make reference` does
    python docs/generate.py --check      # exit code 1, and their names, if some are not current

A generated part stands between `<!-- generated: NAME -->` and `<!-- end -->`; all around it is written by hand. Keys of
recipes and studies come from the pydantic models and the strings below their fields, commands from typer, options and
sizes from the mixers. tests/docs/test_site.py fails where a part is not current.
"""

import importlib
import json
import pkgutil
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from enum import Enum
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

PAGES = Path(__file__).parent / "reference"
KINDS = {"int": "number", "float": "number", "path": "path", "list": "text", "str": "text", "text": "text"}
EVERYWHERE = {"--help", "--json", "--quiet"}  # options that the page explains once
PART = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.S)


def write_pages(check: bool = False) -> list[str]:
    """Write every generated part; returns the names of the pages that were not current.

    Args:
        check: change no file.
    """
    outdated = []
    for page in sorted(PAGES.glob("*.md")):
        text = page.read_text(encoding="utf-8")
        new = PART.sub(lambda part: f"{part[1]}\n{PARTS[part[2]]().strip()}\n\n{part[3]}", text)
        if new != text:
            outdated.append(page.name)
            if not check:
                page.write_text(new, encoding="utf-8")
    return outdated


def table(columns: list[str], rows: list[list[str]]) -> str:
    """Format a table in Markdown; a bar inside a cell is escaped."""
    cells = [[cell.replace("\n", " ").replace("|", "\\|") for cell in row] for row in rows]
    lines = [" | ".join(row) for row in [columns, ["---"] * len(columns), *cells]]
    return "\n".join(f"| {line} |" for line in lines)


# ------------------------------------------------------------------ keys of recipes and studies


def render_recipe() -> str:
    """Render the keys of a recipe, part by part."""
    from limbeck.core import objectives, stage_settings, text_settings
    from limbeck.core import recipe as recipes

    stage, trained = stage_settings.StageSettings, stage_settings.Trained
    parts: list[tuple[str, type[BaseModel], list[str] | None]] = [
        ("The recipe", recipes.Recipe, None),
        ("student", recipes.Student, None),
        ("student.rules", recipes.Rule, None),
        ("data", text_settings.Data, None),
        ("data.sources", text_settings.Source, None),
        ("Every stage", stage, None),
        ("Stages with gradient steps", trained, [key for key in trained.model_fields if key not in stage.model_fields]),
        *((f"Stage {name}", cls, own_keys(cls)) for name, cls in stage_settings.STAGES.items()),
        ("layer_early_stopping", stage_settings.EarlyStopping, None),
        ("lora", stage_settings.Lora, None),
        ("objectives", objectives.Objectives, None),
        *((f"objectives.{key}", find_part(field), None) for key, field in objectives.Objectives.model_fields.items()),
        ("evaluation", recipes.Evaluation, None),
        ("A small teacher", recipes.TeacherRecipe, None),
    ]
    return render_parts(parts)


def render_study() -> str:
    """Render the keys of a study."""
    from limbeck.study import spec

    return render_parts(
        [("The study", spec.Study, None), ("grid", spec.Grid, None), ("grid.students", spec.StudentSpec, None)]
    )


def own_keys(cls: type[BaseModel]) -> list[str]:
    """List the keys that a stage adds to what stages share, or has with another default or meaning."""
    return [key for key in cls.model_fields if key in cls.__annotations__]


def render_parts(parts: list[tuple[str, type[BaseModel], list[str] | None]]) -> str:
    """Render a heading, the class's first sentence and a table of keys for each part.

    Args:
        parts: heading, class, and its keys; None for all of them.
    """
    sections = {cls.__name__: heading for heading, cls, _ in parts}
    rendered = []
    for heading, cls, keys in parts:
        schema = cls.model_json_schema()["properties"]
        rows = [
            [
                f"`{key}`",
                describe(field),
                name_type(schema[key], sections),
                show_default(field.is_required(), field.get_default(call_default_factory=True)),
            ]
            for key, field in sorted(cls.model_fields.items(), key=lambda item: item[0] not in ("name", "stage"))
            if keys is None or key in keys
        ]
        about = link_pages((cls.__doc__ or "").split("\n\n")[0])
        rendered.append(f"### {heading}\n\n{about}\n\n" + table(["key", "meaning", "type", "default"], rows))
    return "\n\n".join(rendered)


def describe(field: FieldInfo) -> str:
    """Return the string below a key, or what its part says of itself."""
    about = field.description or getattr(find_part(field), "__doc__", None) or ""
    return link_pages(" ".join(about.split("\n\n")[0].split()))


def find_part(field: FieldInfo) -> Any:
    """Return the pydantic model that a field holds; None for plain values."""
    kinds = [kind for kind in (field.annotation, *get_args(field.annotation)) if isinstance(kind, type)]
    return next((kind for kind in kinds if issubclass(kind, BaseModel)), None)


def link_pages(text: str) -> str:
    """Turn the path of a page into a link to it."""
    return re.sub(r"docs/(\w+)/(\w+)\.md", r"[\2](../\1/\2.md)", text)


def name_type(schema: dict[str, Any], sections: dict[str, str]) -> str:
    """Name the type of a key, with its bounds: "integer > 0 or null"."""
    if "$ref" in schema:
        heading = sections.get(schema["$ref"].rsplit("/", 1)[1], "")
        return f"[{heading.lower()}](#{heading.lower().replace(' ', '-').replace('.', '')})" if heading else "mapping"
    for many in ("anyOf", "oneOf"):
        if many in schema:
            return " or ".join(dict.fromkeys(name_type(one, sections) for one in schema[many]))
    if "const" in schema or "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    if schema.get("type") == "array":
        inner = schema.get("items") or {}
        if "prefixItems" in schema:
            return f"{len(schema['prefixItems'])} numbers"
        return f"list of {name_type(inner, sections)}" if inner else "list"
    bounds = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}
    said = [f"{sign} {format_number(schema[key])}" for key, sign in bounds.items() if key in schema]
    kinds = {"object": "mapping", "string": "text", "boolean": "true or false"}
    kind = str(schema.get("type", "any"))
    return " ".join([kinds.get(kind, kind), ", ".join(said)]).strip()


def format_number(value: float) -> str:
    """Format a bound: powers of two that are long as such."""
    return f"2^{value.bit_length() - 1}" if isinstance(value, int) and value >= 2**40 else f"{value:g}"


def show_default(required: bool, value: Any) -> str:
    """Show a default as YAML has it."""
    if required:
        return "required"
    if isinstance(value, BaseModel):
        return "see there"
    text = json.dumps(value, ensure_ascii=False, default=str)
    return "" if text == '""' else f"`{value if isinstance(value, str) else text}`"


# ------------------------------------------------------------------ commands


def render_commands() -> str:
    """Render every command with its arguments, options and examples."""
    from typer.main import get_command

    import limbeck.cli

    for module in pkgutil.iter_modules(limbeck.cli.__path__):
        importlib.import_module(f"limbeck.cli.{module.name}")
    verbs = get_command(limbeck.cli.app).commands  # type: ignore[attr-defined]
    names = [f"[`{name}`](#limbeck-{name})" for name in sorted(verbs)]
    return " · ".join(names) + "\n\n" + "\n\n".join(render_command(name, verbs[name]) for name in sorted(verbs))


def render_command(name: str, verb: Any) -> str:
    """Render one command."""
    arguments = [p for p in verb.params if p.param_type_name == "argument"]
    usage = " ".join(f"{argument_name(p)}" if p.required else f"[{argument_name(p)}]" for p in arguments)
    lines = [
        f"## limbeck {name}",
        "",
        tidy(verb.help),
        "",
        "```text",
        f"limbeck {name} {usage}".rstrip() + " [OPTIONS]",
        "```",
    ]
    if arguments:
        rows = [[f"`{argument_name(p)}`", tidy(p.help), default_of(p)] for p in arguments]
        lines += ["", table(["argument", "meaning", "default"], rows)]
    options = [p for p in verb.params if p.param_type_name == "option" and not getattr(p, "hidden", False)]
    rows = [
        [" ".join(f"`{opt}`" for opt in [*p.opts, *p.secondary_opts]), tidy(p.help), type_of(p), default_of(p)]
        for p in options
        if not EVERYWHERE & {*p.opts}
    ]
    if rows:
        lines += ["", table(["option", "meaning", "value", "default"], rows)]
    if common := [f"`{p.opts[0]}`" for p in options if (EVERYWHERE - {"--help"}) & {*p.opts}]:
        lines += ["", f"Also {' and '.join(common)}."]
    examples = re.findall(r"^\s+(limbeck .*)$", verb.epilog or "", re.M)
    if examples:
        lines += ["", "```", *examples, "```"]
    return "\n".join(lines)


def argument_name(param: Any) -> str:
    """Name an argument as in the usage line."""
    name = (param.metavar or param.name).upper()
    return f"{name}..." if param.nargs == -1 and not name.endswith("...") else name


def type_of(param: Any) -> str:
    """Name what an option takes; nothing for a switch."""
    if param.is_flag:
        return ""
    described = getattr(param, "type_descriptor", None)  # newer versions of typer have no `type`
    kind = described.annotation if described else param.type.name
    if isinstance(kind, type) and issubclass(kind, Enum):
        kind = ", ".join(f"`{choice.value}`" for choice in kind)
    name = getattr(kind, "__name__", str(kind)).lower()
    word = next((word for part, word in KINDS.items() if part in name), name)
    return f"{word}, repeatable" if param.multiple else word


def default_of(param: Any) -> str:
    """Show an option's default, if it has one worth saying."""
    default = param.default
    if param.required or default is None or callable(default) or default in (False, "", [], ()):
        return "required" if param.required else ""
    return f"`{default}`"


def tidy(text: str | None) -> str:
    """Join the lines of a help text; paragraphs stay."""
    return "\n\n".join(" ".join(part.split()) for part in (text or "").replace("\b", "").split("\n\n"))


# ------------------------------------------------------------------ mixers and claims


def each_mixer() -> Iterator[tuple[str, Any]]:
    """Yield the name and class of every mixer that comes with Limbeck."""
    from limbeck import mixers

    for name in mixers.list_mixers():
        if mixers.get(name).__module__.startswith("limbeck.mixers"):
            yield name, mixers.get(name)


def render_mixers() -> str:
    """Render what each mixer is, its operator and source, and the options that it has of its own."""
    from limbeck.mixers import Options, resolve_options

    common = {field.name for field in fields(Options)}
    rows = []
    for name, cls in each_mixer():
        options = resolve_options(name)
        own = ", ".join(f"`{k.name}={getattr(options, k.name)}`" for k in fields(options) if k.name not in common)
        published = ", ".join(f"`{key}={value}`" for key, value in cls.published.items())
        rows.append([f"`{name}`", cls.summary, own, published, cls.source])
    return table(["mixer", "what it is", "its own options, by default", "`published` sets", "source"], rows)


def render_sizes() -> str:
    """Render new parameters and state of one layer of SmolLM2-135M, by preset."""
    from limbeck import mixers

    shape = mixers.HeadShape(hidden=576, heads=9, kv_heads=3, key_width=64, value_width=64, scale=0.125, layers=30)
    rows = []
    for name, _ in each_mixer():
        made = [mixers.build(name, shape, preset=preset) for preset in mixers.PRESETS]
        parameters = [f"{sum(p.numel() for p in mixer.parameters()):,}" for mixer in made]
        rows.append([f"`{name}`", *parameters, *(f"{m.state_numel():,}" + " a token" * m.grows for m in made)])
    columns = ["mixer", "parameters: default", "published", "controlled", "state: default", "published", "controlled"]
    return table(columns, rows).replace("| --- | --- |", "| --- | ---: |", 1)


def render_claims() -> str:
    """Render the claims that a study may name."""
    from limbeck.study.claims import CLAIMS

    return table(["claim", "statement", "source"], [[f"`{n}`", c.statement, c.source] for n, c in CLAIMS.items()])


PARTS: dict[str, Callable[[], str]] = {
    "recipe": render_recipe,
    "study": render_study,
    "commands": render_commands,
    "mixers": render_mixers,
    "sizes": render_sizes,
    "claims": render_claims,
}

if __name__ == "__main__":
    found = write_pages(check="--check" in sys.argv)
    if found and "--check" in sys.argv:
        sys.exit(f"not current: {', '.join(found)}; try: make reference")
