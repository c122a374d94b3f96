"""Conversations: rendered by the tokenizer's chat template, only the assistant's answers are learnt.

    encoder = ChatEncoder(tokenizer, eos=2)
    ids, mask = encoder.encode([json.dumps([{"role": "user", "content": "Hi"}, ...]).encode()])[0]

A conversation is rendered once, as a whole, and its answers are found in that text: by `{% generation %}` where the
template has it, else by rendering it again with a mark in each answer. So a template may show earlier answers otherwise
than the last one (thoughts, empty think blocks), and what it shows is learnt. What is in a message is text: control
tokens in it are split. A conversation that cannot be rendered faithfully is dropped, counted and reported.
"""

import hashlib
import json
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from transformers.utils.chat_template_utils import render_jinja_template

from limbeck.core.console import console
from limbeck.core.errors import LimbeckError
from limbeck.data import documents as sources
from limbeck.data.documents import MESSAGES_FIELD
from limbeck.data.hub import LoadedDataset
from limbeck.data.special_tokens import (
    compile_control_pattern,
    find_special_token_ids,
    get_control_token_ids,
    prepend_prefix,
    run_tokenizer,
    tokenize_inner_piece,
)
from limbeck.data.tokenization import Encoded

MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
EMPTY_CONVERSATION: Encoded = (np.empty(0, np.int64), np.empty(0, np.uint8))
# Noncharacters of Unicode: around a control token of a message, before and behind an answer.
OPEN, CLOSE, FROM, UPTO = "\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3"
MARKS = re.compile(f"[{OPEN}{CLOSE}{FROM}{UPTO}]")
# The clock of a template stands still, so that the same text gives the same tokens on every day.
CLOCK = {
    "%Y": "2025", "%y": "25", "%m": "01", "%-m": "1", "%d": "01", "%-d": "1", "%e": " 1", "%j": "001",
    "%B": "January", "%b": "Jan", "%A": "Wednesday", "%a": "Wed", "%H": "12", "%I": "12", "%M": "00", "%S": "00",
    "%p": "PM", "%Z": "", "%z": "", "%F": "2025-01-01", "%D": "01/01/25", "%T": "12:00:00", "%R": "12:00",
    "%x": "01/01/25", "%X": "12:00:00", "%c": "Wed Jan  1 12:00:00 2025",
}  # fmt: skip
_CHAIN = "".join(f" | replace('{directive}', '{value}')" for directive, value in CLOCK.items())
# In front of a template; the newline belongs to the block and is not rendered.
STOPPED = f"{{%- macro strftime_now(format) -%}}{{{{- format{_CHAIN} -}}}}{{%- endmacro %}}\n"
TEXT_PARTS = (None, "text", "input_text", "output_text")


class ConversationError(Exception):
    """Why a conversation is dropped."""


Span = tuple[int, int]  # of characters in a text: begin, end


@dataclass(frozen=True)
class RenderedText:
    """A rendered text without its marks, and where they stood.

    control: the control tokens that came with a message.
    begins, ends: of answers.
    at: where the marks were in the text as rendered.
    """

    text: str
    control: list[Span]
    begins: list[int]
    ends: list[int]
    at: list[int]

    @classmethod
    def of(cls, rendered: str) -> "RenderedText":
        """Takes the marks out of a rendered text."""
        shown = cls(MARKS.sub("", rendered), [], [], [], [found.start() for found in MARKS.finditer(rendered)])
        opened = None
        for number, place in enumerate(shown.at):
            mark, here = rendered[place], place - number
            if mark == CLOSE and opened is not None:
                shown.control.append((opened, here))
            opened = here if mark == OPEN else None
            if mark in (FROM, UPTO):
                (shown.begins if mark == FROM else shown.ends).append(here)
        return shown

    def back(self, place: int) -> int:
        """Where a place of the text as rendered is in the text without marks."""
        return place - bisect_left(self.at, place)


