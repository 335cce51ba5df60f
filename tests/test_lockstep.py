"""Two threads in the place of two processes: they compute together, or not at all."""

import threading

import pytest

from tl_jax import cache_folder, lockstep, parallel
from tl_jax.errors import UserError


class Rows:
    """What gives a process's rows."""

    def __init__(self, produce, name):
        self._produce, self._name = produce, name

    def __call__(self):
        return self._produce(self._name)

    def seconds(self):
        return 0.0


class Unreadable(UserError):
    """Of an image."""


class Two:
    """Two threads in the place of two processes; the one called "first" is heard."""

    def __init__(self):
        self.barrier, self.said = threading.Barrier(2, timeout=20), []

    def says(self, number):
        if threading.current_thread().name == "first":
            self.said.append(number)
        self.barrier.wait()
        heard = self.said[-1]
        self.barrier.wait()
        return heard

    def run(self, monkeypatch, on_disk, produce):
        """What the first computed and raised, and what the other did."""
        monkeypatch.setattr(parallel, "first_process_says", self.says)
        errors = {}
        made = {name: Rows(produce, name) for name in "fs"}

        def caught(function, *arguments):
            try:
                function(*arguments)
            except Exception as error:
                errors[threading.current_thread().name] = error
                if isinstance(error, Unreadable):
                    self.barrier.abort()  # its process ends

        threads = [
            threading.Thread(target=caught, args=(lockstep.lead, on_disk, made["f"]), name="first"),
            threading.Thread(target=caught, args=(lockstep.follow, made["s"]), name="second"),
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return errors


def no_room(*_):
    raise cache_folder.NoRoom("no room")


def half(produce):
    next(iter(produce()))
    no_room()


@pytest.mark.parametrize(
    ("on_disk", "pieces", "failed"),
    [
        (lambda produce: None, {}, set()),  # another run wrote it meanwhile
        (lambda produce: list(produce()), {"f": 5, "s": 5}, set()),
        (no_room, {}, {"first", "second"}),
        (half, {"f": 5, "s": 5}, {"first", "second"}),  # all take part to the end
    ],
)
def test_several_processes_compute_a_cache_together_or_not_at_all(
    monkeypatch, on_disk, pieces, failed
):
    made = {}

    def produce(name):
        for number in range(5):
            made[name] = number + 1
            yield number

    errors = Two().run(monkeypatch, on_disk, produce)
    assert made == pieces and errors.keys() == failed
    assert all(isinstance(error, UserError) for error in errors.values())


def test_what_the_first_process_cannot_read_ends_it(monkeypatch):
    def produce(name):
        yield 1
        if name == "f":
            raise Unreadable("an image")

    two = Two()
    errors = two.run(monkeypatch, lambda produce: list(produce()), produce)
    assert isinstance(errors["first"], Unreadable) and two.said == [1]
