"""Stories of people, places and things, with a question that takes one, two or three of their sentences to answer.

    story = tell_story(task=2, answer=3, named_last=False, rng=random.Random(0))
    story.sentences          # "Ingrid came to the barn.", "Ingrid picked up the kettle.", "Ingrid went to the chapel."
    story.question           # "Where is the kettle?"
    story.lead, story.answer, story.wrong_answers       # "The kettle is in the", "chapel" = PLACES[3], the other places

| task | asked | sentences that answer it |
| --- | --- | --- |
| 1 | where somebody is | where they went last |
| 2 | where a thing is | who picked it up, and where they went last |
| 3 | where a thing was before it came to a place | who picked it up, and where they were before and went then |

The tasks are the first three of bAbI (Weston et al. 2015, arXiv 1502.05698, section 3), told in other words about other
people. A story is drawn until it has such a question. Two ways to be right without reading are shut, which bAbI leaves
open: the caller chooses the answer, so that each place can be it equally often, and whether it is the place that the
story names last, which would else be right in a third to a half of the stories of tasks 1 and 2.
"""

import random
from dataclasses import dataclass

from limbeck.core.errors import LimbeckError

PEOPLE = ("Anselm", "Celia", "Duncan", "Ingrid", "Matteo", "Priya", "Tomasz", "Yusuf")
PLACES = ("attic", "barn", "cellar", "chapel", "library", "tower")
THINGS = ("compass", "kettle", "ladder", "lantern", "umbrella", "violin")
MOVES = ("{person} came to the {place}.", "{person} went to the {place}.", "{person} walked into the {place}.")
PICKS = ("{person} picked up the {thing}.", "{person} got hold of the {thing}.")
DROPS = ("{person} put the {thing} down.", "{person} set the {thing} aside.")
SENTENCES = {1: 8, 2: 12, 3: 16}  # of a story, by task
IN_A_STORY = (4, 3)  # people and things
MOVE_SHARE = 0.6  # of the sentences of tasks 2 and 3, where nothing else is impossible


@dataclass(frozen=True)
class Story:
    """A story with its question.

    lead: beginning of the sentence that the answer ends.
    answer, wrong_answers: names of places.
    supports: indices of the sentences that answer the question, in order.
    """

    sentences: list[str]
    question: str
    lead: str
    answer: str
    wrong_answers: list[str]
    supports: list[int]


@dataclass(frozen=True)
class _Event:
    """Somebody goes to a place (a number), picks a thing up, or puts it down."""

    templates: tuple[str, ...]
    person: str
    place: int = -1
    thing: str = ""


@dataclass(frozen=True)
class _Asked:
    """What can be asked of a story: the answer and the place that the question names, as numbers, and the supports."""

    question: str
    lead: str
    answer: int
    supports: set[int]
    named: int = 0


def tell_story(task: int, answer: int, named_last: bool, rng: random.Random) -> Story:
    """Tell a story whose question has the answer `PLACES[answer]`.

    Args:
        named_last: whether that is the place that the story names last.

    Raises:
        LimbeckError: an unknown task.
    """
    if task not in SENTENCES:
        raise LimbeckError(f"there is no task {task} of stories", expected="1, 2 or 3")
    asked: list[_Asked] = []
    while not asked:
        events = _draw_events(task, rng)
        last = [event.place for event in events if event.templates is MOVES][-1]
        possible = _list_locations(events) if task == 1 else _list_carried(events, task)
        asked = [one for one in possible if (one.answer == last) == named_last]
    chosen = rng.choice(asked)
    # Places are numbers so far; they are named from the one on that is to be the answer.
    shift = answer - chosen.answer

    def name(place: int) -> str:
        return PLACES[(place + shift) % len(PLACES)]

    return Story(
        sentences=[
            rng.choice(event.templates).format(person=event.person, place=name(event.place), thing=event.thing)
            for event in events
        ],
        question=chosen.question.format(place=name(chosen.named)),
        lead=chosen.lead.format(place=name(chosen.named)),
        answer=name(chosen.answer),
        wrong_answers=[place for place in PLACES if place != name(chosen.answer)],
        supports=sorted(chosen.supports),
    )


def _draw_events(task: int, rng: random.Random) -> list[_Event]:
    """Draw what happens; nobody picks up what somebody holds, or what is known to lie elsewhere."""
    people, things = (rng.sample(names, count) for names, count in zip((PEOPLE, THINGS), IN_A_STORY))
    at: dict[str, int] = {}
    holders: dict[str, str] = {}
    lies: dict[str, int] = {}
    events: list[_Event] = []
    while len(events) < SENTENCES[task]:
        person = rng.choice(people)
        held = [thing for thing in things if holders.get(thing) == person]
        near = [
            thing
            for thing in things
            if thing not in holders and person in at and lies.get(thing, at[person]) == at[person]
        ]
        if task == 1 or rng.random() < MOVE_SHARE or not held + near:
            at[person] = rng.choice([place for place in range(len(PLACES)) if place != at.get(person)])
            events.append(_Event(MOVES, person, place=at[person]))
            continue
        thing = rng.choice(held + near)
        if thing in held:
            lies[thing] = at[holders.pop(thing)]
        else:
            holders[thing] = person
        events.append(_Event(DROPS if thing in held else PICKS, person, thing=thing))
    return events


def _list_locations(events: list[_Event]) -> list[_Asked]:
    """List where everybody is."""
    last = {event.person: (event.place, index) for index, event in enumerate(events)}
    return [
        _Asked(f"Where is {person}?", f"{person} is in the", place, {index}) for person, (place, index) in last.items()
    ]


def _list_carried(events: list[_Event], task: int) -> list[_Asked]:
    """List where the things are that somebody carries, or where they were before, if two or three sentences say it."""
    at: dict[str, tuple[int, int]] = {}
    picked: dict[str, tuple[str, int]] = {}
    stations: dict[str, list[tuple[int, set[int]]]] = {}
    for index, event in enumerate(events):
        if event.templates is MOVES:
            at[event.person] = event.place, index
            for thing, (holder, since) in picked.items():
                if holder == event.person:
                    stations[thing].append((event.place, {since, index}))
        elif event.templates is PICKS:
            place, since = at[event.person]
            picked[event.thing] = event.person, index
            stations.setdefault(event.thing, []).append((place, {since, index}))
        else:
            del picked[event.thing]
    asked = []
    for thing in picked:
        *_, (before, earlier), (place, latest) = [(-1, set[int]()), *stations[thing]]
        if task == 2 and max(latest) > picked[thing][1]:
            asked.append(_Asked(f"Where is the {thing}?", f"The {thing} is in the", place, latest))
        once = [station for station, _ in stations[thing]].count(place) == 1
        if task == 3 and before not in (-1, place) and once and len(earlier | latest) == 3:
            question = f"Where was the {thing} before it came to the {{place}}?"
            lead = f"Before it came to the {{place}}, the {thing} was in the"
            asked.append(_Asked(question, lead, before, earlier | latest, named=place))
    return asked
