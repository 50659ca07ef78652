"""fipo.signals: outside `deferred` a signal stops at once, inside it only sets a flag; handlers are put back."""

import os
import signal

import pytest

from fipo.config import Text
from fipo.data import text
from fipo.signals import Interrupted, StopSignals, stopping

BOTH = [(signal.SIGTERM, 143), (signal.SIGINT, 130)]


def send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(("number", "code"), BOTH)
def test_stops_at_once(number, code):
    with pytest.raises(Interrupted, match=f"stopped by {number.name}") as caught, StopSignals():
        send(number)
        pytest.fail("went on")
    assert caught.value.exit_code == code


@pytest.mark.parametrize(("number", "code"), BOTH)
def test_deferred_goes_on_until_it_is_ready(number, code):
    done = []
    with pytest.raises(Interrupted) as caught, StopSignals() as stop, stop.deferred():
        assert stop.received is None
        stop.leave()
        send(number)
        assert stop.received == number
        done.append("saved")
        stop.leave()
    assert done == ["saved"] and caught.value.exit_code == code


def test_a_signal_in_the_last_step_is_not_lost():
    with pytest.raises(Interrupted), StopSignals() as stop:
        with stop.deferred():
            send(signal.SIGTERM)
        pytest.fail("went on")


def test_an_error_inside_is_not_hidden_by_a_signal():
    with pytest.raises(KeyError), StopSignals() as stop, stop.deferred():
        send(signal.SIGTERM)
        raise KeyError


@pytest.mark.parametrize("error", [ImportError("initialization failed"), ValueError("no shape")])
def test_what_compiled_code_makes_of_an_interruption_is_one(error):
    """As matplotlib's start and a slice of safetensors do."""

    def compiled():
        try:
            send(signal.SIGTERM)
        except KeyboardInterrupt:
            raise error from None

    with pytest.raises(Interrupted) as caught, StopSignals():
        compiled()
    assert caught.value.exit_code == 143
    with pytest.raises(type(error)), StopSignals():
        raise error


def test_whoever_catches_what_compiled_code_makes_of_a_signal_can_ask(monkeypatch):
    """A stream of text that breaks off is taken up again, and not when it was a signal that broke it off."""
    opened = []

    class Stream:
        def skip(self, _count):
            return self

        def __iter__(self):
            opened.append(stopping())
            yield {"text": "first"}
            try:
                send(signal.SIGTERM)
            except KeyboardInterrupt:
                raise ValueError("no shape") from None

    monkeypatch.setattr(text, "load_hub", lambda *_: Stream())
    source = text.open_text(Text(source="a/b", revision="c", tokens=10, held_out_tokens=2, packed=False))
    with pytest.raises(Interrupted), StopSignals():
        list(source.texts())
    assert opened == [False] and not stopping()


def test_a_second_ctrl_c_does_not_wait_and_a_second_sigterm_does():
    with pytest.raises(Interrupted), StopSignals() as stop, stop.deferred():
        send(signal.SIGTERM)
        send(signal.SIGTERM)
        assert stop.received == signal.SIGTERM
        send(signal.SIGINT)
        pytest.fail("waited")


def test_handlers_are_put_back():
    before = [signal.getsignal(number) for number, _ in BOTH]
    with StopSignals():
        assert [signal.getsignal(number) for number, _ in BOTH] != before
    with pytest.raises(Interrupted), StopSignals():
        send(signal.SIGTERM)
    assert [signal.getsignal(number) for number, _ in BOTH] == before
