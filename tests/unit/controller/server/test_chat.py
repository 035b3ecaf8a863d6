"""Chat templates: equal to transformers, and harmless."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from phalanx.controller.server import sandbox
from phalanx.controller.server.chat import ChatTemplate
from phalanx.protos.errors import InvalidArgument, ModelError

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}

# Written for these tests, each with the constructions that its family's templates use.
LLAMA3 = r"""
{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\n" }}
{%- endif %}
{{- "Today Date: " + date_string + "\n\n" + system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim
        + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""
QWEN = r"""
{%- if tools %}
    {{- '<|im_start|>system\n' ~ (tools | tojson) }}
{%- else %}
    {%- if messages[0].role == 'system' %}
        {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
    {%- endif %}
{%- endif %}
{%- set ns = namespace(multi_step=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step and message.role == "user" and message.content is string
        and not(message.content.startswith('<r>') and message.content.endswith('</r>')) %}
        {%- set ns.multi_step = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {%- if '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1] %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last and (loop.last or thought) %}
            {{- '<|im_start|>assistant\n<think>\n' + (thought or '').strip('\n') + '\n</think>\n\n' }}
            {{- content.lstrip('\n') }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\n' + content }}
        {%- endif %}
        {%- if message.tool_calls %}{% for call in message.tool_calls %}{{ call }}{% endfor %}{% endif %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\n<tool_response>\n' ~ content ~ '\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}{{- '<|im_end|>\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}
"""
GEMMA = r"""{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {{ raise_exception('System role not supported') }}
{%- endif -%}
{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{
 raise_exception('Conversation roles must alternate user/assistant/user/assistant/...')
}}{% endif %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{%
 set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + role + '
' + message['content'] | trim + '<end_of_turn>
' }}{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model
'}}{% endif %}
"""
MISTRAL = r"""
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace() %}
{%- set ns.index = 0 %}
{%- for message in loop_messages %}
    {%- if not (message.role == "tool" or (message.tool_calls is defined
        and message.tool_calls is not none)) %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("roles must alternate") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\n\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- elif message["role"] == "tool" %}
        {{- '[TOOL_RESULTS] {"content": ' + message.content|string + "}[/TOOL_RESULTS]" }}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported!") }}
    {%- endif %}
{%- endfor %}
"""
ODDITIES = r"""
{% macro show(message, mark='*') -%}
  {{ mark }}{{ message.role | upper }}: {{ message.content | replace('\n', '⏎') | title }}
{%- endmacro %}
  {% for message in messages %}
    {% if message.role == 'tool' %}
      {% continue %}
    {% endif %}
    {{ show(message, mark=loop.cycle('-', '+')) }}
    {% generation %}{{ message | tojson }}{{ [message.content, 1.5, none] | tojson(indent=2) }}{% endgeneration %}
    {% if loop.index == 5 %}{% break %}{% endif %}
  {% endfor %}
{% set block %}kept{{ messages | map(attribute='role') | join(', ') }}{% endset %}
{{ block | indent(2, true) }}{{ '%s has %d' % (block, messages | length) }}{{ 'ab' * 3 }}{{ 2 ** 3 }}
{{ dict(a=1, b='<&>') | tojson }}{{ undefined_name }}{{ messages[0].absent }}{{ [1] + [2] }}{{ 7 // 2 ~ 'x' ~ none }}
{% filter trim %}   filtered   {% endfilter %}{{ namespace(a=1).a }}{{ range(3) | list }}{{ 'a,b'.split(',') }}
{% call(x) show_all() %}{{ x }}{% endcall %}
"""
ODDITIES = ODDITIES.replace(
    "{% call(x) show_all() %}{{ x }}{% endcall %}", "{{ messages | length > 2 }}"
)
TEMPLATES = {
    "llama-3": LLAMA3,
    "qwen": QWEN,
    "gemma": GEMMA,
    "mistral": MISTRAL,
    "oddities": ODDITIES,
}


def talk(*roles: str) -> list[dict[str, str]]:
    contents = [" hello\n", "<think>\nhm\n</think>\n\nwell {{ 7*7 }}", "naïve 東京 <&>'\"", "", "x"]
    return [
        {"role": role, "content": contents[index % len(contents)]}
        for index, role in enumerate(roles)
    ]


TALKS = [
    talk("user"),
    talk("system", "user"),
    talk("user", "assistant", "user"),
    talk("system", "user", "assistant", "user"),
    talk("user", "assistant"),
    talk("user", "user"),
    talk("user", "assistant", "tool", "tool", "assistant", "user", "assistant"),
    talk("assistant", "user"),
]


def reference(template: str, messages: list[dict[str, str]]) -> str | None:
    """What transformers renders; None when the template refuses."""
    import jinja2
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        rendered = render_jinja_template(
            [messages], chat_template=template, add_generation_prompt=True, **SPECIAL
        )
    except jinja2.TemplateError:
        return None
    text = rendered[0][0] if isinstance(rendered, tuple) else rendered[0]
    assert isinstance(text, str)
    return text


@pytest.mark.parametrize("messages", TALKS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_equal_to_transformers(name: str, messages: list[dict[str, str]]) -> None:
    template = TEMPLATES[name]
    expected = reference(template, messages)
    if expected is None:
        with pytest.raises(InvalidArgument) as caught:
            ChatTemplate(template, SPECIAL).render(messages)
        assert caught.value.violations[0].field == "messages"
    else:
        assert ChatTemplate(template, SPECIAL).render(messages) == expected


def test_every_template_renders_some_talk_and_some_refuse() -> None:
    """The comparison above is of texts, not only of refusals."""
    rendered = {
        name: [reference(template, messages) for messages in TALKS]
        for name, template in TEMPLATES.items()
    }
    assert all(sum(text is not None for text in texts) >= 3 for texts in rendered.values())
    assert any(text is None for text in rendered["gemma"])
    assert any(text is None for text in rendered["mistral"])


def test_smollm2_equals_transformers(smollm2_gguf: Path) -> None:
    from transformers import AutoTokenizer

    from phalanx.controller.model import resolve_model

    model = resolve_model("smollm2")
    assert model.chat_template is not None
    template = ChatTemplate(model.chat_template, model.special_tokens)
    theirs = AutoTokenizer.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name)
    for messages in TALKS:
        text = template.render(messages)
        expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert text == expected
        ids = theirs.apply_chat_template(messages, add_generation_prompt=True)
        ids = ids["input_ids"] if not isinstance(ids, list) else ids
        assert model.tokenizer.encode(text, add_special_tokens=False).ids == list(ids)


def test_what_a_user_writes_is_never_run() -> None:
    template = ChatTemplate("{{ messages[0].content }}", {})
    for text in ("{{ 7*7 }}", "{% raw %}", "{# x #}", "${7*7}", "{{ self }}"):
        assert template.render([{"role": "user", "content": text}]) == text


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__ }}",
    "{{ messages[0].items().__class__ }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ joiner.__init__.__globals__ }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__globals__['os'] }}",
    "{{ self.__init__.__globals__ }}",
    "{{ self._TemplateReference__context }}",
    "{{ ''['__class__'] }}",
    "{{ ''|attr('__class__') }}",
    "{{ ''|attr('__cl' ~ 'ass__') }}",
    "{{ (messages|map(attribute='__class__')|list)[0].__mro__ }}",
    "{{ '{0.__class__}'.format(messages) }}",
    "{{ ''.format_map }}{{ '{a.__class__}'.format_map(messages[0]) }}",
    "{{ (''.format)('x') }}",
    "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "{{ namespace(__class__=1) }}",
    "{{ messages.append({}) }}",
    "{{ messages.clear() }}",
    "{{ messages[0].update({'role': 'x'}) }}",
    "{{ messages[0].pop('role') }}",
    "{{ dict.__subclasses__() }}",
    "{{ lipsum.__globals__ }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{% extends 'x' %}",
    "{{ (1).__class__ }}",
    "{{ caller.__globals__ }}",
    "{{ (range(1)|list).__class__ }}",
    "{{ joined.__globals__ }}{{ messages|map('_written')|list|first.x.y }}",
]


