"""The chat template: found in the folder, rendered as jinja2 renders it, and never dangerous."""

import json
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from qwen35_mlx import budget
from qwen35_mlx.errors import InputError, ModelError
from qwen35_mlx.template import Template

SHIPPED = Path(__file__).parents[1] / "examples" / "train_demo" / "chat_template.jinja"
USER = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "weather", "description": "Wëtter <b>&'"}}
CALL = {
    "type": "function",
    "id": "1",
    "function": {
        "name": "weather",
        "arguments": {"city": "Köln", "n": 3, "l": [1, {"a": None}], "t": True, "f": 1.5},
    },
}
ASKED: list[dict[str, Any]] = [
    {"role": "system", "content": " be nice "},
    {"role": "user", "content": [{"type": "text", "text": "look "}, {"type": "image"}]},
    {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]},
    {"role": "tool", "content": "20 °C"},
    {"role": "tool", "content": [{"type": "text", "text": "x"}]},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nyes"},
    {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "\n  and? "}]},
]

# every construct that chat templates use, rendered here and by jinja2 itself
ORDINARY = [
    "{{ messages[0].role }}{{ messages[-1]['content'] }}{{ messages[1:]|length }}{{ 'abc'[::-1] }}",
    "{% for m in messages if m.role != 'system' %}{{ loop.index }}{{ loop.last }}{% endfor %}",
    "{% for m in messages[::-1] %}{{ loop.index0 }}{{ (messages|length - 1) - loop.index0 }}"
    "{% if loop.first %}{% continue %}{% endif %}{% if loop.index > 2 %}{% break %}{% endif %}"
    "{{ m.role }}{% else %}none{% endfor %}",
    "{% macro f(x, y=2) %}{{ x }}{{ y }}{% endmacro %}{{ f(1) }}{{ f('a', y=3) }}",
    "{% macro f() %}[{{ caller() }}]{% endmacro %}{% call f() %}in{% endcall %}",
    "{% set ns = namespace(a=1, b=none) %}{% for i in range(3) %}{% set ns.a = ns.a + i %}"
    "{% endfor %}{{ ns.a }}{{ ns.b is none }}",
    "{% set x %}block{{ 1 }}{% endset %}{{ x }}{% filter upper %}a{{ x }}{% endfilter %}",
    "{% with a = 1, b = 'c' %}{{ a ~ b ~ none ~ [1, 'x'] }}{% endwith %}",
    "{{ tools | tojson }}{{ tools[0] | tojson(indent=2) }}{{ {'a': 1, 'b': (1, 2)} | tojson }}",
    "{{ ' x\n' | trim }}{{ ' x '.strip() }}{{ 'a,b'.split(',') }}{{ 'a b '.split() }}",
    "{{ 'abc'.startswith('ab') and 'abc'.endswith(('b', 'c')) }}{{ 'x'.join(['1', '2']) }}",
    "{{ 'a-b'.replace('-', '+') }}{{ 'a-b-c'|replace('-', '', 1) }}{{ [1, 2]|join('; ') }}",
    "{{ messages|map(attribute='role')|join(',') }}{{ messages|selectattr('role', 'equalto', "
    "'user')|list|length }}{{ messages|rejectattr('tool_calls', 'defined')|list|length }}",
    "{{ [3, 1, 2]|sort }}{{ [1, 1]|unique|list }}{{ {'b': 1, 'a': 2}|dictsort }}{{ [2, 5]|max }}",
    "{% for k, v in {'a': 1, 'b': [2]}.items() %}{{ k }}={{ v }};{% endfor %}"
    "{% for k, v in {'c': 3}|items %}{{ k }}{{ v }}{% endfor %}{{ {'a': 1}.get('z', 4) }}",
    "{{ missing }}{{ missing|default('d') }}{{ missing is defined }}{{ tools is iterable }}",
    "{{ 1 + 2 * 3 - 4 / 2 }}{{ 7 // 2 }}{{ 7 % 3 }}{{ 2 ** 10 }}{{ -1 }}{{ 'ab' * 2 }}{{ 1.5 }}",
    "{{ '%s is %d' % ('a', 3) }}{{ '%5.1f' | format(2.25) }}{{ 'x' ~ 1 if tools else 'y' }}",
    "{{ 'a' in 'abc' }}{{ 'role' in messages[0] }}{{ 1 < 2 <= 2 }}{{ 'b' not in ['a'] }}",
    "{{ 'line\nother'|indent(2) }}{{ 'x'|upper }}{{ 'ab cd'|title }}{{ '7'|int + 1 }}",
    "{{ messages is sequence and messages is not mapping and messages is not string }}",
    "{%- for m in messages %}\n    {%- if m.content is string %}\n{{ m.role }}\n    {% endif %}\n"
    "{%- endfor %}\nend\n",
    "{% generation %}{{ messages[0].content }}{% endgeneration %}",
]