class ChatEncoder:
    """Conversations as tokens, with a mask of the answers.

    Args:
        tokenizer: with a chat template.
        eos: token that ends a document; put there if the template ends the last answer with no such token.
        field: of the messages.

    Raises:
        LimbeckError: the tokenizer has no chat template.
    """

    has_mask = True

    def __init__(self, tokenizer: Any, eos: int, field: str = MESSAGES_FIELD):
        template = getattr(tokenizer, "chat_template", None)
        if not template:
            raise LimbeckError(
                "the records are conversations, and the tokenizer has no chat template",
                expected="a teacher whose tokenizer has one (an 'instruct' or 'chat' model)",
                hint="data.chat: false and data.text_field to train on a field of plain text",
            )
        self.tokenizer, self.eos, self.field = tokenizer, eos, field
        self.prefix_ids = find_special_token_ids(tokenizer).prefix_ids
        if not self.prefix_ids and tokenizer.bos_token_id is not None and "bos_token" in json.dumps(template):
            self.prefix_ids = (tokenizer.bos_token_id,)
        self.control, self.stops = compile_control_pattern(tokenizer), get_control_token_ids(tokenizer) | {eos}
        tokens = tokenizer.convert_ids_to_tokens(sorted(self.stops))
        found = run_tokenizer(tokenizer, tokens, split_special_tokens=True)["input_ids"]
        # Unigram vocabularies find a control token in plain text, unless it comes in two pieces.
        self.breaks = not self.stops.isdisjoint(i for ids in found for i in ids)
        shown = [STOPPED, template] if "strftime_now" in json.dumps(template) else template
        self.settings = {"chat": hashlib.sha256(json.dumps(shown, sort_keys=True).encode()).hexdigest()}
        self._start_again()

    @property
    def max_token_id(self) -> int:
        """Largest id that can come."""
        return max(self.eos, *self.tokenizer.get_vocab().values())

    def read(self, source: str | LoadedDataset, *, allow_empty: bool = False) -> Iterator[bytes]:
        """The conversations as JSON."""
        for text in sources.iter_documents(source, text_field=self.field, chat=True, allow_empty=allow_empty):
            yield text.encode("utf-8", "replace")

    def encode(self, documents: list[bytes]) -> list[Encoded]:
        """Ids and mask of each conversation; nothing where it is dropped."""
        made = []
        for raw in documents:
            self.seen += 1
            try:
                made.append(self._tokens(*self._rendered(json.loads(raw))))
            except ConversationError as why:
                self.dropped[str(why)] += 1
                made.append(EMPTY_CONVERSATION)
        return made

    def report(self, source: str) -> None:
        """Says how many conversations were dropped, and for what; raises where none is left."""
        dropped = sum(self.dropped.values())
        if dropped:
            whys = [f"{why} ({n:,})" if n < dropped else why for why, n in self.dropped.most_common(4)]
            whys += [f"{len(self.dropped) - 4} other reasons"] if len(self.dropped) > 4 else []
            found = f"{dropped:,} of {self.seen:,} conversations of '{source}' were dropped: {'; '.join(whys)}"
            if dropped == self.seen:
                raise LimbeckError(found, expected="conversations that the tokenizer's chat template can render")
            console.print(found, markup=False)
        for what, n in self.unseen.items():
            console.print(
                f"{n:,} of {self.seen:,} conversations of '{source}' have {what} that the chat template does not show: "
                "learnt without",
                markup=False,
            )
        self._start_again()

    def _start_again(self) -> None:
        self.seen = 0
        self.dropped: Counter[str] = Counter()
        self.unseen: Counter[str] = Counter()

    def _rendered(self, record: Any) -> tuple[RenderedText, list[Span]]:
        """The text of a whole conversation, and its answers in it."""
        record = record if isinstance(record, dict) else {MESSAGES_FIELD: record}
        messages = [_message(one) for one in record[MESSAGES_FIELD]]
        answers = [i for i, one in enumerate(messages) if one["role"] == "assistant"]
        if not answers:
            raise ConversationError("no answer of the assistant in it")
        tools = _without_none(_from_json(record.get("tools"))) or None
        if isinstance(tools, list):
            tools = [_from_json(one) for one in tools]
        if tools is not None and not (isinstance(tools, list) and all(isinstance(one, dict) for one in tools)):
            raise ConversationError("its tools are no list of objects")
        try:
            template = self.tokenizer.get_chat_template(None, tools)
        except ValueError as error:  # several templates, and none for this
            raise ConversationError(" ".join(str(error).split())[:200]) from error
        marked = bool(MARKED.search(template))
        settings = {
            "tools": self._guarded(tools),
            "chat_template": STOPPED + template if "strftime_now" in template else template,
            "return_assistant_tokens_mask": marked,
            **self.tokenizer.special_tokens_map,
            **(_from_json(record.get("chat_template_kwargs")) or {}),
        }

        def render(messages: list[dict[str, Any]], ask: bool = False) -> tuple[str, list[list[Span]]]:
            try:
                made: Any = render_jinja_template([messages], add_generation_prompt=ask, **settings)
            except Exception as error:  # templates raise what they like: roles that do not alternate, unknown fields
                raise ConversationError(" ".join(str(error).split())[:200]) from error
            return made[0][0], made[1]

        messages, text, places = _with_calls(self._guarded(messages), render)
        shown = RenderedText.of(text)
        for what in {_turn(one["role"]) for one in messages if not _shows(text, one)}:
            self.unseen[what] += 1
        if any(
            name and name not in shown.text for name in (one.get("function", one).get("name") for one in tools or [])
        ):
            self.unseen["tools"] += 1
        if marked:
            found = [(shown.back(begin), shown.back(end)) for begin, end in places[0]]
        else:
            found = _answers(messages, answers, shown.text, self.control, lambda *given: render(*given)[0])
        if len(found) == len(answers):  # OpenAI's way to say which answers are not to be learnt
            found = [place for place, i in zip(found, answers) if messages[i].get("weight") != 0]
        return shown, [(begin, end) for begin, end in found if end > begin]

    def _guarded(self, value: Any) -> Any:
        """The same with marks around the control tokens in its strings; none in roles, which templates compare."""
        if isinstance(value, str):
            return self.control.sub(lambda found: f"{OPEN}{found[0]}{CLOSE}", MARKS.sub("", value))
        if isinstance(value, list):
            return [self._guarded(one) for one in value]
        if isinstance(value, dict):
            return {key: one if key in ("role", "type") else self._guarded(one) for key, one in value.items()}
        return value

    def _tokens(self, shown: RenderedText, answers: list[Span]) -> Encoded:
        """Ids of a text behind the tokenizer's beginning, with 1 for what belongs to an answer."""
        text = shown.text
        offsets = bool(getattr(self.tokenizer, "is_fast", False))
        # Without offsets, tokens end where answers do.
        borders = shown.control if offsets else [*shown.control, *answers]
        borders = [*borders, *((begin, begin + 1) for begin, _ in shown.control if self.breaks)]
        plain = {begin + more for begin, _ in shown.control for more in (0, 1)}
        ids: list[int] = []
        spans: list[Span] = []
        for begin, end in pairwise(sorted({0, len(text), *(at for place in borders for at in place)})):
            settings = {"split_special_tokens": begin in plain}
            settings |= {"return_offsets_mapping": True} if offsets else {}
            made, skip = tokenize_inner_piece(self.tokenizer, text[begin:end], first=begin == 0, **settings)
            ids += made["input_ids"][skip:]
            shift = begin - bool(skip)  # offsets count from the newline that was put before the piece
            found = made["offset_mapping"][skip:] if offsets else [(0, end - begin)] * (len(ids) - len(spans))
            spans += [(a + shift, b + shift) for a, b in found]
        mask = np.zeros(len(ids), np.uint8)
        starts, stops = (np.array([span[side] for span in spans], np.int64) for side in (0, 1))
        for begin, end in answers:
            inner = np.flatnonzero((starts < end) & (stops > begin) & (stops > starts))
            mask[inner] = 1
            # What the template puts behind the end of an answer is not the assistant's.
            last = next((i for i in inner[::-1] if ids[i] in self.stops), None)
            if last is not None and not text[spans[last][1] : end].strip():
                mask[inner[inner > last]] = 0
        if not mask.any():
            raise ConversationError("its answers are empty" if answers else "no answer of the assistant in it")
        whole = prepend_prefix(ids, self.prefix_ids)
        mask = np.concatenate([np.zeros(len(whole) - len(ids), np.uint8), mask])
        return self._ended(np.array(whole, np.int64), mask)

    def _ended(self, ids: np.ndarray, mask: np.ndarray) -> Encoded:
        last = int(np.flatnonzero(mask)[-1])
        if self.eos in ids[last:].tolist():
            return ids, mask
        return np.append(ids, self.eos), np.append(mask, np.uint8(last == len(ids) - 1))


