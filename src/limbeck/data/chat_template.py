"""Conversations as text: messages in the form that chat templates take, and where the assistant's answers are in it.

    template = ChatTemplate(tokenizer)
    rendered, answers = template.render({"messages": [{"role": "user", "content": "Hi"}, ...]})
    rendered.text[slice(*answers[0])]                     # "Hello!<|im_end|>"

A conversation is rendered once, as a whole, and its answers are located in that text: by `{% generation %}` where the
template has it, else by rendering it again with a mark in each answer. So a template may show earlier answers
otherwise than the last one (thoughts, empty think blocks), and what it shows is trained on. What cannot be rendered
faithfully is a `ConversationError`.
"""

import json
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from limbeck.data.records import MESSAGES_FIELD
from limbeck.data.special_tokens import compile_control_pattern

GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Noncharacters of Unicode: around a control token of a message, before and behind an answer.
OPEN, CLOSE, FROM, UPTO = "\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3"
MARKS = re.compile(f"[{OPEN}{CLOSE}{FROM}{UPTO}]")
# The clock of a template stands still, so that the same text gives the same tokens on every day.
FIXED_TIME = {
    "%Y": "2025", "%y": "25", "%m": "01", "%-m": "1", "%d": "01", "%-d": "1", "%e": " 1", "%j": "001",
    "%B": "January", "%b": "Jan", "%A": "Wednesday", "%a": "Wed", "%H": "12", "%I": "12", "%M": "00", "%S": "00",
    "%p": "PM", "%Z": "", "%z": "", "%F": "2025-01-01", "%D": "01/01/25", "%T": "12:00:00", "%R": "12:00",
    "%x": "01/01/25", "%X": "12:00:00", "%c": "Wed Jan  1 12:00:00 2025",
}  # fmt: skip
_REPLACEMENTS = "".join(f" | replace('{directive}', '{value}')" for directive, value in FIXED_TIME.items())
# In front of a template; the newline belongs to the block and is not rendered.
FIXED_CLOCK = f"{{%- macro strftime_now(format) -%}}{{{{- format{_REPLACEMENTS} -}}}}{{%- endmacro %}}\n"
TEXT_PARTS = (None, "text", "input_text", "output_text")
NO_ANSWER = "no assistant turn"

Message = dict[str, Any]
Span = tuple[int, int]  # of characters in a text: begin, end
Renderer = Callable[..., tuple[str, list[list[Span]]]]  # messages -> the text, and its `{% generation %}` blocks


class ConversationError(Exception):
    """Why a conversation is dropped."""


@dataclass(frozen=True)
class RenderedText:
    """A rendered text without its marks, and where they stood.

    control: the control tokens that came with a message.
    begins, ends: of answers.
    mark_positions: of the marks in the text as rendered.
    """

    text: str
    control: list[Span]
    begins: list[int]
    ends: list[int]
    mark_positions: list[int]

    @classmethod
    def from_marked(cls, rendered: str) -> "RenderedText":
        """Take the marks out of a rendered text."""
        positions = [match.start() for match in MARKS.finditer(rendered)]
        result = cls(MARKS.sub("", rendered), [], [], [], positions)
        opened = None
        for marks_before, position in enumerate(positions):
            mark, at = rendered[position], position - marks_before
            if mark == CLOSE and opened is not None:
                result.control.append((opened, at))
            opened = at if mark == OPEN else None
            if mark in (FROM, UPTO):
                (result.begins if mark == FROM else result.ends).append(at)
        return result

    def without_marks(self, position: int) -> int:
        """Convert a position in the text as rendered to one in the text without marks."""
        return position - bisect_left(self.mark_positions, position)


