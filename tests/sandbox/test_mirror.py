"""The mirror answers as a plain file host does, and fails as it is told, as seen by `requests`."""

import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests
import urllib3

from tests.sandbox.mirror import MirrorServer

CONTENT = bytes(range(256)) * 1000


@pytest.fixture
def mirror(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "000.tar").write_bytes(CONTENT)
    (tmp_path.parent / "secret").write_bytes(b"secret")
    with MirrorServer(tmp_path) as server:
        server.tar = f"{server.url}/data/000.tar"
        yield server


def test_a_file_comes_whole_with_length_and_validators(mirror):
    answer = requests.get(mirror.tar)
    assert answer.content == CONTENT
    assert answer.headers["Content-Length"] == str(len(CONTENT))
    assert answer.headers["ETag"].startswith('"')
    assert "GMT" in answer.headers["Last-Modified"]
    head = requests.head(mirror.tar)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["ETag"] == answer.headers["ETag"]
    assert [(request.method, request.status, request.sent) for request in mirror.log] == [
        ("GET", 200, len(CONTENT)),
        ("HEAD", 200, 0),
    ]


@pytest.mark.parametrize(
    ("asked", "start", "end"),
    [("0-99", 0, 100), ("100-", 100, 256000), ("-10", 255990, 256000), ("255999-400000", 255999, 256000)],
)
def test_a_range_comes_as_asked(mirror, asked, start, end):
    answer = requests.get(mirror.tar, headers={"Range": f"bytes={asked}"})
    assert answer.status_code == 206
    assert answer.content == CONTENT[start:end]
    assert answer.headers["Content-Range"] == f"bytes {start}-{end - 1}/256000"


def test_a_range_behind_the_end_is_refused(mirror):
    answer = requests.get(mirror.tar, headers={"Range": "bytes=256000-"})
    assert (answer.status_code, answer.headers["Content-Range"]) == (416, "bytes */256000")


def test_if_range_gives_the_whole_file_when_the_file_is_another(mirror):
    etag = requests.head(mirror.tar).headers["ETag"]
    assert requests.get(mirror.tar, headers={"Range": "bytes=5-", "If-Range": etag}).status_code == 206
    (mirror.root / "data" / "000.tar").write_bytes(CONTENT[::-1])
    answer = requests.get(mirror.tar, headers={"Range": "bytes=5-", "If-Range": etag})
    assert (answer.status_code, answer.content) == (200, CONTENT[::-1])


def test_nothing_outside_the_root_is_served(mirror):
    with socket.create_connection(mirror.server_address) as connection:
        connection.sendall(b"GET /../secret HTTP/1.0\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 404")
    assert requests.get(f"{mirror.url}/data").status_code == 404


def test_a_connection_is_kept_for_many_requests(mirror):
    with requests.Session() as session:
        for _ in range(5):
            assert session.get(mirror.tar).content == CONTENT
        assert session.get(f"{mirror.url}/absent").status_code == 404
        assert session.get(mirror.tar).content == CONTENT
    assert mirror.most_connections == 1


def test_many_are_served_at_once(mirror):
    mirror.fault("tar", times=-1, delay=0.5)
    with ThreadPoolExecutor(40) as threads:
        answers = list(threads.map(requests.get, [mirror.tar] * 40))
    assert all(answer.content == CONTENT for answer in answers)
    assert mirror.most_connections > 10


def test_it_listens_on_this_machine_alone(mirror):
    assert mirror.server_address[0] == "127.0.0.1"


def test_a_fault_is_due_so_many_times_after_so_many(mirror):
    mirror.fault("tar", status=503, skip=1, times=2, headers={"Retry-After": "7"})
    answers = [requests.get(mirror.tar) for _ in range(4)]
    assert [answer.status_code for answer in answers] == [200, 503, 503, 200]
    assert answers[1].headers["Retry-After"] == "7"
    assert requests.get(f"{mirror.url}/data/001.tar").status_code == 404


def test_a_connection_is_lost_at_the_byte_that_was_said(mirror):
    mirror.fault("tar", cut_after=100_001)
    came = b""
    with pytest.raises(urllib3.exceptions.ProtocolError), requests.get(mirror.tar, stream=True) as answer:
        while block := answer.raw.read1(1 << 16):
            came += block
    assert came == CONTENT[:100_001]


def test_the_other_faults_do_what_they_say(mirror):
    mirror.fault("tar", corrupt_at=70_000)
    content = requests.get(mirror.tar, headers={"Range": "bytes=69999-70001"}).content
    assert content == bytes([CONTENT[69_999], CONTENT[70_000] ^ 0xFF, CONTENT[70_001]])

    mirror.fault("tar", ignore_range=True)
    assert requests.get(mirror.tar, headers={"Range": "bytes=5-"}).content == CONTENT

    mirror.fault("tar", shift_range=3)
    assert requests.get(mirror.tar, headers={"Range": "bytes=5-"}).headers["Content-Range"].startswith("bytes 8-")

    mirror.fault("tar", wrong_length=50)
    assert requests.get(mirror.tar).content == CONTENT[:50]
    mirror.fault("tar", wrong_length=len(CONTENT) + 1)
    with pytest.raises(requests.RequestException):
        requests.get(mirror.tar)

    mirror.fault("tar", no_length=True, no_validators=True)
    answer = requests.get(mirror.tar)
    assert answer.content == CONTENT
    assert not {"Content-Length", "ETag", "Last-Modified"} & set(answer.headers)

    mirror.fault("tar", html=True)
    answer = requests.get(mirror.tar)
    assert (answer.status_code, answer.headers["Content-Type"][:9]) == (200, "text/html")

    mirror.fault("tar", stall=30, stall_after=1000)
    with pytest.raises(requests.RequestException):
        requests.get(mirror.tar, timeout=0.2)

    mirror.fault("tar", rate=512_000)
    started = time.monotonic()
    assert requests.get(mirror.tar).content == CONTENT
    assert time.monotonic() - started > 0.4


def test_stopping_ends_the_connections(mirror):
    with requests.Session() as session:
        session.get(mirror.tar)
        mirror.stop()
        with pytest.raises(requests.ConnectionError):
            session.get(mirror.tar)