def _message(given: dict[str, Any]) -> dict[str, Any]:
    """A message as templates want it: content as a string, calls as objects; raises where that would lose something."""
    made = {key: value for key, value in given.items() if value is not None}
    role = str(made["role"])
    if (content := _text_of(made.pop("content", None), role)) is not None:
        made["content"] = content
    if "function_call" in made:  # as calls were written before there were several
        made["tool_calls"] = [{"type": "function", "function": made.pop("function_call")}]
    calls = _without_none(_from_json(made.pop("tool_calls", None)))
    if calls:
        if not isinstance(calls, list) or not all(isinstance(one, dict) for one in calls):
            raise ConversationError("its tool calls are no list of objects")
        made["tool_calls"] = [_call(one) for one in calls]
        made.setdefault("content", "")
    if "content" not in made:
        if not any(made.get(name) for name in ("reasoning_content", "thinking", "reasoning")):
            raise ConversationError(f"{_turn(role)} with neither content nor tool calls")
        made["content"] = ""
    return made


def _text_of(content: Any, role: str) -> str | None:
    """The text of a message's content, parts of text joined; None where there is none."""
    if content is None or isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    texts = []
    for part in parts:
        if isinstance(part, dict):
            if part.get("type") not in TEXT_PARTS or not isinstance(part.get("text"), str):
                raise ConversationError(f"{_turn(role)} with a part that is no text ({part.get('type', 'unknown')})")
            part = part["text"]
        if not isinstance(part, str):
            raise ConversationError(f"{_turn(role)} whose content is of type {type(part).__name__}")
        texts.append(part)
    return "".join(texts) if texts else None


