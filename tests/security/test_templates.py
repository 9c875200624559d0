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