@pytest.mark.parametrize("source", ESCAPES)
def test_a_template_cannot_leave_the_sandbox(source: str) -> None:
    """It is refused, or finds nothing; and the conversation stays as it was."""
    messages = [{"role": "user", "content": "hi"}]
    try:
        text = ChatTemplate(source, SPECIAL).render(messages)
    except (InvalidArgument, ModelError) as error:
        assert "/" not in str(error).replace("/etc/passwd", "")
    else:
        assert not any(word in text for word in ("class", "object", "function", "root:"))
    assert messages == [{"role": "user", "content": "hi"}]


HUGE = [
    "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s OP ns.s %}{% endfor %}",
    "{% set ns = namespace(s=[1]) %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "{% set a = 'xxxxxxxxxxxxxxxx' %}" + "{% set a = a ~ a %}" * 40,
    "{% set a = 'xxxxxxxxxxxxxxxx' %}" + "{% set a %}{{ a }}{{ a }}{% endset %}" * 40,
    "{% set x %}{% for i in range(100000) %}" + "y" * 1000 + "{% endfor %}{% endset %}",
    "{% macro f() %}"
    + "y" * 1000
    + "{% endmacro %}{% for i in range(100000) %}{% set z = f() %}{% endfor %}",
    "{{ 'a' * 1000000000 }}",
    "{{ 1000000000 * [1] }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%*d' % (1000000000, 1) }}",
    "{{ '%.1000000000f' % 1 }}",
    "{{ 2 ** 100000000 }}",
    "{{ 10 ** 64 ** 64 }}",
    "{{ 'a'.ljust(1000000000) }}",
    "{{ 'a'.zfill(1000000000) }}",
    "{{ 'a'.center(1000000000) }}",
    "{{ '\\t'.expandtabs(1000000000) }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{{ 'a' | center(1000000000) }}",
    "{{ 'a' | indent(1000000000, true) }}",
    "{{ 'a' | format }}",
    "{{ [1] | batch(1000000000, 'x') | list }}",
    "{{ [1] | tojson(indent=1000000000) }}",
    "{{ ('a' * 1000000).replace('a', 'b' * 1000000) }}",
    "{{ ('a' * 1000000) | replace('a', 'b' * 1000000) }}",
    "{{ ('b' * 1000000).join(['a'] * 1000) }}",
    "{{ (['a'] * 1000) | join('b' * 1000000) }}",
    "{{ strftime_now('%1000000000d') }}",
    "{{ range(1000000000) | list }}",
    "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
]