def _turn(role: str) -> str:
    return f"{'an' if role[:1] in 'aeio' else 'a'} {role} turn"


def _call(given: dict[str, Any]) -> dict[str, Any]:
    """A tool call with its arguments as an object."""
    inner = given.get("function", given)
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
        raise ConversationError("a tool call without a name")
    inner = {**inner, "arguments": _from_json(inner.get("arguments", {}))}
    return {**given, "function": inner} if "function" in given else inner


def _without_none(value: Any) -> Any:
    """The same without keys that have no value: Arrow gives every record the keys of all others."""
    if isinstance(value, dict):
        return {key: _without_none(one) for key, one in value.items() if one is not None}
    return [_without_none(one) for one in value] if isinstance(value, list) else value


def _from_json(value: Any) -> Any:
    """The value, or what its JSON says where it is a string of that."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def _with_calls(
    messages: list[dict[str, Any]], render: Callable[..., tuple[str, list[list[Span]]]]
) -> tuple[list[dict[str, Any]], str, list[list[Span]]]:
    """The messages rendered, their calls' arguments as objects, or as JSON where the template wants them so."""
    inner = [_inner(one) for message in messages for one in message.get("tool_calls", ())]
    if not inner:
        return messages, *render(messages)
    why = ConversationError("the template writes the arguments of tool calls as Python does")
    for form in (_as_is, _as_json):
        shaped = [_mapped(one, form) for one in messages]
        try:
            text, places = render(shaped)
        except ConversationError as error:
            why = error
            continue
        if any(one["name"] not in text for one in inner):
            why = ConversationError("the template does not show tool calls")
        elif not any(_is_repr(one["arguments"], text) for one in inner):
            return shaped, text, places
    raise why


def _as_is(call: dict[str, Any]) -> dict[str, Any]:
    return call


def _as_json(call: dict[str, Any]) -> dict[str, Any]:
    given = call["arguments"]
    return {**call, "arguments": given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)}


def _inner(call: dict[str, Any]) -> dict[str, Any]:
    return call.get("function", call)


