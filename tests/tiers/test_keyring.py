"""The file of secrets: what it may say, who may read it, and how it changes while it is in use."""

import base64
import hashlib
import hmac
import os
import threading
from pathlib import Path

import pytest

from kvortex.errors import ConfigError
from kvortex.tiers.keyring import LOOK_S, Keyring, new_key_line, parse_keys
from tests.tiers.seal_support import SECRETS, write_keys


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def id_of(name: str) -> bytes:
    return name.encode().ljust(16, b"\0")


def key_of(secret: bytes) -> bytes:
    """HKDF-SHA256 with an empty salt, one block of output (RFC 5869)."""
    extracted = hmac.new(bytes(32), secret, hashlib.sha256).digest()
    return hmac.new(extracted, b"kvortex seal 1\x01", hashlib.sha256).digest()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_keys(tmp_path / "seal.keys", "new", "old")


def test_the_first_key_seals_and_all_open(file: Path) -> None:
    ring = Keyring(str(file), bytes)
    new, old = (key_of(bytes.fromhex(SECRETS[name])) for name in ("new", "old"))
    assert ring.first() == (id_of("new"), new)
    assert (ring.of(id_of("new")), ring.of(id_of("old")), ring.of(id_of("other"))) == (new, old, None)


def test_secrets_in_all_spellings() -> None:
    secret = bytes(range(224, 256))
    plain = base64.b64encode(secret).decode()
    spelled = [secret.hex(), secret.hex().upper(), plain, base64.urlsafe_b64encode(secret).decode()]
    assert "/" in plain
    for text in spelled:
        (key,) = parse_keys(f"# keys\n\n  a.B-9_  {text} \n", "keys")
        assert (key.id, key.secret) == ("a.B-9_", secret)
        assert text not in repr(key)
        assert repr(secret) not in repr(key)
    (longer,) = parse_keys(f"id {(secret * 2).hex()}", "keys")
    assert longer.secret == secret * 2


GOOD = "ab" * 32


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "keys has no key; `kvortex seal-key` makes one"),
        ("# a\n", "has no key"),
        (f"a {GOOD}\n{'cd' * 32}", "line 2: a line is the id of a key and its secret, not 1 words"),
        (f"a {GOOD} b", "line 1: .* not 3 words"),
        (f"{'a' * 17} {GOOD}", "line 1: an id has up to 16 letters"),
        (f"a/b {GOOD}", "line 1: an id has up to 16 letters"),
        (f"é {GOOD}", "line 1: an id has up to 16 letters"),
        (f"#a\n\na {GOOD[2:]}", "line 3: the secret has 31 bytes, and needs 32"),
        ("a cGFzc3dvcmQ=", "line 1: the secret has 8 bytes, and needs 32"),
        (f"a {GOOD[1:]}!", "line 1: the secret is neither base64 nor hexadecimal digits"),
        (f"a {base64.b64encode(bytes(32)).decode()[:-1]}", "line 1: the secret is neither base64"),
        (f"a {GOOD}\nb {'cd' * 32}\na {'ef' * 32}", "line 3: the id 'a' is that of line 1, too"),
        (f"a {GOOD}\nb {GOOD.upper()}", "line 2: the secret is that of line 1, too"),
    ],
)
def test_what_is_wrong_is_told_by_line_and_without_secrets(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        parse_keys(text, "keys")
    assert not any(len(word) > 24 and word in str(raised.value) for word in text.split())
    file = tmp_path / "keys"
    file.touch(mode=0o600)
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        Keyring(str(file), bytes)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"seal_keys cannot be read: .*No such file"):
        Keyring(str(tmp_path / "none"), bytes)
    file = tmp_path / "keys"
    file.touch(mode=0o600)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is no text"):
        Keyring(str(file), bytes)


@pytest.mark.parametrize("mode", [0o604, 0o602, 0o601, 0o640, 0o620, 0o666])
def test_a_file_that_others_can_read_is_refused(file: Path, mode: int) -> None:
    file.chmod(mode)
    with pytest.raises(ConfigError, match=rf"\(mode 0{mode:o}\).*: chmod 600 {file}"):
        Keyring(str(file), bytes)


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o700])
def test_a_file_of_its_owner_alone_is_taken(file: Path, mode: int) -> None:
    file.chmod(mode)
    Keyring(str(file), bytes)