def plain_jinja(source: str) -> Callable[..., str]:
    """What transformers renders with: jinja2's sandbox, unmetered."""

    def tojson(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    for tag in ("{% generation %}", "{% endgeneration %}"):
        source = source.replace(tag, "")
    return environment.from_string(source).render


@pytest.mark.parametrize("source", ORDINARY)
def test_an_ordinary_template_renders_as_jinja2_does(source: str) -> None:
    expected = plain_jinja(source)(messages=ASKED, tools=[TOOL], add_generation_prompt=True)
    assert Template(source).render(ASKED, [TOOL]) == expected
    assert expected


@pytest.mark.parametrize("count", range(2, len(ASKED) + 1))
@pytest.mark.parametrize("thinking", [None, True, False])
def test_the_shipped_template_renders_as_jinja2_does(count: int, thinking: bool | None) -> None:
    source = SHIPPED.read_text()
    for tools in (None, [TOOL]):
        values = {} if thinking is None else {"enable_thinking": thinking}
        expected = plain_jinja(source)(
            messages=ASKED[:count], tools=tools, add_generation_prompt=True, **values
        )
        assert Template(source).render(ASKED[:count], tools, thinking) == expected


def test_json_is_not_escaped_for_html_and_keeps_its_order() -> None:
    text = Template("{{ tools[0]|tojson }}").render(USER, [{"z": "<é>&'", "a": [1, True, None]}])
    assert text == '{"z": "<é>&\'", "a": [1, true, null]}'


def test_thinking_none_leaves_the_choice_to_the_template() -> None:
    template = Template("{{ enable_thinking is defined }}{{ enable_thinking }}")
    assert template.render(USER) == "False"
    assert template.render(USER, thinking=True) == "TrueTrue"
    assert template.render(USER, thinking=False) == "TrueFalse"


def test_the_template_sees_plain_data_only() -> None:
    class Picture:
        secret = "no"

    message: dict[Any, Any] = {
        "role": "user",
        "content": [{"type": "image", "image": Picture()}],
        3: (1, 2),
    }
    text = Template("{{ messages[0].content[0].image }}{{ messages[0]['3'] }}").render([message])
    assert text == "<Picture>[1, 2]"


LOOPS = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) if false %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% continue %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) recursive %}{% if loop.depth0 == 0 %}{{ loop(range(99999)) }}"
    "{% endif %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% for a in range(99999) %}{{ range(99999)|list|length }}{% endfor %}",
    "{% for a in range(99999) %}{% if 5.5 in range(99999) %}{% endif %}{% endfor %}",
    "{% for a in range(99999) %}{{ range(99999)|select('odd')|first }}{% endfor %}",
    "{% for a in range(99999) %}{% set x = (range(9999)|list)[::-1] %}{% endfor %}",
    "{% for a in range(99999) %}" + "{% if a %}{% endif %}" * 500 + "{% endfor %}",
    "{{ [-10**9]|map('@tick')|list }}{{ [-10**9]|map('@message', -10**9)|list }}"
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{{ (['a'] * 9999)|map(attribute='" + "0." * 9999 + "0')|list }}",
]


def grow(start: str, step: str, then: str = "") -> str:
    """A template that does `step` to `ns.s` sixty times."""
    loop = "{% for i in range(60) %}{% set ns.s = " + step + " %}{% endfor %}"
    return "{% set ns = namespace(s=" + start + ") %}" + loop + then