@pytest.mark.parametrize("source", [*[HUGE[0].replace("OP", op) for op in "+~"], *HUGE[1:]])
def test_a_template_cannot_fill_the_memory(source: str) -> None:
    with pytest.raises((InvalidArgument, ModelError)):
        ChatTemplate(source, {}).render([{"role": "user", "content": "hi"}])


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}",
        "{% set l = range(90000) | list %}{% for a in l %}{% for b in l %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    ],
)
def test_a_template_cannot_run_for_ever(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MAX_RENDER_S", 0.2)
    with pytest.raises(InvalidArgument, match=r"runs for over 0\.2 s"):
        ChatTemplate(source, {}).render([{"role": "user", "content": "hi"}])


@pytest.mark.parametrize("source", ["{% if %}", "{{ x", "{{ x | nosuchfilter }}", "{% nosuch %}"])
def test_a_broken_template_is_a_model_error(source: str) -> None:
    with pytest.raises(ModelError, match="chat template"):
        ChatTemplate(source, {})


def test_errors_are_told_without_paths() -> None:
    def said(source: str) -> str:
        with pytest.raises(InvalidArgument) as caught:
            ChatTemplate(source, {}).render([{"role": "user", "content": "hi"}])
        (violation,) = caught.value.violations
        assert violation.field == "messages"
        return violation.description

    assert said("{{ raise_exception('please: ' ~ messages[0].role) }}") == "please: user"
    assert "ZeroDivisionError" in said("{{ 1 / 0 }}")
    assert "'nothing' is undefined" in said("{{ nothing.at.all }}")
    assert len(said("{{ raise_exception('x' * 5000) }}")) == 200


def test_renders_do_not_disturb_each_other() -> None:
    """One template, many threads; what one render has used up is not charged to the next."""
    from concurrent.futures import ThreadPoolExecutor

    template = ChatTemplate(
        "{% set ns = namespace(n=0) %}{% for i in range(200) %}{% set ns.n = ns.n + i %}{% endfor %}"
        "{{ messages[0].content * 1000 }}{{ ns.n }}",
        {},
    )

    def render(index: int) -> Any:
        return template.render([{"role": "user", "content": f"{index:09d}|" * 20}])

    with ThreadPoolExecutor(4) as pool:
        for index, text in enumerate(pool.map(render, range(64))):
            assert text == f"{index:09d}|" * 20_000 + "19900"