def _mapped(message: dict[str, Any], change: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    """A message with its tool calls changed."""
    if "tool_calls" not in message:
        return message
    calls = [
        {**one, "function": change(one["function"])} if "function" in one else change(one)
        for one in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}


def _is_repr(value: Any, text: str) -> bool:
    """Whether Python's writing of an object, which is not its JSON, stands in a text."""
    return isinstance(value, (dict, list)) and bool(value) and repr(value) in text and repr(value) != json.dumps(value)


def _shows(text: str, message: dict[str, Any]) -> bool:
    """Whether what is said to the assistant is in a text, as it is or in a string of JSON."""
    said = message["content"].strip()
    return message["role"] == "assistant" or said in text or json.dumps(said, ensure_ascii=False)[1:-1] in text


def _answers(
    messages: list[dict[str, Any]], numbers: list[int], text: str, control: re.Pattern[str], render: Callable[..., str]
) -> list[Span]:
    """The answers, messages `numbers`, in the text of a template that does not mark them.

    An answer goes from the end of the template's own invitation to answer to the end of what the template closes an
    answer with.
    """
    before = messages[: numbers[-1]] or messages
    asked, silent = render(before, True), render(before)
    asked = MARKS.sub("", asked[_common(asked, silent) :])
    closing = RenderedText.of(render([*messages[: numbers[-1]], {"role": "assistant", "content": f"-{UPTO}"}]))
    closed = closing.text[closing.ends[-1] :] if closing.ends else ""
    for first in (FROM, ""):  # a mark at the front may keep a template from finding thoughts
        shown = RenderedText.of(
            render([_with_marks(one, first) if i in numbers else one for i, one in enumerate(messages)])
        )
        if shown.text == text and len(shown.ends) == len(numbers):
            break
    else:
        raise ConversationError("the template does not show the answers as they are")
    places: list[Span] = []
    after = 0
    for number, end in zip(numbers, shown.ends):
        message = messages[number]
        begin = next((one for one in shown.begins if after <= one <= end), None)
        at = text.rfind(asked, after, end if begin is None else begin) if asked else -1
        content = message["content"]
        lead, rest = content[: len(content) - len(content.lstrip())], content[len(content.rstrip()) :]
        core = closed.strip()
        if at >= 0:
            begin = at + len(asked)
        elif begin is None or not content.strip():  # in a call there is something before the name
            begin = _after_header(text, asked, after, end if begin is None else begin, control, begin)
        elif text.endswith(lead, 0, begin):
            begin -= len(lead)
        if "tool_calls" in message:
            if core and text.find(core, end) < 0:
                raise ConversationError("where a tool call ends cannot be found in the text of the template")
            end = text.find(core, end)
            closes = closed[closed.find(core) :]
        else:
            end += len(rest) if text.startswith(rest, end) else 0
            closes = closed
        end += _common(closes, text[end:])
        places.append((begin, end))
        after = end
    return places


def _with_marks(answer: dict[str, Any], first: str) -> dict[str, Any]:
    """An answer with a mark behind its last word, or the name of its last call, and `first` before its first."""
    content, calls = answer["content"], answer.get("tool_calls", ())
    core = content.strip()
    begin = content[: len(content) - len(content.lstrip())] if core else content
    end = content[len(content.rstrip()) :] if core else ""
    made = {**answer, "content": begin + (first if core or not calls else "") + core + ("" if calls else UPTO) + end}
    names = [_inner(one)["name"] for one in calls]
    if calls:
        names = [first + names[0] if not core else names[0], *names[1:]]
        names[-1] += UPTO
    following = iter(names)
    return _mapped(made, lambda call: {**call, "name": next(following)})


def _common(one: str, other: str) -> int:
    """How many characters two strings begin with in common."""
    return next((at for at, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))


def _after_header(text: str, asked: str, after: int, end: int, control: re.Pattern[str], otherwise: int | None) -> int:
    """Where an answer begins whose header is only the beginning of the template's invitation to answer."""
    cuts = {found.end() for pattern in (re.compile("\n"), control) for found in pattern.finditer(asked)}
    for cut in sorted(cuts, reverse=True):
        if (at := text.rfind(asked[:cut], after, end)) >= 0:
            return at + cut
    if otherwise is not None:
        return otherwise
    raise ConversationError("where an answer begins cannot be found in the text of the template")