LARGE = [
    "{{ 'a' * 10**10 }}",
    "{{ [0] * 10**10 }}",
    "{{ 10**10 * 'a' }}",
    "{{ 9**99999 }}",
    "{% set ns = namespace(n=9) %}{% for i in range(60) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
    grow("'ab'", "ns.s ~ ns.s"),
    grow("'ab'", "ns.s + ns.s"),
    grow("['ab']", "ns.s + ns.s"),
    grow("'ab'", "'%s%s' % (ns.s, ns.s)"),
    grow("'ab'", "ns.s|replace('a', ns.s)"),
    grow("'ab'", "ns.s.replace('a', ns.s)"),
    grow("'ab'", "ns.s.join([ns.s, ns.s])"),
    grow("'ab'", "[ns.s, ns.s]|join(ns.s)"),
    "{% set ns = namespace(s='ab') %}{% for i in range(60) %}{% set x %}{{ ns.s }}{{ ns.s }}"
    "{% endset %}{% set ns.s = x %}{% endfor %}",
    # 2**60 items in 60 lists: nothing may walk them
    *[
        grow("['ab']", "[ns.s, ns.s]", use)
        for use in (
            "{{ ns.s }}",
            "{{ ns.s|tojson }}",
            "{{ ns.s|string|length }}",
            "{{ ns.s == 1 }}",
            "{{ 'a' ~ 1 ~ ns.s }}",
            "{{ [ns.s]|sort }}",
            "{{ ns.s|join }}",
        )
    ],
    *[
        grow("('ab',)", "(ns.s, ns.s)", use)
        for use in (
            "{{ {ns.s: 1} }}",
            "{{ {}.get(ns.s) }}",
            "{{ [ns.s]|unique }}",
            "{{ '%s' % ns.s }}",
            "{{ dict([(ns.s, 1)]) }}",
        )
    ],
    "{{ '%999999999d' % 1 }}",
    "{{ '%*d' % (999999999, 1) }}",
    "{{ '%(a)999999999d' | format(a=1) }}",
    "{{ 'a'|indent(999999999) }}",
    "{{ [1]|tojson(indent=999999999) }}",
    "{{ [1, 2]|tojson(separators=('x' * 9999, ':')) }}",
    "{% for a in range(99999) %}" + "x" * 100_000 + "{% endfor %}",
    "{{ strftime_now('%999999999d') }}",
]


@pytest.mark.parametrize("source", LOOPS)
def test_a_template_without_end_is_an_input_error(
    source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a tenth of the steps prove the same and take a tenth of the time
    monkeypatch.setattr(budget, "STEPS", budget.STEPS // 10)
    with pytest.raises(
        InputError, match=r"^chat template: failed at messages: .* may never end\.$"
    ):
        Template(source).render(USER)


@pytest.mark.parametrize("source", LARGE)
def test_a_template_without_bounds_is_an_input_error_and_takes_no_memory(
    source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "STEPS", budget.STEPS // 10)
    template = Template(source)
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=r"^chat template: failed at messages: ") as error:
            template.render(USER)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert "\n" not in str(error.value)
    assert peak < 20e6  # bytes: STEPS / 10 x 16 characters is 3.2e6, and a few are held at once


@pytest.mark.parametrize("source", LOOPS[:1] + LARGE[:1])
def test_it_ends_on_any_thread_and_leaves_none(source: str) -> None:
    found: list[BaseException | str] = []

    def render() -> None:
        try:
            found.append(Template(source).render(USER))
        except InputError as error:
            found.append(error)

    before = threading.active_count()
    threads = [threading.Thread(target=render) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert threading.active_count() == before
    assert [type(f) for f in found] == [InputError] * 2
    assert str(found[0]) == str(found[1])


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ ''.__class__ }}",
        "{{ ''['__class__'] }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ raise_exception.__globals__ }}",
        "{{ self._TemplateReference__context }}",
        "{{ [1]|map(attribute='__class__')|list }}",
        "{{ ['']|sort(attribute='__class__') }}",
        "{% for a in [1] %}{{ loop._iterator }}{% endfor %}",
        "{% macro m() %}{% endmacro %}{{ m._func }}",
        "{{ '{0.__class__}'.format(1) }}",
        "{{ ''.format_map({}) }}",
        "{{ ''.encode() }}",
        "{{ 5 .to_bytes(9) }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ namespace(__class__=1) }}",
    ],
)
def test_reaching_for_attributes_is_an_input_error(source: str) -> None:
    with pytest.raises(InputError) as error:
        Template(source).render(USER)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "source",
    [
        "{% include 'x' %}",
        "{% import 'x' as y %}",
        "{% from 'x' import y %}",
        "{% extends 'x' %}",
        "{% block b %}{% endblock %}",
        "{% autoescape true %}{% endautoescape %}",
        "{{ 1|center(9) }}",
        "{{ 1|attr('x') }}",
        "{{ 1 is nothing }}",
        "{% for %}",
        "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
        "{% if 1 %}" * 2000 + "{% endif %}" * 2000,
        "{% unknown %}",
    ],
)
def test_what_is_no_chat_template_is_a_model_error(source: str) -> None:
    with pytest.raises(ModelError, match=r"^f\.jinja: .*expected") as error:
        Template(source, "f.jinja")
    assert "\n" not in str(error.value)


