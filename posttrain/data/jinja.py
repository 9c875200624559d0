"""Chat templates compiled once, in the sandbox and with the helpers that Hugging Face tokenizers give them."""

import json
from datetime import datetime

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.compiler import CodeGenerator
from jinja2.sandbox import ImmutableSandboxedEnvironment

from posttrain.data.budget import ITEM, LOOKED_AT, Budget
from posttrain.data.provenance import TrackedStr, concat, source_of
from posttrain.errors import UserError

# What `a * b` and `a ** b` may make, far more than any chat template asks for: characters or items, and bits.
MAX_REPEATED = 1 << 20
MAX_BITS = 1 << 16


class _Generation(jinja2.ext.Extension):
    """Accepts `{% generation %}` blocks and renders what is inside: the mask comes from the messages, not from them."""

    tags = {"generation"}  # noqa: RUF012  (Jinja's own attribute)

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return nodes.CallBlock(self.call_method("_inside"), [], [], body).set_lineno(line)

    def _inside(self, caller):
        return caller()


class _MarkKeepingCode(CodeGenerator):
    """Python for a template whose `a ~ b` keeps marks, as its other concatenations do through `environment.concat`."""

    def visit_Concat(self, node, frame):
        self.write("environment.concat_values((")
        for value in node.nodes:
            self.visit(value, frame)
            self.write(", ")
        self.write("))")

    def visit_For(self, node, frame):
        node.body.insert(0, nodes.ExprStmt(nodes.EnvironmentAttribute("budget.step()"), lineno=node.lineno))
        super().visit_For(node, frame)


# Filters whose results are no longer than what they are given, and that conversations use most: used as they are.
UNCOUNTED = {"trim", "length", "count", "default", "d", "first", "last", "int", "upper", "lower", "tojson", "join"}


class _Environment(ImmutableSandboxedEnvironment):
    code_generator_class = _MarkKeepingCode
    intercepted_binops = frozenset({"*", "**", "+", "%"})  # so none is computed while a template is compiled, either

    def __init__(self, **settings):
        super().__init__(**settings)
        self.budget = Budget()  # of the row that is rendered
        for name, plain in self.filters.items():
            if name not in UNCOUNTED:
                passed = getattr(plain, "jinja_pass_arg", None) is not None
                self.filters[name] = self.budget.counted(name, plain, passed)

    def concat(self, parts):
        return concat(self.budget.written(parts))

    def concat_values(self, values):
        return concat(self.budget.written(map(str, values)))

    def call(self, context, called, /, *args, **kwargs):
        self.budget.step()
        owner = getattr(called, "__self__", None)
        if type(owner) is str and called.__name__ == "join" and len(args) == 1:
            return concat(self.budget.written(args[0]), owner)
        if isinstance(owner, str | bytes) and called.__name__ in LOOKED_AT:
            self.budget.before(called.__name__, owner, args, kwargs)
        elif owner is None and getattr(called, "__name__", "") in ("format", "format_map"):  # Jinja's, around a text's
            self.budget.before(called.__name__, called.__wrapped__.__self__, args, kwargs)
        result = super().call(context, called, *args, **kwargs)
        if isinstance(result, str):
            self.budget.made(len(result))
        return result

    def call_binop(self, context, operator, left, right):
        if operator == "+":
            result = left + right
            if isinstance(result, str):
                self.budget.left -= len(result)
                if self.budget.left < 0:
                    self.budget.made(0)
            elif isinstance(result, list | tuple):
                self.budget.made(ITEM * len(result))
            return result
        if operator == "%":
            self.budget.before("%", left, (right,), {})
        else:
            check_operands(operator, left, right)
        return super().call_binop(context, operator, left, right)


def check_operands(operator: str, left: object, right: object) -> None:
    """See that `left * right` or `left ** right` in a template is small, before it is computed.

    Raises:
        jinja2.TemplateError: it is a text or list of more than MAX_REPEATED, or a number of more than MAX_BITS.
    """
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() + right.bit_length()
        if operator == "**":
            bits = left.bit_length() * max(right, 1)
        if bits > MAX_BITS and abs(left) > 1:
            raise jinja2.TemplateError(f"`{operator}` makes a number of more than {MAX_BITS:,} bits")
    for value, times in ((left, right), (right, left)):
        if not isinstance(value, str | bytes | list | tuple) or not isinstance(times, int):
            continue
        if len(value) * times > MAX_REPEATED:
            raise jinja2.TemplateError(f"`{operator}` makes a text or list of more than {MAX_REPEATED:,}")


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    source = source_of(value)
    if source is None:
        return text
    return TrackedStr(text, ((0, len(text), source, 0),))


@jinja2.pass_eval_context
def _join(eval_ctx, value, d="", attribute=None):
    if attribute is not None:
        value = map(jinja2.filters.make_attrgetter(eval_ctx.environment, attribute), value)
    return concat(eval_ctx.environment.budget.written(map(str, value)), d)


def _raise_exception(message):
    raise jinja2.exceptions.TemplateError(message)


def budget_of(template: jinja2.Template) -> Budget:
    """What a template that `compile_template` returned has left for the row that is rendered."""
    assert isinstance(template.environment, _Environment)
    return template.environment.budget


def names_in(template: jinja2.Template, source: str) -> frozenset[str]:
    """Every name, attribute and text in a template: keys of messages that are not among them are not read by it."""
    names = set()
    for node in template.environment.parse(source).find_all((nodes.Name, nodes.Getattr, nodes.Const)):
        for value in (getattr(node, "name", None), getattr(node, "attr", None), getattr(node, "value", None)):
            if isinstance(value, str):
                names.add(value)
    return frozenset(names)


def compile_template(source: str, name: str) -> jinja2.Template:
    """Compile a chat template.

    Args:
        source: the Jinja text.
        name: what to call it in an error.

    Raises:
        UserError: not valid Jinja, naming the line; or Jinja can't compile it, such as what is nested too deeply.
    """
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.filters["join"] = _join
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"template: {name}, line {error.lineno}: not valid Jinja: {error.message}") from None
    except SyntaxError as error:  # Jinja's compiler lets a `break` outside of a loop pass
        raise UserError(f"template: {name}: not valid Jinja: {error.msg}") from None
    except Exception as error:  # of whatever kind: a stranger's file
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        raise UserError(f"template: {name}: Jinja can't compile it: {reason}") from error
