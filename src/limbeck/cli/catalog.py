"""The mixers and measures that there are, as data: lists and shell completion need no torch for it.

    read_catalog()["mixers"]["gla"]["summary"]
    python -m limbeck.cli.catalog                    # writes catalog.json anew, after a change of mixers or measures

The file is made from the registries alone, and a test compares it with them. Mixers that are not Limbeck's own (of a
file, of an installed package) are not in it.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

CATALOG = Path(__file__).with_name("catalog.json")
# of the attention whose numbers the catalog gives, SmolLM2-135M's; its fields are those of `limbeck.mixers.HeadShape`
SHAPE: dict[str, Any] = {
    "hidden": 576,
    "heads": 9,
    "kv_heads": 3,
    "key_width": 64,
    "value_width": 64,
    "scale": 0.125,
    "layers": 30,
}


@cache
def read_catalog() -> dict[str, Any]:
    """Read the stored catalog, or build it where there is none; see `build_catalog`."""
    return json.loads(CATALOG.read_text(encoding="utf-8") if CATALOG.is_file() else render_catalog())


def has_other_mixers() -> bool:
    """Tell whether installed packages announce mixers of their own."""
    # late, for start-up time
    from importlib.metadata import entry_points

    return bool(entry_points(group="limbeck.mixers"))


def build_catalog() -> dict[str, Any]:
    """Build the catalog from the registries of mixers and measures.

    Returns:
        presets: their names.
        mixer_sets: the mixers of each named set.
        mixers: what `describe_mixer` returns, by name and preset.
        measures: for each its `description` and its `settings` with their defaults.
    """
    # late: both import torch
    from limbeck import mixers
    from limbeck.evaluation import measure

    measures = map(measure.get_measure, measure.MEASURE_MODULES)
    own = [name for name in mixers.list_mixers() if mixers.registry.get_origin(name) is None]
    return {
        "presets": list(mixers.PRESETS),
        "mixer_sets": {name: [one for one in names if one in own] for name, names in mixers.list_mixer_sets().items()},
        "mixers": {name: {preset: describe_mixer(name, preset) for preset in mixers.PRESETS} for name in own},
        "measures": {
            one.name: {"description": one.description, "settings": one.settings().model_dump(mode="json")}
            for one in measures
        },
    }


def describe_mixer(name: str, preset: str) -> dict[str, Any]:
    """Describe a mixer in a layer of `SHAPE`: operator, parameters that it adds, numbers in its state, options."""
    # late: it imports torch
    from limbeck import mixers

    mixer = mixers.build(name, mixers.HeadShape(**SHAPE), preset=preset)
    return {
        "operator": mixer.operator_name,
        "new_parameters": sum(p.numel() for p in mixer.parameters()),
        "state": mixer.state_numel(),
        "state_grows": mixer.grows,
        "summary": mixer.summary,
        "options": vars(mixer.options),
    }


def render_catalog() -> str:
    """Render the text of catalog.json."""
    return json.dumps(build_catalog(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    CATALOG.write_text(render_catalog(), encoding="utf-8")
