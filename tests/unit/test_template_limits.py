"""Chat templates run with a limit: what would hang or fill the memory ends in one message, in a moment."""

import os
import threading
import time
from pathlib import Path

import pytest
import trl

from qlora_neft.data import template_limits
from qlora_neft.data.chat_renderer import ChatRenderer
from qlora_neft.data.examples import BadRow
from qlora_neft.data.template_limits import TemplateLimit, limited, refusal
from scripts.families.tokenizer import byte_tokenizer

TURN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
LOOP = "{% for a in range(99999) %}"
ATTACKS = {
    "loops in loops": LOOP * 2 + "{% endfor %}" * 2,
    "loops over a list": "{% set x = range(99999) | list %}" + "{% for a in x %}" * 4 + "{% endfor %}" * 4,
    "a long range": "{% for a in range(10 ** 9) %}{% endfor %}",
    "a range beyond the sandbox's": "{% for a in range(1000000) %}{% endfor %}",
    "many loops": "{% for a in messages %}" * 9 + "{% endfor %}" * 9,
    "product of strings": "{{ 'a' * 10000000000 }}",
    "product by a variable": "{% set n = 99999 %}{{ 'a' * n * n }}",
    "product of lists": "{{ ([0] * 1000000000) | length }}",
    "product of numbers": "{% set n = 99999 %}{{ n * n * n }}",
    "power": "{{ 9 ** 9 ** 9 }}",
    "date of a huge width": "{{ strftime_now('%1000000000d') }}",
    "date of any width": "{{ strftime_now('%' ~ messages[0].content ~ 'd') }}",
    "width in a format": "{{ '%1000000000d' % 1 }}",
    "width from outside": "{{ '%*d' % (1000000000, 1) }}",
    "format as a method": "{{ '{:1000000000}'.format(1) }}",
    "format as a filter": "{{ '%1000000000d' | format(1) }}",
    "centered": "{{ 'a'.center(1000000000) }}",
    "centered by a filter": "{{ 'a' | center(1000000000) }}",
    "zeros": "{{ '1'.zfill(1000000000) }}",
    "indented": "{{ 'a' | indent(1000000000) }}",
    "lorem": "{{ lipsum(100000) }}",
    "doubling": "{% set n = namespace(s='a') %}{% for a in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "doubling by a sum": "{% set n = namespace(s='a') %}{% for a in range(99) %}{% set n.s = n.s + n.s %}{% endfor %}",
    "recursion": "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "recursive loop": "{% for a in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "a chain of variables": "{% set b0 = messages[0].content %}"
    + "".join(f"{{% set b{n} = b{n - 1} ~ b{n - 1} ~ 'a' %}}" for n in range(1, 40)),
    "a chain of blocks": "{% set b0 = messages[0].content %}"
    + "".join(f"{{% set b{n} %}}{{{{ b{n - 1} }}}}{{{{ b{n - 1} }}}}{{% endset %}}" for n in range(1, 40)),
    "replaced": "{% set x = messages[0].content %}" + "{% set x = x | replace('9', '9999999999') %}" * 20,
    "a list of lists": "{% set a0 = [1] %}" + "".join(f"{{% set a{n} = a{n - 1} + a{n - 1} %}}" for n in range(1, 40)),
    "division by zero": "{{ 1 / 0 }}",
    "a number of any length": "{{ " + "9" * 5000 + " }}",
    "nothing called": "{{ nothing() }}",
    "nesting": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "length": "{# " + "a" * 2_000_000 + " #}",
}


USES = (
    "{{ '  ' * 4 }}",
    "{{ '=' * (messages | length) }}",
    "{{ index + 1 }}",
    "{{ strftime_now('%d %b %Y') }}",
    "{{ '%s: %.2f' % ('a', 1) }}",
    "{{ 'x' | indent(4) }}",
    "{{ '{}'.format(1) }}",
    "{{ 5 % 2 }}",
)


@pytest.mark.parametrize("template", ATTACKS.values(), ids=ATTACKS)
def test_one_message_in_a_moment(template, monkeypatch):
    monkeypatch.setattr(template_limits, "SECONDS", 0.3)
    monkeypatch.setattr(template_limits, "MEMORY", 2**28)
    renderer = ChatRenderer(byte_tokenizer(), TURN + template, None)
    began = time.monotonic()
    for nulls in (False, True):
        with pytest.raises(BadRow, match="the chat template refuses it") as caught:
            renderer.text([{"role": "user", "content": "9" * 9}], nulls=nulls)
        assert len(str(caught.value)) < 700
    assert time.monotonic() - began < 3


def test_other_threads_have_a_clock(monkeypatch):
    monkeypatch.setattr(template_limits, "SECONDS", 0.3)
    renderer, caught = ChatRenderer(byte_tokenizer(), TURN + ATTACKS["loops in loops"], None), []

    def render():
        try:
            renderer.text([{"role": "user", "content": "Hi"}])
        except BadRow as error:
            caught.append(str(error))

    thread = threading.Thread(target=render)
    thread.start()
    thread.join(5)
    assert caught == ["the chat template refuses it: it takes longer than 0.3 s"]


def test_values_for_a_template_that_is_refused():
    for template in (ATTACKS["a number of any length"], ATTACKS["nesting"]):
        with pytest.raises(BadRow, match="the chat template refuses it"):
            ChatRenderer(byte_tokenizer(), "{{ thinking }}" + template, {"thinking": True}).check_kwargs()


def test_what_templates_do_is_rendered():
    stock = sorted(Path(trl.__file__).parent.rglob("*.jinja"))
    assert len(stock) > 10 and [path.name for path in stock if refusal(path.read_text())] == []
    for use in USES:
        assert refusal(TURN + use) is None, use


def test_the_memory_of_this_process_is_limited_for_a_rendering_alone():
    resource = pytest.importorskip("resource")
    if not os.path.exists("/proc/self/statm"):
        pytest.skip("Linux alone says how large a process is")
    before = resource.getrlimit(resource.RLIMIT_AS)
    for _ in range(2):
        with limited(TURN), limited(TURN):
            assert resource.getrlimit(resource.RLIMIT_AS)[0] not in (before[0], resource.RLIM_INFINITY)
        assert resource.getrlimit(resource.RLIMIT_AS) == before
    with pytest.raises(TemplateLimit), limited(TURN):
        raise MemoryError
    assert resource.getrlimit(resource.RLIMIT_AS) == before


def test_the_alarm_of_others_is_left_as_it_was():
    import signal

    mine = lambda *_: None  # noqa: E731
    before, timer = signal.signal(signal.SIGALRM, mine), signal.setitimer(signal.ITIMER_REAL, 1000, 7)
    try:
        with limited(TURN):
            pass
        assert signal.getsignal(signal.SIGALRM) is mine
        left, interval = signal.getitimer(signal.ITIMER_REAL)
        assert 900 < left <= 1000 and interval == 7
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, before)
