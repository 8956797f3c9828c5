"""The peers that an operator names: what may be one, what is kept, and what is refused when it is read again."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.unit.peers.hosts import made
from vtpm.errors import ConflictError, NotFoundError, StateError, UsageError, VtpmError
from vtpm.peers import book as module
from vtpm.peers.book import Book, Peer, new_peer
from vtpm.peers.identity import MAX_CERTIFICATE_BYTES, der_of

PEM = made("a").pem
OTHER = made("a").pem


@pytest.fixture
def book(tmp_path: Path) -> Book:
    return Book(tmp_path)


def test_peers_are_found_again_when_they_were_added(book: Book, tmp_path: Path) -> None:
    b, a = new_peer("b", "https://b:1", PEM), new_peer("a.1", "https://[::1]:2", OTHER)
    for peer in (b, a):
        book.add(peer)
    assert Book(tmp_path).list() == [a, b]
    assert [book.find(name) for name in ("b", "https://b:1", "https://b:1/")] == [b, b, b]
    assert book.of_certificate(der_of(OTHER)) == a
    assert book.of_certificate(b"") is None
    for path in tmp_path.iterdir():
        assert path.stat().st_mode & 0o777 == 0o600


def test_peer_is_in_the_place_of_the_earlier_when_its_name_is_the_same(book: Book) -> None:
    book.add(new_peer("b", "https://b:1", PEM))
    book.add(new_peer("b", "https://b:2", OTHER))
    assert book.list() == [new_peer("b", "https://b:2", OTHER)]
    assert book.of_certificate(der_of(PEM)) is None


def test_peer_is_refused_when_another_has_its_place_or_certificate(book: Book) -> None:
    book.add(new_peer("b", "https://b:1", PEM))
    for peer in (new_peer("c", "https://b:1", OTHER), new_peer("c", "https://c:1", PEM)):
        with pytest.raises(ConflictError, match="peer b has that URL or certificate already"):
            book.add(peer)
    assert [peer.name for peer in book.list()] == ["b"]


def test_one_of_them_is_refused_when_two_are_added_at_once(tmp_path: Path) -> None:
    both = threading.Barrier(2)

    class Met(Book):
        """Lets those who have looked wait for one another, for as long as nobody holds one of them back."""

        def list(self) -> Sequence[Peer]:
            found = super().list()
            with contextlib.suppress(threading.BrokenBarrierError):
                both.wait(0.3)
            return found

    book = Met(tmp_path)

    def add(name: str) -> bool:
        try:
            book.add(new_peer(name, f"https://{name}:1", PEM))
        except ConflictError:
            return False
        return True

    with ThreadPoolExecutor(2) as threads:
        assert sum(threads.map(add, "bc")) == 1
    assert len(book.list()) == 1


def test_peer_is_refused_when_there_are_as_many_as_can_be(book: Book, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_PEERS", 1)
    book.add(new_peer("b", "https://b:1", PEM))
    with pytest.raises(ConflictError, match="can have no more"):
        book.add(new_peer("c", "https://c:1", OTHER))
    book.add(new_peer("b", "https://b:2", OTHER))


def test_peer_is_gone_when_it_was_removed(book: Book) -> None:
    book.add(new_peer("b", "https://b:1", PEM))
    book.remove("b")
    assert book.list() == []
    for name in ("b", "../b", "", "b/c", "x" * 200):
        with pytest.raises(NotFoundError, match="there is no peer"):
            book.remove(name)
        with pytest.raises(NotFoundError, match="there is no peer"):
            book.find(name)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../b", "a/b", "a..b", "a.", ".a", "-a", "a b", "a\n", "ä", "x" * 64, "a\x00"]
)
def test_peer_is_refused_when_its_name_is_none(name: str) -> None:
    with pytest.raises(UsageError, match="is not a name for a peer"):
        new_peer(name, "https://b:1", PEM)


@pytest.mark.parametrize(
    "url",
    [
        *("", "b", "b:1", "http://b:1", "HTTPS://b:1", "https://b", "https://b:", "https://b:0", "https://b:65536"),
        *("https://b:-1", "https://b:1/", "https://b:1/x", "https://b:1?x", "https://b:1#x", "https://u@b:1"),
        *("https://u:p@b:1", "https://:1", "https://b:01", "https://b:١", "https://b b:1", "https://b\n:1"),
        *("https://[::1:1", "https://::1:1", "https://[::::]:1", "https://[1.2]:1", "https://1.2.3.999:1"),
        *("https://xn--a:1", "https://ä:1", "https://" + "b" * 300 + ":1", "https://b%00:1", "https://b:1\\@c:1"),
    ],
)
def test_peer_is_refused_when_its_url_is_of_another_form(url: str) -> None:
    with pytest.raises(UsageError, match="is not https://HOST:PORT"):
        new_peer("b", url, PEM)


@pytest.mark.parametrize(
    "url", ["https://b:443", "https://b.example:65535", "https://192.0.2.1:1", "https://[2001:db8::1]:8"]
)
def test_peer_is_taken_when_its_url_is_of_the_form(url: str) -> None:
    assert new_peer("b", url, PEM).url == url


def test_peer_is_refused_when_its_certificate_is_long() -> None:
    with pytest.raises(UsageError, match="at most"):
        new_peer("b", "https://b:1", PEM + "x" * MAX_CERTIFICATE_BYTES)


@pytest.mark.parametrize("more", ["\x00", "ü", "\U0001f600", "\n"], ids=["zero", "letter", "sign", "line"])
def test_peer_can_be_read_again_when_its_file_had_more_than_a_certificate(book: Book, more: str) -> None:
    """In JSON each of them has up to twelve bytes."""
    text = more * (MAX_CERTIFICATE_BYTES - len(PEM) - 1) + "\n" + PEM
    book.add(new_peer("b", "https://b:1", text))
    assert book.list() == [Peer("b", "https://b:1", PEM)]


GOOD = {"version": 1, "name": "b", "url": "https://b:1", "certificate": PEM}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff",
        b"[]",
        b"{}",
        b"[" * 30_000,
        b"1" * 10_000,
        json.dumps(GOOD | {"more": 1}).encode(),
        json.dumps(GOOD | {"version": 2}).encode(),
        json.dumps(GOOD | {"name": "c"}).encode(),
        json.dumps(GOOD | {"url": 1}).encode(),
        json.dumps(GOOD | {"url": "https://b"}).encode(),
        json.dumps(GOOD | {"certificate": None}).encode(),
        json.dumps(GOOD | {"certificate": "x"}).encode(),
        json.dumps(GOOD).encode()[:-9],
        json.dumps(GOOD).encode() + b" " * (4 * MAX_CERTIFICATE_BYTES),
    ],
)
def test_book_is_refused_and_names_the_file_when_one_is_damaged(book: Book, tmp_path: Path, content: bytes) -> None:
    book.add(new_peer("a", "https://a:1", OTHER))
    (tmp_path / "b.json").write_bytes(content)
    for asked in (book.list, lambda: book.find("a"), lambda: book.of_certificate(der_of(OTHER))):
        with pytest.raises(StateError, match=r"b\.json is damaged") as refused:
            asked()
        assert "Remove the file" in refused.value.next_step
    with pytest.raises(StateError, match=r"b\.json is damaged"):
        book.add(new_peer("c", "https://c:1", PEM))
    book.remove("b")
    assert [peer.name for peer in book.list()] == ["a"]


def test_book_is_refused_when_something_else_is_in_the_place_of_a_file(book: Book, tmp_path: Path) -> None:
    book.add(new_peer("a", "https://a:1", PEM))
    (tmp_path / "a.json").rename(tmp_path / "kept")
    (tmp_path / "a.json").symlink_to(tmp_path / "kept")
    with pytest.raises(StateError, match=r"a\.json cannot be read"):
        book.list()


def test_book_is_refused_when_its_folder_is_gone(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="cannot be read"):
        Book(tmp_path / "none").list()
    with pytest.raises(VtpmError):
        Book(tmp_path / "none").add(new_peer("a", "https://a:1", PEM))


def test_other_files_are_no_peers_when_they_are_in_the_folder(book: Book, tmp_path: Path) -> None:
    for name in ("channel.key", "channel.pem", "a.json.next"):
        (tmp_path / name).write_text("x")
    assert book.list() == []
