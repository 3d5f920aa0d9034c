"""Sending the whole chord anew of which a dead letter is a part."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any
from uuid import NAMESPACE_OID, uuid4, uuid5

from celery import Celery, chain, chord, states
from celery.canvas import Signature

from reliable_tasks._celery.headers import REPLAY_OF
from reliable_tasks._celery.registry import check_arguments
from reliable_tasks._dead.canvas import apart, thawed
from reliable_tasks._dead.original import UNREADABLE, Original
from reliable_tasks._dead.reserving import release_each, releasing, reserve_each
from reliable_tasks._places import DeadPlace
from reliable_tasks._store.dead import Reservation, Sent
from reliable_tasks._store.letters import DeadLetter
from reliable_tasks._store.publication import Publication, publishing
from reliable_tasks.errors import ReplayRefused
from reliable_tasks.instrumentation.signals import dead_letter_replayed

__all__ = ["check_chord", "replay_chord"]

#: Of each dead part what was said of its replay, and the new id.
_Answers = Mapping[str, tuple[Reservation, str]]


@dataclass(frozen=True, slots=True)
class _Part:
    """A part of a chord's header.

    Attributes:
        original: Its message.
        letter: Its dead letter, ``None`` if it has succeeded.
    """

    original: Original
    letter: DeadLetter | None

    def steps(self, app: Celery, queue: str | None) -> list[Signature[Any]]:
        """Return it and the rest of its chain, to be called anew."""
        task = app.tasks.get(self.original.task)
        if task is not None:
            # When it is called, those before it are sent.
            check_arguments(task, self.original.args, self.original.kwargs)
        first = self.original.signature(app)
        for name in ("link", "link_error"):
            if name in first.options:
                first.options[name] = [thawed(app, one) for one in first.options[name]]
        came_by = ""
        if self.letter is not None:
            first.set(headers={**(first.options.get("headers") or {}), REPLAY_OF: self.letter.id})
            came_by = self.letter.queue
        first.set(**self.original.destination(app, came_by, queue))
        rest = reversed(self.original.embed.get("chain") or ())
        return [first, *(thawed(app, step) for step in rest)]


@dataclass(frozen=True, slots=True)
class _Chord:
    """A chord to be called anew.

    Attributes:
        header: Its parts, each with its steps.
        body: What is called with their results.
    """

    header: list[tuple[_Part, list[Signature[Any]]]]
    body: Signature[Any]

    @property
    def dead(self) -> list[DeadLetter]:
        """The dead letters of its parts, in one order for all that replay one of them."""
        letters = (part.letter for part, _ in self.header if part.letter is not None)
        return sorted(letters, key=lambda one: one.id)

    def last_id(self, new_ids: dict[str, str]) -> str:
        """Return the new id of what is sent last, which all who replay the chord know.

        The parts are sent in their order: when that one has begun, all of them were.
        """
        last = self.header[-1][0]
        if last.letter is not None:
            return new_ids[last.letter.id]
        # It is never sent twice: who is refused has not come so far.
        return str(uuid5(NAMESPACE_OID, f"reliable_tasks {last.original.headers['id']}"))

    def call(self, app: Celery, new_ids: dict[str, str], last_id: str) -> None:
        """Call it: its dead parts under their new ids, and what is sent last under that one."""
        for part, steps in self.header:
            if part.letter is not None:
                steps[0].set(task_id=new_ids[part.letter.id])
        # Its result says that it has begun.
        self.header[-1][1][0].options.update(task_id=last_id, ignore_result=False)
        header = [chain(*steps) if len(steps) > 1 else steps[0] for _, steps in self.header]
        with publishing(Publication(replaces=False), None):
            apart(app, lambda: chord(header, app=app)(self.body))


def check_chord(app: Celery, place: DeadPlace, letter: DeadLetter, original: Original) -> None:
    """Check that the chord of a dead letter can be replayed.

    Raises:
        ReplayRefused: It cannot.
    """
    _read(app, place, letter, original, queue=None)


def replay_chord(
    app: Celery, place: DeadPlace, letter: DeadLetter, original: Original, *, queue: str | None
) -> str:
    """Send the chord of a dead letter, unless somebody has; return the new id of that part.

    Raises:
        ReplayRefused: It cannot be replayed.
        DeadLetterNotFound: One of its dead parts was removed meanwhile.
    """
    found = _read(app, place, letter, original, queue=queue)
    token = str(uuid4())
    answers = reserve_each(place, (one.id for one in found.dead), token)
    new_ids = {id_: new_id for id_, (_, new_id) in answers.items()}
    last_id = found.last_id(new_ids)
    # A part can have died again since somebody has begun, and has another id by now.
    theirs = place.store.begun(place.server, str(letter.chord_id)) or last_id
    codes = {code for code, _ in answers.values()}
    if Reservation.SENT in codes or (
        Reservation.IN_DOUBT in codes and app.AsyncResult(theirs).state != states.PENDING
    ):
        _note_sent(place, letter, answers, token)
        return new_ids[letter.id]
    if not _begin(place, letter, new_ids, token, last_id):
        _release(place, answers, token, Sent.IN_DOUBT)
        raise ReplayRefused(
            letter.id,
            f"chord {letter.chord_id} may have been sent already, or in part, and {theirs}, its "
            "last part, has not begun: ask again when it has; when you know that it never will, "
            "call the chord anew yourself",
        )
    queued: Collection[str] = ()
    try:
        with releasing(app, place, letter, new_ids, token, last_id) as queued:
            found.call(app, new_ids, last_id)
    except ReplayRefused as refusal:
        if queued:
            reason = f"{refusal.reason}; but a part of chord {letter.chord_id} is sent"
            raise ReplayRefused(letter.id, reason) from refusal
        with suppress(Exception):
            place.store.give_up_chord(place.server, str(letter.chord_id), token)
        raise
    place.store.forget_parts(place.server, str(letter.chord_id))
    for one in found.dead:
        dead_letter_replayed.send(
            sender=app.tasks.get(one.task), letter=one, task_id=new_ids[one.id]
        )
    return new_ids[letter.id]


def _begin(
    place: DeadPlace, letter: DeadLetter, new_ids: dict[str, str], token: str, last_id: str
) -> bool:
    """Note that a chord is about to be sent, before any of it is; say whether nobody else did."""
    try:
        return place.store.begin_chord(place.server, str(letter.chord_id), token, last_id)
    except BaseException:
        # What failed is what the caller has to know.
        with suppress(Exception):
            place.store.give_up_chord(place.server, str(letter.chord_id), token)
            release_each(place, new_ids, token, Sent.REFUSED)
        raise


def _note_sent(place: DeadPlace, letter: DeadLetter, answers: _Answers, token: str) -> None:
    """Note that all of a chord was sent before.

    Raises:
        ReplayRefused: The dead letter is of a copy of its part that has died since.
    """
    _release(place, answers, token, Sent.SENT)
    place.store.forget_parts(place.server, str(letter.chord_id))
    if answers[letter.id][0] is Reservation.OURS:
        raise ReplayRefused(
            letter.id,
            f"chord {letter.chord_id} was sent anew before this copy of its part has died",
        )


def _release(place: DeadPlace, answers: _Answers, token: str, how: Sent) -> None:
    """Note how the replays of a chord went that somebody else has begun to send."""
    # A part that has died again since was none of those.
    later = {id_: new_id for id_, (code, new_id) in answers.items() if code is Reservation.OURS}
    others = {id_: new_id for id_, (_, new_id) in answers.items() if id_ not in later}
    release_each(place, later, token, Sent.REFUSED)
    release_each(place, others, token, how)


def _read(
    app: Celery, place: DeadPlace, letter: DeadLetter, original: Original, *, queue: str | None
) -> _Chord:
    """Return the chord of a dead letter; all of it is made before anything is reserved.

    Raises:
        ReplayRefused: It cannot be replayed.
    """
    if letter.chord_id is None:
        raise ReplayRefused(letter.id, "it is no part of a chord: leave out whole_chord")
    called = original.chord or {}
    with _reading(letter):
        is_in_chord = bool(called["options"].get("chord"))
    if is_in_chord:
        reason = f"chord {letter.chord_id} is itself a part of a chord, which has counted its end"
        raise ReplayRefused(letter.id, reason)
    parts = sorted(_parts(app, place, letter), key=lambda part: part.original.index)
    with _reading(letter):
        header = [(part, part.steps(app, queue)) for part in parts]
        return _Chord(header, thawed(app, called))


@contextmanager
def _reading(letter: DeadLetter) -> Iterator[None]:
    """Say in other words that a canvas is none; whoever wrote it may have put anything there."""
    try:
        yield
    except UNREADABLE as error:
        raise ReplayRefused(letter.id, f"it cannot be called any more: {error!r}") from error


def _parts(app: Celery, place: DeadPlace, letter: DeadLetter) -> list[_Part]:
    """Return the parts of the header, as their ends were noted."""
    found: list[_Part] = []
    size, parts = place.store.parts(place.server, str(letter.chord_id))
    for kept in parts.values():
        if not kept.startswith(b"@"):
            found.append(_Part(Original.read(app, letter.id, kept), None))
            continue
        id_ = kept[1:].decode()
        other = place.store.get(place.server, id_)
        raw = place.store.message(place.server, id_)
        if other is not None:
            found.append(_Part(Original.read(app, letter.id, raw), other))
    if not size or len(found) < size:
        raise ReplayRefused(
            letter.id,
            f"of {size or 'nobody knows how many'} parts of chord {letter.chord_id} {len(found)} "
            "are known: the others have not ended, or are no late-ack ReliableTask; or it was "
            "called by an app without apply_reliable_config",
        )
    if letter.id not in (part.letter.id for part in found if part.letter is not None):
        kept = parts.get(letter.task_id, b"")
        later = kept[1:].decode() if kept.startswith(b"@") else "its later dead letter"
        raise ReplayRefused(letter.id, f"its task has died again since: replay {later}")
    return found
