"""A stranger's template that asks for much, or that Jinja can't compile: refused for its row, or by name."""

import pytest
from tiny_tokenizer import byte_tokenizer

from posttrain.data.conversation import Conversation, Message, RowError
from posttrain.data.jinja import compile_template
from posttrain.data.render import Renderer
from posttrain.data.templates import ChatTemplate
from posttrain.errors import UserError

CHAT = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def rendered(source):
    renderer = Renderer(ChatTemplate(jinja=CHAT + source, require_stop=False), byte_tokenizer())
    return str(renderer.render(Conversation([Message("user", "hi")])))


LARGE = [
    "{{ 'A' * 20000000000 }}",
    "{{ 20000000000 * 'A' }}",
    "{{ messages[0].content * 20000000000 }}",
    "{{ [1] * 20000000000 }}",
    "{{ (messages * 1000000000) | length }}",
    "{% set ns = namespace(x='a') %}{% for i in range(40) %}{% set ns.x = ns.x * 10 %}{% endfor %}",
    "{% set ns = namespace(x=9) %}{% for i in range(40) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "{{ 9 ** (9 ** 9) }}",
    "{{ 9 ** 9 ** 9 ** 9 ** 9 ** 9 }}",
]


@pytest.mark.parametrize("source", LARGE)
def test_products_are_small(source):
    """Computed neither when a row is rendered nor before, when the template is compiled."""
    with pytest.raises(RowError, match=r"`\*\*?` makes a (text or list|number) of more than"):
        rendered(source)


def test_products_of_templates_in_use():
    assert rendered("{{ ' ' * 4 ~ '-' * 3 }}{{ 2 ** 10 }}{{ 3 * 1.5 }}{{ 2 ** -1 }}").endswith("    ---10244.50.5")


GROW = "{% set ns = namespace(x=START) %}{% for i in range(60) %}{% set ns.x = NEXT %}{% endfor %}"


def growing(start, step):
    return GROW.replace("START", start).replace("NEXT", step)


MUCH = {
    "loops within loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "texts that double": growing("'ab'", "ns.x ~ ns.x"),
    "sums that double": growing("'ab'", "ns.x + ns.x"),
    "lists that double": growing("[1]", "ns.x + ns.x"),
    "a macro that calls itself twice": (
        "{% macro a(n) %}{% if n %}{{ a(n-1) }}{{ a(n-1) }}{% endif %}{% endmacro %}{{ a(60) }}"
    ),
    "replacements": growing("'a'", "ns.x.replace('a', 'aaaaaaaa')"),
    "a long text, written often": "{% set t = 'a' * 1000000 %}{% for i in range(99999) %}{{ t }}{% endfor %}",
    "a block of it": "{% set t = 'a' * 999999 %}{% set x %}{% for i in range(99999) %}{{ t }}{% endfor %}{% endset %}",
}
WIDE = [
    "{{ 'a' | center(20000000000) }}",
    "{{ 'a'.center(20000000000) }}",
    "{{ '1'.zfill(20000000000) }}",
    "{{ 'a' | indent(20000000000, true) }}",
    "{{ [1] | batch(20000000000, 1) | list }}",
    "{{ '%20000000000d' | format(1) }}",
    "{{ '%20000000000d' % 1 }}",
    "{{ '%*d' % (2000000000, 1) }}",
    "{{ '{:>20000000000}'.format(1) }}",
    "{{ '{:>{}}'.format(1, 20000000000) }}",
]


@pytest.mark.parametrize("kind", MUCH)
def test_a_row_has_a_budget(kind):
    with pytest.raises(RowError, match=r"(passes of loops and calls|texts and lists of more than .*) for one row"):
        rendered(MUCH[kind])


@pytest.mark.parametrize("source", WIDE)
def test_widths_are_looked_at_before(source):
    with pytest.raises(RowError, match="of more than 1,048,576"):
        rendered(source)


def test_ordinary_work_is_not_refused():
    many = "{% for i in range(2000) %}{{ '%05d' % i }}{{ 'x'.center(9) }}{{ '{:>7}'.format(i) }}{% endfor %}"
    assert len(rendered(many)) > 2000 * 21


DEEP = {
    "ifs": "{% if true %}" * 2000 + "{% endif %}" * 2000,
    "loops": "{% for a in messages %}" * 50 + "{% endfor %}" * 50,
    "parentheses": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "lists": "{{ " + "[" * 3000 + "]" * 3000 + " }}",
    "a number of 10,000 digits": "{{ " + "9" * 10_000 + " }}",
}


@pytest.mark.parametrize("kind", DEEP)
def test_what_jinja_cannot_compile(kind):
    with pytest.raises(UserError, match=r"^template: mine[^\n]*$"):
        compile_template(DEEP[kind], "mine")
