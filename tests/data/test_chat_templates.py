"""Conversations as people have them: tools, parts, thoughts, several turns, a clock, control tokens in what is said."""

import json
from pathlib import Path

import pytest
from test_chat import learnt
from test_special_tokens import PARAGRAPHS, tokenizer
from tokenizers import AddedToken
from transformers.utils import chat_template_utils

from limbeck.core.errors import LimbeckError
from limbeck.core.recipe import Recipe
from limbeck.data.chat import ChatEncoder
from limbeck.data.streaming import TokenStream
from limbeck.data.token_store import build_token_store
from limbeck.models.generation import generate_continuation
from limbeck.models.loading import load_model_and_tokenizer
from limbeck.testing import make_tiny_model
from limbeck.training.pipeline import distill

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOLS = "{% if tools %}<|im_start|>system\nTools: {{ tools | tojson }}<|im_end|>\n{% endif %}"
# As Qwen3's in what matters: thoughts are taken out of all answers but those behind the last question, the last one
# has a think block even where nothing was thought, calls of tools are tagged JSON.
THINKING = (
    TOOLS
    + """
{%- set ns = namespace(last=messages|length - 1, found=false) %}
{%- for m in messages[::-1] %}
  {%- if not ns.found and m.role == 'user' %}
    {%- set ns.last = messages|length - loop.index %}{% set ns.found = true %}
  {%- endif %}
{%- endfor %}
{%- for m in messages %}
  {%- set content = m.content if m.content is string else '' %}
  {%- if m.role == 'assistant' %}
    {%- set thought = '' %}
    {%- if m.reasoning_content is string %}
      {%- set thought = m.reasoning_content %}
    {%- elif '</think>' in content %}
      {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
      {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if loop.index0 > ns.last and (loop.last or thought) %}
      {{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
    {%- else %}
      {{- content }}
    {%- endif %}
    {%- for call in m.tool_calls or [] %}
      {%- if (loop.first and content) or not loop.first %}{{- '\\n' }}{%- endif %}
      {%- set call = call.function or call %}
      {{- '<tool_call>\\n{"name": "' + call.name + '", "arguments": ' }}
      {{- call.arguments if call.arguments is string else call.arguments | tojson }}
      {{- '}\\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
  {%- elif m.role == 'tool' %}
    {{- '<|im_start|>user\\n<tool_response>\\n' + content + '\\n</tool_response><|im_end|>\\n' }}
  {%- else %}
    {{- '<|im_start|>' + m.role + '\\n' + content + '<|im_end|>\\n' }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
  {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""
)
# As DeepSeek-R1's: the invitation to answer opens a think block that history does not have; BOS by the template.
OPENS = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'user' %}<|im_start|>{{ m.content }}{% elif m.tool_calls %}<|im_end|>"
    "{% for c in m.tool_calls %}<pad>{{ c.function.name + c.function.arguments }}{% endfor %}</s>"
    "{% else %}<|im_end|>{{ m.content.split('</think>')[-1] }}</s>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_end|><think>\n{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{{ m.role }}: {{ m.content | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


def chat_tokenizer(template: str, eos: str = "<|im_end|>", post: str | None = None, *, unigram: bool = False):
    made = tokenizer(post, unigram=unigram)
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tags = ("<think>", "</think>", "<tool_call>", "</tool_call>")
    made.add_tokens([AddedToken(tag, special=False) for tag in tags])
    made.eos_token, made.chat_template = eos, template
    return made


def say(*turns: str) -> list[dict]:
    return [{"role": "user" if i % 2 == 0 else "assistant", "content": turn} for i, turn in enumerate(turns)]


def encoded(tok, record):
    encoder = ChatEncoder(tok, tok.eos_token_id)
    ids, mask = encoder.encode([json.dumps(record).encode()])[0]
    assert len(ids), encoder.dropped
    return ids, mask


def dropped(tok, record) -> str:
    encoder = ChatEncoder(tok, tok.eos_token_id)
    assert not len(encoder.encode([json.dumps(record).encode()])[0][0])
    (why,) = encoder.dropped
    return why


@pytest.mark.parametrize("turns", [2, 4, 8])
def test_all_turns_of_a_thinking_template_are_learnt(turns):
    tok = chat_tokenizer(THINKING)
    chat = say(*[f"turn {i}" for i in range(turns)])
    ids, mask = encoded(tok, chat)
    assert tok.decode(ids) == tok.apply_chat_template(chat, tokenize=False)
    expected = [f"turn {i}<|im_end|>" for i in range(1, turns - 1, 2)]
    assert learnt(tok, ids, mask) == [*expected, f"<think>\n\n</think>\n\nturn {turns - 1}<|im_end|>"]


def test_thoughts_in_content_and_beside_it():
    tok = chat_tokenizer(THINKING)
    chat = say("a?", "<think>\nearly\n</think>\n\none", "b?", "<think>\nlate\n</think>\n\ntwo")
    ids, mask = encoded(tok, chat)
    assert learnt(tok, ids, mask) == ["one<|im_end|>", "<think>\nlate\n</think>\n\ntwo<|im_end|>"]
    beside = say("a?", "one", "b?", "two")
    beside[1]["reasoning_content"], beside[3]["reasoning_content"] = "early", "late"
    again, _ = encoded(tok, beside)
    assert again.tolist() == ids.tolist()


def test_a_template_that_opens_the_thoughts_of_an_answer_itself():
    tok = chat_tokenizer(OPENS, "</s>")
    ids, mask = encoded(tok, say("a?", "<think>\nhm</think>one", "b?", "two"))
    assert tok.decode(ids) == "<s><|im_start|>a?<|im_end|>one</s><|im_start|>b?<|im_end|>two</s>"
    assert learnt(tok, ids, mask) == ["one</s>", "two</s>"]
    ids, mask = encoded(tok, say("a?", " one\n", "b?", "\n\ntwo "))
    assert learnt(tok, ids, mask) == [" one\n</s>", "\n\ntwo </s>"]
    ids, mask = encoded(tok, [USER, {"role": "assistant", "tool_calls": [CALL, CALL]}, *say("b?", "two")])
    assert learnt(tok, ids, mask) == ['<pad>weather{"city": "Bern"}' * 2 + "</s>", "two</s>"]


def test_a_template_without_control_tokens():
    tok = chat_tokenizer(PLAIN, "</s>")
    ids, mask = encoded(tok, say("  a?", " one \n", "b?", "two  "))
    assert learnt(tok, ids, mask) == [" one\n", " two\n</s>"]


@pytest.mark.parametrize("arguments", [{"city": "Bern"}, '{"city": "Bern"}'])
@pytest.mark.parametrize("text", [None, "Let me look."])
def test_calls_of_tools_are_learnt_and_what_tools_answer_is_not(arguments, text):
    tok = chat_tokenizer(THINKING)
    call = {"type": "function", "id": "1", "function": {"name": "weather", "arguments": arguments}}
    messages = [
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": text, "tool_calls": [call, call]},
        {"role": "tool", "content": '{"rain": true}', "tool_call_id": "1"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "tool_calls": [call]},
    ]
    ids, mask = encoded(tok, {"messages": messages, "tools": [WEATHER]})
    one = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bern"}}\n</tool_call>'
    first = f"{text}\n" if text else ""
    assert learnt(tok, ids, mask) == [
        f"{first}{one}\n{one}<|im_end|>",
        "Yes.<|im_end|>",
        f"<think>\n\n</think>\n\n{one}<|im_end|>",
    ]
    assert '"name": "weather", "parameters"' in tok.decode(ids)


def test_keys_that_arrow_fills_in_are_not_learnt(tmp_path):
    """A dataset gives every call the arguments of all others, as None."""
    import datasets

    tok = chat_tokenizer(THINKING)
    calls = [{"name": "weather", "arguments": {"city": "Bern"}}, {"name": "clock", "arguments": {"zone": "CET"}}]
    rows = [{"messages": [USER, {"role": "assistant", "tool_calls": [{"function": call}]}]} for call in calls]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "x.parquet"))
    encoder = ChatEncoder(tok, tok.eos_token_id)
    made = encoder.encode(list(encoder.read(str(tmp_path / "x.parquet"))))
    texts = [tok.decode(ids) for ids, _ in made]
    assert '{"name": "weather", "arguments": {"city": "Bern"}}' in texts[0]
    assert '{"name": "clock", "arguments": {"zone": "CET"}}' in texts[1]


@pytest.mark.parametrize("template", [CHATML, THINKING])
def test_answers_of_weight_0_are_read_and_not_learnt(template):
    tok = chat_tokenizer(template)
    chat = say("a?", "one", "b?", "two", "c?", "three")
    chat[3]["weight"] = 0
    ids, mask = encoded(tok, chat)
    found = learnt(tok, ids, mask)
    assert found[0] == "one<|im_end|>"
    assert found[1].endswith("three<|im_end|>")
    assert len(found) == 2


def test_a_template_that_wants_arguments_as_text_gets_them_so():
    """A dict in it would be learnt as Python writes it, or raise."""
    calls = "{% for c in m.tool_calls or [] %}[{{ c.function.name }} HOW]{% endfor %}"
    body = "<|im_start|>{{ m.role }}\n{{ m.content }}" + calls + "<|im_end|>\n"
    for how in ("{{ c.function.arguments }}", "{{ c.function.arguments + '' }}"):
        template = "{% for m in messages %}" + body.replace("HOW", how) + "{% endfor %}"
        tok = chat_tokenizer(template + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
        call = {"function": {"name": "weather", "arguments": {"city": "Bern", "days": [1, 2]}}}
        ids, mask = encoded(tok, [*say("Rain?"), {"role": "assistant", "tool_calls": [call]}])
        assert learnt(tok, ids, mask) == ['[weather {"city": "Bern", "days": [1, 2]}]<|im_end|>']


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "saved", "streamed"])
@pytest.mark.parametrize("written", ["list", "json"])
def test_the_tools_of_a_row_reach_the_template(kind, written, tmp_path, own_cache):
    import datasets

    tok = chat_tokenizer(TOOLS + CHATML)
    tools = [WEATHER] if written == "list" else json.dumps([WEATHER])
    rows = [{"messages": say(f"question {i}", f"answer {i}"), "tools": tools} for i in range(60)]
    source = str(tmp_path / "chat.jsonl")
    Path(source).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    if kind in ("parquet", "saved"):
        for row in rows:  # Arrow has no structs without fields
            row["tools"] = (
                json.dumps([WEATHER]) if written == "json" else [{**WEATHER, "function": {"name": "weather"}}]
            )
        made = datasets.Dataset.from_list(rows)
        source = str(tmp_path / kind)
        made.save_to_disk(source) if kind == "saved" else made.to_parquet(source := f"{source}.parquet")
    settings = {"length": 16, "held_out": 0.1, "chat": None}
    split = (
        TokenStream(source, tok, **settings).load_train_split(0)
        if kind == "streamed"
        else build_token_store(source, tok, **settings).train
    )
    for begin, end in zip(split.offsets[:-1], split.offsets[1:]):
        text = tok.decode(split.tokens[begin:end])
        assert text.startswith('<|im_start|>system\nTools: [{"type": "function", "function": {"name": "weather"')


def test_tools_are_part_of_what_a_document_is(tmp_path, own_cache):
    """Rows that differ in their tools alone are different documents, not duplicates on one side of the split."""
    tok = chat_tokenizer(TOOLS + CHATML)
    encoder = ChatEncoder(tok, tok.eos_token_id)
    path = tmp_path / "chat.jsonl"
    rows = [{"messages": say("a", "b"), "tools": [{"name": f"f{i}"}]} for i in range(3)] + [{"messages": say("a", "b")}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    documents = list(encoder.read(str(path)))
    assert len(set(documents)) == 4
    assert json.loads(documents[-1]) == say("a", "b")


def test_tools_and_turns_that_a_template_does_not_show_are_told(capsys):
    quiet = "{% for m in messages if m.role in ('user', 'assistant') %}<s>{{ m.role }}\n{{ m.content }}</s>{% endfor %}"
    tok = chat_tokenizer(quiet, "</s>")
    encoder = ChatEncoder(tok, tok.eos_token_id)
    whole = {"messages": [{"role": "system", "content": "Be brief."}, *say("a", "b")], "tools": [WEATHER]}
    encoder.encode([json.dumps(one).encode() for one in (whole, whole, say("a", "b"))])
    encoder.report("x")
    said = " ".join(capsys.readouterr().err.split())
    assert "2 of 3 conversations of 'x' have tools that the chat template does not show: trained without" in said
    assert "2 of 3 conversations of 'x' have a system turn that the chat template does not show" in said


PARTS = [
    [{"type": "text", "text": "A "}, {"type": "text", "text": "still."}],
    ["A ", "still."],
    {"type": "text", "text": "A still."},
    [{"type": "output_text", "text": "A still."}],
]


@pytest.mark.parametrize("content", PARTS)
@pytest.mark.parametrize("template", [CHATML, THINKING, PLAIN])
def test_parts_of_text_are_joined(content, template):
    tok = chat_tokenizer(template)
    chat = [{"role": "user", "content": content}, {"role": "assistant", "content": content}]
    assert encoded(tok, chat)[0].tolist() == encoded(tok, say("A still.", "A still."))[0].tolist()


USER = {"role": "user", "content": "What?"}
CALL = {"function": {"name": "weather", "arguments": {"city": "Bern"}}}
PICTURE = {"type": "image_url", "image_url": {"url": "x.png"}}


@pytest.mark.parametrize(
    ("messages", "why"),
    [
        (
            [{"role": "user", "content": [{"type": "text", "text": "Look"}, PICTURE]}, say("", "b")[1]],
            "non-text part (image_url)",
        ),
        ([{"role": "user", "content": [{"type": "image"}]}, say("", "b")[1]], "a non-text part (image)"),
        ([{"role": "user"}, say("", "b")[1]], "a user turn with neither content nor tool calls"),
        ([USER, {"role": "assistant", "content": None}], "an assistant turn with neither"),
        ([USER, {"role": "assistant", "content": []}], "an assistant turn with neither"),
        ([USER, {"role": "assistant", "content": 7}], "whose content is of type int"),
        ([USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}], "does not show tool calls"),
        ([USER, {"role": "assistant", "content": "b", "function_call": CALL["function"]}], "does not show tool calls"),
        ([USER], "no assistant turn"),
    ],
)
def test_what_cannot_be_rendered_is_dropped_and_counted(messages, why, capsys):
    tok = chat_tokenizer(CHATML)
    assert why in dropped(tok, messages)
    encoder = ChatEncoder(tok, tok.eos_token_id)
    encoder.encode([json.dumps(one).encode() for one in (messages, say("a", "b"))])
    encoder.report("x")
    said = " ".join(capsys.readouterr().err.split())
    assert "1 of 2 conversations of 'x' were dropped: " in said
    assert why in said


def test_control_tokens_in_what_is_said_are_text_for_unigram_vocabularies_too():
    tok = chat_tokenizer("{% for m in messages %}{{ m.role }}:{{ m.content }}</s>{% endfor %}", "</s>", unigram=True)
    ids, mask = encoded(tok, say("a </s> b", "c <s> d"))
    assert [i for i in ids.tolist() if i in (1, 2)] == [2, 2]
    assert learnt(tok, ids, mask)[0].replace(" ", "") == "c<s>d</s>"


@pytest.mark.parametrize("template", [CHATML, THINKING, PLAIN])
@pytest.mark.parametrize("bad", ["<|im_end|>", "<s>", "</s><s>", "<|im_start|>assistant\nyes<|im_end|>"])
def test_control_tokens_in_what_is_said_are_text(template, bad):
    """Those of the template stay, and the span of the answer is the answer."""
    tok = chat_tokenizer(template)
    chat = say(f"say {bad} now", f"it is {bad}, so", "and?", "no")
    ids, mask = encoded(tok, chat)
    text = tok.apply_chat_template(chat, tokenize=False)
    assert tok.decode(ids).removesuffix("<|im_end|>") == text.removesuffix("<|im_end|>")
    control = [i for i in ids.tolist() if i in (1, 2, *tok.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]))]
    clean, _ = encoded(tok, say("say now", "it is, so", "and?", "no"))
    assert control == [i for i in clean.tolist() if i in control]
    assert f"it is {bad}, so" in learnt(tok, ids, mask)[0]
    assert "say" not in "".join(learnt(tok, ids, mask))


def test_the_harmless_marks_of_the_search_leave_no_trace():
    tok = chat_tokenizer(CHATML)
    ids, mask = encoded(tok, say("a\ufdd0b\ufdd3", "c\ufdd2d"))
    assert learnt(tok, ids, mask) == ["cd<|im_end|>"]


@pytest.mark.parametrize("template", ["{{ bos_token }}" + CHATML, CHATML])
@pytest.mark.parametrize("post", ["<s> $A", "<s> $A </s>", None])
def test_bos_of_a_conversation_comes_once(template, post, own_cache, tmp_path):
    tok = chat_tokenizer(template, post=post)
    ids, mask = encoded(tok, say("a", "b"))
    expected = 1 if post or "bos_token" in template else 0
    assert ids.tolist().count(1) == expected
    assert ids.tolist().count(2) == 0
    assert ids[0] == 1 or not expected
    assert mask[0] == 0


CLOCK = (
    "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    'It is {{ date_string }}, {{ strftime_now("%H:%M:%S") }}.\n'
)


class Later(chat_template_utils.datetime):
    """A clock that goes on by a day at every look."""

    days = 0

    @classmethod
    def now(cls, tz=None):
        Later.days += 1
        return cls(2031, 1, 1 + Later.days % 28, Later.days % 24)


@pytest.mark.parametrize(
    "clock", [CLOCK, "{{ strftime_now('%H:%M') + '\n' }}", "{% set f = '%A %-d %B' %}{{ strftime_now(f) }}\n"]
)
def test_a_clock_in_the_template_stands_still(clock, tmp_path, own_cache, monkeypatch):
    """A day later the same text has the same key and the same tokens, streamed with shards that make way too."""
    monkeypatch.setattr(chat_template_utils, "datetime", Later)
    tok = chat_tokenizer(clock + CHATML)
    assert tok.apply_chat_template(USER_ONLY, tokenize=False) != tok.apply_chat_template(USER_ONLY, tokenize=False)
    first, _ = encoded(tok, say("a", "b"))
    assert encoded(tok, say("a", "b"))[0].tolist() == first.tolist()
    (tmp_path / "chats").mkdir()
    for n in range(3):
        rows = [{"messages": say(f"{n} {i}?", f"{i} is {n}")} for i in range(40)]
        (tmp_path / "chats" / f"{n}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    stream = TokenStream(str(tmp_path / "chats"), tok, length=16, held_out=0.1, chat=None, cache_gb=1e-6)
    tokens = [stream.load_train_split(i % 3).tokens.tolist() for i in range(6)]
    assert tokens[:3] == tokens[3:]
    stream.close()


USER_ONLY = say("a")


def test_a_clock_that_stands_changes_nothing_else_of_a_template():
    for front in ("\n", "  ", "", "x\n\n"):
        with_clock = front + "{% if false %}{{ strftime_now('%Y') }}{% endif %}" + CHATML
        tok = chat_tokenizer(with_clock)
        ids, _ = encoded(tok, say("a", "b"))
        assert tok.decode(ids) == tok.apply_chat_template(say("a", "b"), tokenize=False)


def test_a_qwen_like_run_end_to_end(tmp_path, own_cache, capsys):
    """Think blocks, several turns, tools, pictures: taught, measured, exported, and used with the same template."""
    tok = chat_tokenizer(THINKING)
    folder = tmp_path / "teacher"
    make_tiny_model("llama", vocab_size=len(tok)).save_pretrained(folder)
    tok.save_pretrained(folder)
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Bern"}}}
    rows = []
    for i, text in enumerate(PARAGRAPHS * 3):
        turns = say(text[:60], text[60:90], f"and {i}?", text[90:130])
        if i % 3 == 0:
            turns = [
                *say(text[:40]),
                {"role": "assistant", "tool_calls": [call]},
                {"role": "tool", "content": f"{i}"},
                *say("", text[40:70])[1:],
            ]
        if i % 10 == 9:
            turns = [{"role": "user", "content": [PICTURE]}, *say("", text[:40])[1:]]
        rows.append({"messages": turns, **({"tools": [WEATHER]} if i % 2 else {})})
    source = tmp_path / "chat.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = {
        "teacher": str(folder),
        "student": {"mixer": "gated_deltanet"},
        "data": {"source": str(source), "seq_len": 64, "held_out": 0.3},
        "stages": [
            {"stage": "calibrate", "tokens": 512},
            {"stage": "hidden", "tokens": 512},
            {"stage": "logits", "tokens": 512, "batch_size": 4, "ce": 1.0},
        ],
        "evaluation": {
            "tokens": 1024,
            "prompt": tok.apply_chat_template(say("a"), tokenize=False, add_generation_prompt=True),
            "new_tokens": 4,
        },
        "out": str(tmp_path / "run"),
    }
    result = distill(Recipe.model_validate(recipe), measure_times=False)
    said = " ".join(capsys.readouterr().err.split())
    pictures = sum(1 for i in range(len(rows)) if i % 10 == 9)
    assert f"{pictures} of {len(rows)} conversations of" in said
    assert "a user turn with a non-text part (image_url)" in said
    assert result["held_out"]["targets"] > 0
    model, loaded = load_model_and_tokenizer(str(tmp_path / "run" / "student"))
    assert loaded.apply_chat_template(say("a"), tokenize=False) == tok.apply_chat_template(say("a"), tokenize=False)
    assert isinstance(generate_continuation(model, loaded, recipe["evaluation"]["prompt"], 4), str)


def test_all_conversations_dropped_is_an_error(tmp_path, own_cache):
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user"}, *say("", "b")[1:]]}) + "\n", encoding="utf-8")
    with pytest.raises(LimbeckError, match=r"1 of 1 conversations .* a user turn with neither content nor tool calls"):
        build_token_store(str(path), chat_tokenizer(CHATML), length=16, chat=None)