def test_a_group_may_read_what_another_user_owns(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where an orchestrator mounts secrets: root owns them, the process has their group."""
    uid = file.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: uid + 1)
    file.chmod(0o440)
    Keyring(str(file), bytes)
    file.chmod(0o444)
    with pytest.raises(ConfigError, match="open to others"):
        Keyring(str(file), bytes)


# -- changes ---------------------------------------------------------------------------------------------


def test_a_changed_file_is_read_again_after_a_while(file: Path) -> None:
    clock = Clock()
    ring = Keyring(str(file), bytes, clock)
    write_keys(file, "other")
    clock.now_s += LOOK_S - 0.01
    assert ring.first()[0] == id_of("new")
    clock.now_s += 0.01
    assert ring.first()[0] == id_of("other")
    assert ring.of(id_of("new")) is None


def test_an_unknown_key_is_looked_for_at_once(file: Path) -> None:
    ring = Keyring(str(file), bytes, Clock())
    assert ring.of(id_of("other")) is None
    write_keys(file, "new", "old", "other")
    assert ring.of(id_of("other")) == key_of(bytes.fromhex(SECRETS["other"]))


def test_a_file_is_read_once_for_each_of_its_versions(file: Path) -> None:
    clock, made = Clock(), []
    ring = Keyring(str(file), made.append, clock)
    for number in range(1, 4):
        for _ in range(10):
            clock.now_s += LOOK_S
            ring.first()
            ring.of(id_of("nobody"))
        assert len(made) == 2 * number
        write_keys(file, "old", "other")


def test_a_file_that_has_become_wrong_leaves_the_keys_as_they_were(
    file: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    ring = Keyring(str(file), bytes, clock)
    harms = [
        lambda: file.write_text("new 12\n"),
        lambda: file.write_text(""),
        lambda: file.unlink(),
        lambda: write_keys(file, "other").chmod(0o644),
    ]
    attempts = []
    monkeypatch.setattr(
        "kvortex.tiers.keyring.parse_keys", lambda text, place: attempts.append(text) or parse_keys(text, place)
    )
    for harm in harms:
        harm()
        caplog.clear()
        attempts.clear()
        for _ in range(5):
            clock.now_s += LOOK_S
            assert ring.first()[0] == id_of("new")
            assert ring.of(id_of("nobody")) is None
        (told,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert told.startswith("the keys that were read before stay in use: ")
        assert len(attempts) <= 1
    file.chmod(0o600)
    clock.now_s += LOOK_S
    assert ring.first()[0] == id_of("other")
    caplog.clear()
    file.chmod(0o644)
    clock.now_s += LOOK_S
    assert ring.first()[0] == id_of("other")
    assert "open to others" in caplog.text  # the same again is told again


def test_keys_are_whole_while_the_file_changes_under_load(file: Path) -> None:
    """Many threads ask; none ever gets an id with the key of another, and all get the last version."""
    ring = Keyring(str(file), bytes, clock := Clock())
    expected = {id_of(name): key_of(bytes.fromhex(secret)) for name, secret in SECRETS.items()}
    ended, wrong = threading.Event(), []

    def ask() -> None:
        while not ended.is_set():
            key_id, key = ring.first()
            if expected[key_id] != key or ring.of(id_of("old")) not in (expected[id_of("old")], None):
                wrong.append(key_id)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        for number in range(200):
            write_keys(file, *(["new", "old"], ["old", "other"], ["other"])[number % 3])
            clock.now_s += LOOK_S
    finally:
        ended.set()
        for thread in threads:
            thread.join()
    assert wrong == []
    clock.now_s += LOOK_S
    assert ring.first()[0] == id_of("old")


def test_a_new_line_is_a_key_and_no_two_are_alike() -> None:
    lines = [new_key_line(f"id{number}") for number in range(3)]
    keys = parse_keys("\n".join(lines), "keys")
    assert [key.id for key in keys] == ["id0", "id1", "id2"]
    assert {len(key.secret) for key in keys} == {32}
    with pytest.raises(ConfigError, match="an id has up to 16"):
        new_key_line("two words")
