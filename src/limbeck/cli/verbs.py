"""What every verb of the command line shares: its group, the examples of its help, and options' old names.

    @verb("limbeck students", "limbeck students paper-v3 --options")
    def students(which: MixerSet = "all", preset: Preset = "default") -> None: ...

`GROUPS` is the list of verbs: a verb is a module of `limbeck.cli` with a function of the same name. The first sentence
of its docstring is its line in `limbeck --help` and has to fit there (64 characters).
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup, TyperOption

from limbeck.cli.old_options import rename_old_options
from limbeck.cli.results import reserve_stdout
from limbeck.core.console import console
from limbeck.core.errors import LimbeckError

GROUPS = {
    "Make": ("distill", "convert", "select"),
    "Measure": ("eval", "bench", "matrices"),
    "Study": ("study", "report"),
    "Share": ("generate", "chat", "export", "push"),
    "Help yourself": ("students", "recipe", "families", "check", "assets", "doctor"),
}
VERBS = tuple(name for names in GROUPS.values() for name in names)


@contextmanager
def _quiet(asked: bool) -> Iterator[None]:
    """Print no message inside, where that is asked for; all but the first of several processes print none anyway."""
    before = console.quiet
    console.quiet = before or asked
    try:
        yield
    finally:
        console.quiet = before


class Verb(TyperCommand):
    """A verb: it takes the old names of its options too, and --json and --quiet hold while it runs."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        with _quiet(not {"--quiet", "-q"}.isdisjoint(args)):
            args = rename_old_options(self.name or "", args)
            self._tell_repeated(ctx, args)
            return super().parse_args(ctx, args)

    def _tell_repeated(self, ctx: Any, args: list[str]) -> None:
        """Say which of several values of an option counts: the last one, as where a hint is typed behind a command.

        Raises:
            LimbeckError: two texts to distill with, which were surely both meant.
        """
        if ctx.resilient_parsing:  # the shell asks what could follow
            return
        *_, order = self.make_parser(ctx).parse_args(args=list(args))
        for param in dict.fromkeys(order):
            single = isinstance(param, TyperOption) and not param.multiple and not param.is_flag
            if not single or order.count(param) == 1:
                continue
            name = max(param.opts, key=len)
            if (self.name, name) == ("distill", "--data"):
                raise LimbeckError(
                    f"{name} is given {order.count(param)} times",
                    expected="one file or folder, or several in a mixture",
                    hint="--set 'data.sources=[{source: one.jsonl}, {source: two.jsonl}]'",
                )
            console.print(f"{name} is given {order.count(param)} times; the last counts")

    def invoke(self, ctx: Any) -> Any:
        with reserve_stdout() if ctx.params.get("as_json") else nullcontext(), _quiet(bool(ctx.params.get("quiet"))):
            return super().invoke(ctx)

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        shown = [param for param in self.get_params(ctx) if not getattr(param, "hidden", False)]
        return ["[OPTIONS]", *(piece for param in shown for piece in param.get_usage_pieces(ctx))]


class VerbGroup(TyperGroup):
    """All verbs; their help lists them by `GROUPS`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        own = next((i for i, arg in enumerate(args) if arg in VERBS), len(args))
        return super().parse_args(ctx, [*rename_old_options("", args[:own]), *args[own:]])

    def list_commands(self, ctx: Any) -> list[str]:
        return [name for name in VERBS if name in self.commands]

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        indent = max(map(len, VERBS)) + 6
        for title, names in GROUPS.items():
            shown = [self.commands[name] for name in names if name in self.commands]
            rows = [(one.name.ljust(indent - 6), one.get_short_help_str(formatter.width - indent)) for one in shown]
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)


app = typer.Typer(
    name="limbeck",
    cls=VerbGroup,
    help="Distill a pretrained softmax-attention language model into a subquadratic one.",
    epilog="Every verb has examples in its help: limbeck VERB --help",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def verb(*examples: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function as the verb of its name, with these commands at the end of its help."""
    return app.command(cls=Verb, epilog=format_examples(examples))


def format_examples(commands: Iterable[str]) -> str:
    """Format the examples of a help text; "\\b" keeps the lines from being joined."""
    return "\b\nExamples:\n" + "\n".join(f"  {command}" for command in commands)