class ChatTemplate:
    """The chat template of a tokenizer.

    `unseen` counts, over all conversations, what a template does not show: tools, or turns of a role.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.control_pattern = compile_control_pattern(tokenizer)
        self.unseen: Counter[str] = Counter()

    @property
    def source(self) -> Any:
        """What a cache key must know: the template's text, or several by name, and our clock where they use one."""
        template = self.tokenizer.chat_template
        return [FIXED_CLOCK, template] if "strftime_now" in json.dumps(template) else template

    def render(self, record: Any) -> tuple[RenderedText, list[Span]]:
        """Render a whole conversation.

        Args:
            record: a list of messages, or an object of `messages` and the `TEMPLATE_FIELDS` that it has.

        Returns:
            The text, and the spans of its answers that are to be trained on.

        Raises:
            ConversationError: it cannot be rendered faithfully, or has no answer.
        """
        record = record if isinstance(record, dict) else {MESSAGES_FIELD: record}
        messages = [_normalize_message(message) for message in record[MESSAGES_FIELD]]
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not answers:
            raise ConversationError(NO_ANSWER)
        tools = _drop_none(_parse_json(record.get("tools"))) or None
        if isinstance(tools, list):
            tools = [_parse_json(tool) for tool in tools]
        if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
            raise ConversationError("its tools are not a list of objects")
        try:
            template = self.tokenizer.get_chat_template(None, tools)
        except ValueError as error:  # several templates, and none for this
            raise ConversationError(" ".join(str(error).split())[:200]) from error
        has_blocks = bool(GENERATION_BLOCK.search(template))
        settings = {
            "tools": self._mark_control_tokens(tools),
            "chat_template": FIXED_CLOCK + template if "strftime_now" in template else template,
            "return_assistant_tokens_mask": has_blocks,
            **self.tokenizer.special_tokens_map,
            **(_parse_json(record.get("chat_template_kwargs")) or {}),
        }

        def render(messages: list[Message], add_prompt: bool = False) -> tuple[str, list[list[Span]]]:
            try:
                texts: Any = render_jinja_template([messages], add_generation_prompt=add_prompt, **settings)
            except Exception as error:  # templates raise what they like: roles that do not alternate, unknown fields
                raise ConversationError(" ".join(str(error).split())[:200]) from error
            return texts[0][0], texts[1]

        messages, text, blocks = _render_tool_calls(self._mark_control_tokens(messages), render)
        rendered = RenderedText.from_marked(text)
        for what in {_describe_turn(message["role"]) for message in messages if not _is_shown(message, text)}:
            self.unseen[what] += 1
        names = (tool.get("function", tool).get("name") for tool in tools or [])
        if any(name and name not in rendered.text for name in names):
            self.unseen["tools"] += 1
        if has_blocks:
            spans = [(rendered.without_marks(begin), rendered.without_marks(end)) for begin, end in blocks[0]]
        else:
            spans = _locate_answers(messages, answers, rendered.text, self.control_pattern, render)
        if len(spans) == len(answers):  # OpenAI's way to say which answers are not trained on
            spans = [span for span, i in zip(spans, answers) if messages[i].get("weight") != 0]
        return rendered, [(begin, end) for begin, end in spans if end > begin]

    def _mark_control_tokens(self, value: Any) -> Any:
        """Put marks around the control tokens in strings, but not in roles, which templates compare."""
        if isinstance(value, str):
            return self.control_pattern.sub(lambda match: f"{OPEN}{match[0]}{CLOSE}", MARKS.sub("", value))
        if isinstance(value, list):
            return [self._mark_control_tokens(item) for item in value]
        if isinstance(value, dict):
            return {k: item if k in ("role", "type") else self._mark_control_tokens(item) for k, item in value.items()}
        return value


# --- messages in the form that templates take ---