def test_too_long_a_template_is_a_model_error() -> None:
    with pytest.raises(ModelError, match=r"262,145 characters; at most 262,144"):
        Template("x" * 262_145)
    assert Template("x" * 262_144).render(USER) == "x" * 262_144


def test_what_the_template_refuses_names_the_message() -> None:
    template = Template(
        "{% for m in messages %}{% if m.content == 'bad' %}{{ raise_exception('No\n way.') }}"
        "{% endif %}{% endfor %}{{ raise_exception('Later') }}"
    )
    bad = [*USER, {"role": "tool", "content": "bad"}]
    with pytest.raises(InputError, match=r"^messages\[1\] \(tool\): .* refuses this: No way\.$"):
        template.render(bad)
    with pytest.raises(InputError, match=r"^messages: the chat template refuses this: Later\.$"):
        template.render(USER)


def test_an_unknown_role_is_what_the_template_says() -> None:
    template = Template(SHIPPED.read_text())
    with pytest.raises(InputError, match=r"^messages\[1\] \(robot\): .*role: robot\.$"):
        template.render([*USER, {"role": "robot", "content": "x"}])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ messages[0].x.y }}", r"misses a value: 'dict object' has no attribute 'x'\.$"),
        ("{{ 1 / 0 }}", r"failed at messages: ZeroDivisionError: division by zero\.$"),
        ("{{ 'a' + 1 }}", r"failed at messages: TypeError: .*\.$"),
        ("{{ missing() }}", r"misses a value: 'missing' is undefined\.$"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", r"nests too deep"),
    ],
)
def test_a_template_that_fails_is_an_input_error(source: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Template(source).render(USER)


def test_long_conversations_fit_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "STEPS", 0)  # so the input's own allowance must suffice
    roles = ("user", "assistant")
    many = [{"role": roles[i % 2], "content": "lorem ipsum " * 20} for i in range(601)]
    assert len(Template(SHIPPED.read_text()).render(many)) > 600 * 240
    one = [{"role": "user", "content": "word \n" * 200_000}]
    assert len(Template(SHIPPED.read_text()).render(one)) > 1_000_000


def test_a_budget_is_each_renderings_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "STEPS", 2000)
    template = Template("{% for a in range(900) %}{% set b = a %}{% endfor %}")
    for _ in range(5):
        assert template.render(USER) == ""


def test_the_jinja_file_comes_first_then_the_tokenizers_then_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "old"}))
    assert Template.read(tmp_path).render(USER) == "old"
    config = {"chat_template": "config {{ eos_token }}", "eos_token": {"content": "<end>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert Template.read(tmp_path).render(USER) == "config <end>"
    (tmp_path / "chat_template.jinja").write_text("file {{ eos_token }}", encoding="utf-8")
    assert Template.read(tmp_path).render(USER) == "file <end>"


def test_of_several_named_templates_the_default_is_taken(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({"chat_template": named}))
    assert Template.read(tmp_path).render(USER) == "d"
    path.write_text(json.dumps({"chat_template": named[:1]}))
    with pytest.raises(ModelError, match=r"holds \['tool_use'\]; one named 'default' was expected"):
        Template.read(tmp_path)
    path.write_text(json.dumps({"chat_template": [{"name": []}, {"name": {}}, {}, 5]}))
    with pytest.raises(ModelError, match="one named 'default' was expected"):
        Template.read(tmp_path)
    path.write_text(json.dumps({"chat_template": 3}))
    with pytest.raises(ModelError, match="chat_template is a int"):
        Template.read(tmp_path)


def test_a_folder_without_a_template_says_so(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"no chat_template\.jinja, and no chat_template in") as e:
        Template.read(tmp_path)
    assert "\n" not in str(e.value)


def test_files_that_cannot_be_read_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "chat_template.jinja"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ModelError, match=r"chat_template\.jinja: .*a readable text was expected"):
        Template.read(tmp_path)
    path.write_text("x" * (256 * 1024 + 1))
    with pytest.raises(ModelError, match=r"262,145 bytes; at most 262,144 are read"):
        Template.read(tmp_path)
    path.unlink()
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"tokenizer_config\.json: .*expected JSON"):
        Template.read(tmp_path)


def test_jinja2_is_new_enough() -> None:
    # earlier sandboxes have known escapes
    assert tuple(int(part) for part in jinja2.__version__.split(".")[:3]) >= (3, 1, 6)