def _normalize_message(raw: Message) -> Message:
    """Content as a string, calls as objects; ConversationError where that would lose something."""
    message = {key: value for key, value in raw.items() if value is not None}
    role = str(message["role"])
    if (content := _join_text_parts(message.pop("content", None), role)) is not None:
        message["content"] = content
    if "function_call" in message:  # as calls were written before there were several
        message["tool_calls"] = [{"type": "function", "function": message.pop("function_call")}]
    calls = _drop_none(_parse_json(message.pop("tool_calls", None)))
    if calls:
        if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
            raise ConversationError("its tool calls are not a list of objects")
        message["tool_calls"] = [_normalize_call(call) for call in calls]
        message.setdefault("content", "")
    if "content" not in message:
        if not any(message.get(name) for name in ("reasoning_content", "thinking", "reasoning")):
            raise ConversationError(f"{_describe_turn(role)} with neither content nor tool calls")
        message["content"] = ""
    return message


def _join_text_parts(content: Any, role: str) -> str | None:
    if content is None or isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    texts = []
    for part in parts:
        if isinstance(part, dict):
            kind = part.get("type", "unknown")
            if part.get("type") not in TEXT_PARTS or not isinstance(part.get("text"), str):
                raise ConversationError(f"{_describe_turn(role)} with a non-text part ({kind})")
            part = part["text"]
        if not isinstance(part, str):
            raise ConversationError(f"{_describe_turn(role)} whose content is of type {type(part).__name__}")
        texts.append(part)
    return "".join(texts) if texts else None


def _describe_turn(role: str) -> str:
    return f"{'an' if role[:1] in 'aeio' else 'a'} {role} turn"


def _normalize_call(call: dict[str, Any]) -> dict[str, Any]:
    function = _get_function(call)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ConversationError("a tool call without a name")
    function = {**function, "arguments": _parse_json(function.get("arguments", {}))}
    return {**call, "function": function} if "function" in call else function


def _get_function(call: dict[str, Any]) -> dict[str, Any]:
    return call.get("function", call)


def _drop_none(value: Any) -> Any:
    """Arrow gives every record the keys of all others, without a value."""
    if isinstance(value, dict):
        return {key: _drop_none(item) for key, item in value.items() if item is not None}
    return [_drop_none(item) for item in value] if isinstance(value, list) else value


def _parse_json(value: Any) -> Any:
    """Return what the JSON in a string says; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


# --- what the template shows of them ---


def _render_tool_calls(messages: list[Message], render: Renderer) -> tuple[list[Message], str, list[list[Span]]]:
    """Render the messages with their calls' arguments as objects, or as JSON where the template wants them so."""
    functions = [_get_function(call) for message in messages for call in message.get("tool_calls", ())]
    if not functions:
        return messages, *render(messages)
    error = ConversationError("the template writes the arguments of tool calls as Python does")
    for change in (lambda function: function, _arguments_to_json):
        changed = [_change_calls(message, change) for message in messages]
        try:
            text, blocks = render(changed)
        except ConversationError as raised:
            error = raised
            continue
        if any(function["name"] not in text for function in functions):
            error = ConversationError("the template does not show tool calls")
        elif not any(_contains_repr(text, function["arguments"]) for function in functions):
            return changed, text, blocks
    raise error


def _arguments_to_json(function: dict[str, Any]) -> dict[str, Any]:
    arguments = function["arguments"]
    as_json = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return {**function, "arguments": as_json}


def _change_calls(message: Message, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Message:
    if "tool_calls" not in message:
        return message
    calls = [
        {**call, "function": change(call["function"])} if "function" in call else change(call)
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}


def _contains_repr(text: str, value: Any) -> bool:
    """Return whether Python's writing of an object, where it is not its JSON, stands in a text."""
    return isinstance(value, (dict, list)) and bool(value) and repr(value) in text and repr(value) != json.dumps(value)


def _is_shown(message: Message, text: str) -> bool:
    """Return whether what is said to the assistant is in a text, as it is or in a string of JSON."""
    content = message["content"].strip()
    return message["role"] == "assistant" or content in text or json.dumps(content, ensure_ascii=False)[1:-1] in text


def _locate_answers(
    messages: list[Message], answers: list[int], text: str, control: re.Pattern[str], render: Renderer
) -> list[Span]:
    """Find the answers, messages number `answers`, in the text of a template that does not mark them.

    An answer goes from the end of the template's generation prompt to the end of what the template closes an answer
    with.
    """
    before = messages[: answers[-1]] or messages
    prompted, unprompted = render(before, True)[0], render(before)[0]
    prompt = MARKS.sub("", prompted[_common_length(prompted, unprompted) :])
    last = RenderedText.from_marked(render([*messages[: answers[-1]], {"role": "assistant", "content": f"-{UPTO}"}])[0])
    closing = last.text[last.ends[-1] :] if last.ends else ""
    for begin_mark in (FROM, ""):  # a mark at the front may keep a template from finding thoughts
        marked = [_mark_answer(one, begin_mark) if i in answers else one for i, one in enumerate(messages)]
        rendered = RenderedText.from_marked(render(marked)[0])
        if rendered.text == text and len(rendered.ends) == len(answers):
            break
    else:
        raise ConversationError("the template does not show the answers as they are")
    spans: list[Span] = []
    after = 0  # the end of the answer before
    for number, end in zip(answers, rendered.ends):
        message = messages[number]
        marked_begin = next((at for at in rendered.begins if after <= at <= end), None)
        limit = end if marked_begin is None else marked_begin
        prompt_at = text.rfind(prompt, after, limit) if prompt else -1
        content = message["content"]
        leading, trailing = content[: len(content) - len(content.lstrip())], content[len(content.rstrip()) :]
        if prompt_at >= 0:
            begin = prompt_at + len(prompt)
        elif marked_begin is None or not content.strip():  # in a call there is something before the name
            begin = _find_header_end(text, prompt, after, limit, control, marked_begin)
        else:
            begin = marked_begin - (len(leading) if text.endswith(leading, 0, marked_begin) else 0)
        closes = closing
        if "tool_calls" in message:
            core = closing.strip()
            if core and text.find(core, end) < 0:
                raise ConversationError("where a tool call ends cannot be found in the text of the template")
            end = text.find(core, end)
            closes = closing[closing.find(core) :]
        elif text.startswith(trailing, end):
            end += len(trailing)
        end += _common_length(closes, text[end:])
        spans.append((begin, end))
        after = end
    return spans


def _mark_answer(answer: Message, begin_mark: str) -> Message:
    """Put a mark behind an answer's last word, or the name of its last call, and `begin_mark` before its first."""
    content, calls = answer["content"], answer.get("tool_calls", ())
    core = content.strip()
    leading = content[: len(content) - len(content.lstrip())] if core else content
    trailing = content[len(content.rstrip()) :] if core else ""
    marked_core = (begin_mark if core or not calls else "") + core + ("" if calls else UPTO)
    marked = {**answer, "content": leading + marked_core + trailing}
    names = [_get_function(call)["name"] for call in calls]
    if calls:
        names = [begin_mark + names[0] if not core else names[0], *names[1:]]
        names[-1] += UPTO
    remaining = iter(names)
    return _change_calls(marked, lambda function: {**function, "name": next(remaining)})


def _common_length(a: str, b: str) -> int:
    """Return how many characters two strings begin with in common."""
    return next((at for at, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def _find_header_end(
    text: str, prompt: str, after: int, end: int, control: re.Pattern[str], otherwise: int | None
) -> int:
    """Find where an answer begins whose header is only the beginning of the template's generation prompt."""
    cuts = {match.end() for pattern in (re.compile("\n"), control) for match in pattern.finditer(prompt)}
    for cut in sorted(cuts, reverse=True):
        if (at := text.rfind(prompt[:cut], after, end)) >= 0:
            return at + cut
    if otherwise is not None:
        return otherwise
    raise ConversationError("where an answer begins cannot be found in the text of the template")
