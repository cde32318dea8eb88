"""The downloader against a mirror that fails in every way that hosts do."""

import contextlib
import email.utils
import io
import itertools
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import reazonspeech_manual_dataloader as loader
import reazonspeech_manual_downloader as downloader
from tests.sandbox.mirror import MirrorServer

SCRIPT = Path(downloader.__file__)


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def write_world(root: Path, tars: dict[int, int], size: int) -> Path:
    """A mirror's files: tars with so many members of `size` random bytes, and all tsvs."""
    (root / "data").mkdir(parents=True)
    (root / "tsv").mkdir()
    rng = random.Random(0)
    lines = {}
    for index, count in tars.items():
        names = [f"{index:03x}/{rng.randbytes(6).hex()}.flac" for _ in range(count)]
        write_tar(root / "data" / f"{index:03x}.tar", {name: rng.randbytes(size) for name in names})
        lines[index] = [f"{name}\t{index} の {number} 番目\n" for number, name in enumerate(names)]
    for target, end in {"tiny": 1, "small": 12, "medium": 116, "large": 579, "all": 4096}.items():
        text = "".join(line for index in lines if index < end for line in lines[index])
        (root / "tsv" / f"{target}.tsv").write_text(text, encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """000.tar has 1 MB, the others 20 kB."""
    root = write_world(tmp_path_factory.mktemp("mirror"), dict.fromkeys((*range(1, 12), 4095), 4) | {0: 200}, 5000)
    return root


@pytest.fixture
def mirror(world):
    with MirrorServer(world) as server:
        yield server


@pytest.fixture
def data_dir(tmp_path) -> Path:
    return tmp_path / "downloads"


@pytest.fixture
def download(mirror, data_dir, monkeypatch):
    """Run the downloader on the mirror with quick retries; gives its exit status."""
    monkeypatch.setenv("REAZONSPEECH_DATA_DIR", str(data_dir))

    def run(*flags: str) -> int:
        return downloader.main(["--base_url", mirror.url, "--backoff", "0.02", *flags])

    return run


def same(path: Path, original: Path) -> bool:
    return path.read_bytes() == original.read_bytes()


def names(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()} - {
        str(path.relative_to(directory)) for path in directory.rglob(".lock")
    }


# ------------------------------------------------------------------------------------------------- what is put where


def test_the_files_come_under_the_names_that_the_original_gave(download, data_dir, world, capsys):
    assert download("--target", "small") == 0
    wanted = {"small.small.tsv", *(f"small.{index:03x}.tar" for index in range(12))}
    assert names(data_dir) == {f"small/{name}" for name in wanted}
    assert same(data_dir / "small" / "small.small.tsv", world / "tsv" / "small.tsv")
    for index in range(12):
        assert same(data_dir / "small" / f"small.{index:03x}.tar", world / "data" / f"{index:03x}.tar")
    assert capsys.readouterr().out.count("Article 30-4") == 1


def test_the_test_target_is_the_tar_that_all_leaves_out(download, data_dir, world):
    assert downloader.TARS["all"] == range(4095)
    assert download("-t", "test") == 0
    assert names(data_dir) == {"test/test.fff.tar", "test/test.all.tsv"}
    assert same(data_dir / "test" / "test.fff.tar", world / "data" / "fff.tar")


def test_a_range_has_a_directory_of_its_own_and_excludes_its_end(download, data_dir):
    assert download("-t", "all", "-s", "3", "-e", "5") == 0
    assert names(data_dir) == {"all_3_5/all.all.tsv", "all_3_5/all.003.tar", "all_3_5/all.004.tar"}
    assert download("-t", "small", "--start_que", "10") == 0
    assert {path for path in names(data_dir) if path.endswith("tar")} >= {"small_10_12/small.00b.tar"}


def test_what_is_complete_asks_nothing_of_the_network(download, mirror):
    assert download() == 0
    mirror.log.clear()
    assert download() == 0
    assert mirror.log == []


def test_what_the_original_downloaded_is_used_unless_it_stops_short(download, data_dir, mirror, world):
    (data_dir / "tiny").mkdir(parents=True)
    shutil.copy(world / "tsv" / "tiny.tsv", data_dir / "tiny" / "tiny.tiny.tsv")
    tar = data_dir / "tiny" / "tiny.000.tar"
    shutil.copy(world / "data" / "000.tar", tar)
    assert download() == 0
    assert mirror.log == []
    os.truncate(tar, 500_000)
    assert download() == 0
    assert same(tar, world / "data" / "000.tar")
    assert {request.path for request in mirror.log} == {"/data/000.tar"}


def test_files_of_another_target_are_linked_and_not_fetched(download, data_dir, mirror, capsys):
    assert download("-t", "tiny") == 0
    assert download("-t", "all", "-s", "1", "-e", "2") == 0
    mirror.log.clear()
    assert download("-t", "all", "-s", "0", "-e", "3", "--dry_run") == 0
    planned = capsys.readouterr().out
    assert "to download: 1 files" in planned
    assert "3 of 4 files found here or in another target's directory\n" in planned
    assert download("-t", "all", "-s", "0", "-e", "3") == 0
    assert "3 of 4 files found\n" in capsys.readouterr().out
    assert {request.path for request in mirror.log} == {"/data/002.tar"}
    assert (data_dir / "tiny" / "tiny.000.tar").samefile(data_dir / "all_0_3" / "all.000.tar")


def test_a_damaged_file_of_another_target_is_not_linked(download, data_dir, world):
    assert download("-t", "tiny") == 0
    tar = data_dir / "tiny" / "tiny.000.tar"
    content = bytearray(tar.read_bytes())
    content[1] ^= 0xFF
    tar.write_bytes(content)
    assert download("-t", "small", "-e", "1") == 0
    assert same(data_dir / "small_0_1" / "small.000.tar", world / "data" / "000.tar")


def test_the_address_and_the_directory_come_from_the_environment(mirror, data_dir, monkeypatch):
    monkeypatch.setenv("REAZONSPEECH_BASE_URL", mirror.url + "/")
    monkeypatch.setenv("REAZONSPEECH_DATA_DIR", str(data_dir))
    assert downloader.main([]) == 0
    assert names(data_dir) == {"tiny/tiny.000.tar", "tiny/tiny.tiny.tsv"}


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["-t", "huge"], "--target"),
        (["-s", "1"], "--start 1 --end 1: tiny needs 0 <= start < end <= 1"),
        (["-t", "small", "-s", "3", "-e", "3"], "--start 3 --end 3: small needs 0 <= start < end <= 12"),
        (["-t", "small", "-e", "13"], "--start 0 --end 13: small needs 0 <= start < end <= 12"),
        (["-t", "small", "-s", "-1"], "--start -1 --end 12"),
        (["-p", "0"], "--pool must be at least 1, not 0"),
        (["--base_url", "corpus.example"], "--base_url must begin with http:// or https://, not 'corpus.example'"),
        (["--targe", "tiny"], "--targe"),
    ],
)
def test_a_wrong_flag_is_refused_in_a_line(flags, reason, capsys):
    with pytest.raises(SystemExit) as error:
        downloader.main(flags)
    assert error.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert ": error: " in line
    assert reason in line


# -------------------------------------------------------------------------------------------- faults that pass


PASSING_FAULTS = {
    "connection lost": [{"cut_after": 300_000}],
    "connection lost at the first byte": [{"cut_after": 0}],
    "connection lost often": [{"cut_after": 70_000, "times": 12}],
    "silence": [{"stall": 30, "stall_after": 100_000}],
    "a trickle": [{"rate": 500}],
    "busy": [{"status": 503, "headers": {"Retry-After": "1"}}],
    "busy without a word": [{"status": 503, "times": 3}],
    "too many requests": [{"status": 429, "headers": {"Retry-After": "1"}}],
    "an error of the server": [{"status": 500, "times": 2}],
    "a web page with status 200": [{"html": True, "times": 2}],
    "a length that is too short": [{"wrong_length": 5120}],
    "a length that is too long": [{"wrong_length": 5_000_000}],
    "a length that is too long, always": [{"wrong_length": 5_000_000, "times": -1, "method": "GET|HEAD"}],
    "no length": [{"no_length": True}],
    "no length, and the connection lost": [{"no_length": True, "cut_after": 300_000}],
    "no length, anywhere": [{"no_length": True, "method": "GET|HEAD", "times": -1}],
    "a damaged header": [{"corrupt_at": 150}],
    "a damaged end": [{"corrupt_at": -1}],
    "ranges ignored": [{"cut_after": 300_000}, {"ignore_range": True, "times": -1}],
    "another range than asked": [{"cut_after": 300_000}, {"shift_range": 512}],
    "nothing to tell versions by": [{"cut_after": 300_000, "no_validators": True}],
    "a weak ETag": [{"cut_after": 300_000, "headers": {"ETag": 'W/"1"'}}],
    "a redirect": [{"status": 302, "headers": {"Location": "/data/000.tar"}}],
    "an error of the network in front of it": [{"status": 520}],
    "no HEAD at all": [{"method": "HEAD", "status": 501, "times": -1}],
    "no HEAD": [{"method": "HEAD", "status": 405, "times": -1}],
    "HEAD forbidden": [{"method": "HEAD", "status": 403, "times": -1}],
    "a file name of the server's": [{"headers": {"Content-Disposition": 'attachment; filename="../../../evil"'}}],
}


def patience(fault: dict) -> str:
    """Seconds of --timeout: short only where the server is to be too slow, for a busy machine is slow as well."""
    return "0.5" if fault.keys() & {"stall", "rate"} else "60"


@pytest.mark.parametrize("faults", PASSING_FAULTS.values(), ids=PASSING_FAULTS)
def test_after_a_fault_that_passes_the_bytes_are_right(faults, download, mirror, data_dir, world):
    size = (world / "data" / "000.tar").stat().st_size
    for fault in faults:
        if fault.get("corrupt_at") == -1:
            fault = {"corrupt_at": size - 1}
        mirror.fault("000.tar", **fault)
    assert download("--timeout", patience(faults[0])) == 0
    assert names(data_dir) == {"tiny/tiny.000.tar", "tiny/tiny.tiny.tsv"}
    assert same(data_dir / "tiny" / "tiny.000.tar", world / "data" / "000.tar")


@pytest.mark.parametrize("headers", [{}, {"ETag": 'W/"1"'}], ids=["by its ETag", "by its date, as its ETag is weak"])
def test_a_lost_connection_is_resumed_where_it_was_lost(headers, download, mirror, world):
    size = (world / "data" / "000.tar").stat().st_size
    mirror.fault("000.tar", cut_after=300_000, headers=headers)
    mirror.fault("000.tar", cut_after=400_000, headers=headers)
    mirror.fault("000.tar", headers=headers)
    assert download() == 0
    requests = mirror.requests("000.tar")
    assert [request.range for request in requests] == [None, "bytes=300000-", "bytes=700000-"]
    assert sum(request.sent for request in requests) == size


def test_a_rest_whose_version_the_server_does_not_say_is_taken_for_that_of_the_beginning(
    download, mirror, data_dir, world
):
    mirror.fault("000.tar", cut_after=300_000)
    mirror.fault("000.tar", cut_after=400_000, no_validators=True, ignore_if_range=True)
    assert download() == 0
    requests = mirror.requests("000.tar")
    assert [request.range for request in requests] == [None, "bytes=300000-", "bytes=700000-"]
    assert [request.status for request in requests] == [200, 206, 206]
    assert same(data_dir / "tiny" / "tiny.000.tar", world / "data" / "000.tar")


def test_a_connection_that_becomes_a_trickle_after_a_good_start_is_replaced(download, mirror, data_dir, world):
    original = world / "data" / "000.tar"
    mirror.fault("000.tar", rate=400, rate_after=original.stat().st_size - 4000)
    assert download("--timeout", "0.5") == 0
    assert len(mirror.requests("000.tar")) > 1
    assert same(data_dir / "tiny" / "tiny.000.tar", original)


def test_a_file_that_changed_since_is_not_stitched(download, mirror, data_dir, tmp_path):
    mirror.root = write_world(tmp_path / "changing", {0: 100}, 5000)
    tar = mirror.root / "data" / "000.tar"
    mirror.fault("000.tar", cut_after=300_000)
    assert download("--retries", "0") == 1
    assert (data_dir / "tiny" / "tiny.000.tar.part").read_bytes() == tar.read_bytes()[:300_000]
    write_tar(tar, {"000/new.flac": bytes(random.Random(1).randbytes(400_000))})
    assert download() == 0
    assert same(data_dir / "tiny" / "tiny.000.tar", tar)


def test_a_server_that_ignores_if_range_can_not_stitch_either(download, mirror, data_dir, tmp_path):
    mirror.root = write_world(tmp_path / "changing", {0: 100}, 5000)
    tar = mirror.root / "data" / "000.tar"
    mirror.fault("000.tar", cut_after=300_000)
    assert download("--retries", "0") == 1
    mirror.fault("000.tar", ignore_if_range=True)
    write_tar(tar, {"000/new.flac": bytes(random.Random(1).randbytes(400_000))})
    assert download() == 0
    assert same(data_dir / "tiny" / "tiny.000.tar", tar)
    assert [request.status for request in mirror.requests("000.tar")] == [200, 206, 200]


def test_more_bytes_than_the_file_has_by_now_are_thrown_away(download, mirror, data_dir, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    mirror.root = write_world(tmp_path / "shrinking", {0: 100}, 5000)
    tar = mirror.root / "data" / "000.tar"
    mirror.fault("000.tar", cut_after=300_000)
    assert download("--retries", "0") == 1
    write_tar(tar, {"000/new.flac": bytes(random.Random(1).randbytes(100_000))})
    size = tar.stat().st_size
    mirror.fault("000.tar", ignore_if_range=True, times=-1)
    assert download() == 0
    assert [request.status for request in mirror.requests("000.tar")] == [200, 416, 200]
    assert f"300,000 bytes were received, but the server states a length of {size}" in caplog.text
    assert same(data_dir / "tiny" / "tiny.000.tar", tar)


def test_the_progress_bar_ends_at_the_bytes_of_all_files_whatever_was_thrown_away(download, mirror, world, monkeypatch):
    bars = []

    class KeptBar(downloader.ProgressBar):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            if options.get("unit") == "B":
                bars.append(self)

    monkeypatch.setattr(downloader, "ProgressBar", KeptBar)
    sizes = [(world / name).stat().st_size for name in ("tsv/tiny.tsv", "data/000.tar")]
    mirror.fault("000.tar", corrupt_at=sizes[1] - 1)
    mirror.fault("000.tar", cut_after=300_000)
    mirror.fault("000.tar", ignore_range=True)
    assert download() == 0
    assert [request.status for request in mirror.requests("000.tar")] == [200, 200, 200]
    (bar,) = bars
    assert bar.n == bar.total == sum(sizes)


def test_the_wait_that_a_server_asks_for_is_kept(download, mirror):
    mirror.fault("000.tar", status=503, headers={"Retry-After": "2"})
    started = time.monotonic()
    assert download() == 0
    assert time.monotonic() - started >= 2


def test_an_outage_of_a_thousand_tries_is_outlasted(download, mirror, data_dir, world):
    mirror.fault("000.tar", status=503, times=1050)
    assert download("--backoff", "0", "--retries", "2000") == 0
    assert same(data_dir / "tiny" / "tiny.000.tar", world / "data" / "000.tar")


def test_retry_after_is_a_number_or_a_date():
    assert downloader.retry_after("120") == 120
    assert downloader.retry_after(email.utils.formatdate(time.time() + 60, usegmt=True)) == pytest.approx(60, abs=2)
    assert downloader.retry_after("") == 0
    assert downloader.retry_after("soon") == 0


# --------------------------------------------------------------------------------------------- faults that stay


LASTING_FAULTS = {
    "absent": ({"status": 404, "method": "GET|HEAD"}, "404 Not Found", 0),
    "forbidden": ({"status": 403, "method": "GET|HEAD"}, "403 Forbidden", 1),
    "too many requests": ({"status": 429}, "429 Too Many Requests (gave up after 3 attempts)", 3),
    "broken": ({"status": 503}, "503 Service Unavailable (gave up after 3 attempts)", 3),
    "a web page": ({"html": True}, "a web page instead of the file (gave up after 3 attempts)", 3),
    "damaged": ({"corrupt_at": 150}, "damaged: not a tar", 2),
    "damaged further on": ({"corrupt_at": 512 + 5120 + 150}, "damaged: no tar header at byte 5,632", 2),
    "cut short": ({"wrong_length": 102_400, "method": "GET|HEAD"}, "damaged: cut short after 102,400 bytes", 2),
    "lost again and again": ({"cut_after": 10_000, "ignore_range": True}, "10000 bytes read", 3),
    "lost without a length": (
        {"cut_after": 10_000, "ignore_range": True, "no_length": True},
        "connection lost at 10,000 of 1,",
        3,
    ),
    "silent": ({"stall": 30}, "timed out (gave up after 3 attempts)", 3),
    "a trickle": ({"rate": 300}, "only", 3),
    "compressed": ({"headers": {"Content-Encoding": "gzip"}}, "encoding that was not requested", 1),
}


@pytest.mark.parametrize(("fault", "reason", "tries"), LASTING_FAULTS.values(), ids=LASTING_FAULTS)
def test_a_fault_that_stays_ends_after_a_few_tries_and_is_named(
    fault, reason, tries, download, mirror, data_dir, world, capsys
):
    mirror.fault("000.tar", times=-1, **fault)
    assert download("--retries", "2", "-t", "small", "-e", "3", "--timeout", patience(fault)) == 1
    failed = [line for line in capsys.readouterr().err.splitlines() if line.startswith("failed: ")]
    assert len(failed) == 1
    assert failed[0].startswith("failed: small.000.tar: ")
    assert reason in failed[0]
    assert len(mirror.requests("000.tar")) == tries
    assert same(data_dir / "small_0_3" / "small.001.tar", world / "data" / "001.tar")
    assert same(data_dir / "small_0_3" / "small.002.tar", world / "data" / "002.tar")
    assert not (data_dir / "small_0_3" / "small.000.tar").exists()
    mirror.faults.clear()
    assert download("-t", "small", "-e", "3") == 0
    assert same(data_dir / "small_0_3" / "small.000.tar", world / "data" / "000.tar")


def test_bytes_that_are_lost_again_are_no_progress(download, mirror):
    for _ in range(5):
        mirror.fault("000.tar", cut_after=300_000)
        mirror.fault("000.tar", ignore_if_range=True, headers={"ETag": '"of another version"'})
    assert download("--retries", "2") == 1
    assert [request.status for request in mirror.requests("000.tar")] == [200, 206, 200]


def test_a_host_that_is_gone_is_known_at_once_and_the_remedy_is_named(download, mirror, data_dir):
    mirror.stop()
    with pytest.raises(SystemExit, match=r"Connection refused .*--base_url"):
        download("-t", "small", "--retries", "2")
    assert names(data_dir) == set()


def test_a_web_page_is_no_list_of_transcriptions(download, mirror, data_dir):
    mirror.root = Path(tempfile.mkdtemp(dir=data_dir.parent))
    write_world(mirror.root / "x", {0: 1}, 100)
    mirror.root = mirror.root / "x"
    (mirror.root / "tsv" / "tiny.tsv").write_text("<html>moved</html>")
    assert download() == 1
    assert names(data_dir) == {"tiny/tiny.000.tar"}


# ------------------------------------------------------------------------------------------------- TLS and addresses


@pytest.fixture(scope="module")
def certificate(tmp_path_factory) -> Path:
    """A certificate for 127.0.0.1 that nobody vouches for, with its key."""
    path = tmp_path_factory.mktemp("tls") / "mirror.pem"
    key = path.with_name("key.pem")
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=mirror -addext subjectAltName=IP:127.0.0.1"
    subprocess.run([*command.split(), "-keyout", key, "-out", path], check=True, capture_output=True)
    path.write_bytes(path.read_bytes() + key.read_bytes())
    return path


@pytest.mark.parametrize("setting", ["", None])
def test_a_host_that_can_not_prove_who_it_is_gets_no_request(
    world, certificate, data_dir, monkeypatch, setting, capsys
):
    if setting is not None:
        monkeypatch.setenv("CURL_CA_BUNDLE", setting)
    with MirrorServer(world, certificate=certificate) as mirror:
        flags = ["--base_url", mirror.url, "--data_dir", str(data_dir)]
        assert downloader.main(flags) == 1
        assert mirror.log == []
        assert capsys.readouterr().err.count("certificate verify failed") == 2
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
        assert downloader.main(flags) == 0


def test_a_safe_host_can_not_lead_to_an_unsafe_one(mirror, world, certificate, data_dir, monkeypatch, capsys):
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
    with MirrorServer(world, certificate=certificate) as safe:
        safe.fault("000", status=302, method="GET|HEAD", times=-1, headers={"Location": f"{mirror.url}/data/000.tar"})
        assert downloader.main(["--base_url", safe.url, "--data_dir", str(data_dir)]) == 1
    assert "failed: tiny.000.tar: the server redirects from https to http:" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- plan, disk, memory


def test_a_dry_run_says_what_is_to_come_and_fetches_nothing(download, mirror, data_dir, world, capsys):
    size = (
        sum(path.stat().st_size for path in (world / "data").glob("00*.tar")) + (world / "tsv/small.tsv").stat().st_size
    )
    assert download("-t", "small", "--dry_run") == 0
    output = capsys.readouterr().out
    assert f"to download: 13 files, {size / 1e9:,.3f} GB (0.000 GB already received)" in output
    free = float(re.search(r"free on the disk: ([\d,.]+) GB", output)[1].replace(",", ""))
    assert free == pytest.approx(shutil.disk_usage(data_dir.parent).free / 1e9, rel=0.1)
    assert re.search(r"time: about 0:\d\d:\d\d over one connection, at [\d,.]+ MB/s", output)
    [sample] = mirror.requests(method="GET")
    assert sample.range == f"bytes=0-{downloader.SAMPLE - 1}"
    assert not data_dir.exists()


def test_the_rate_of_a_dry_run_is_that_of_a_tar_and_not_of_the_small_list(download, mirror):
    assert download("-t", "small", "-s", "2", "-e", "5", "--dry_run") == 0
    assert [request.path for request in mirror.requests(method="GET")] == ["/data/004.tar"]


@pytest.mark.parametrize("flags", [["--dry_run", "False"], ["--dry_run"], ["--dry_run", "True"]])
def test_what_can_not_fit_is_refused_before_anything_is_fetched(download, mirror, flags):
    mirror.fault("000.tar", method="HEAD", wrong_length=10**16, times=-1)
    with pytest.raises(SystemExit, match=r"too small; free some space, choose another --data_dir"):
        download(*flags)
    assert mirror.requests(method="GET") == []


def test_what_was_received_needs_no_room_any_more(download, mirror, world, monkeypatch):
    mirror.fault("000.tar", cut_after=300_000)
    assert download("--retries", "0") == 1
    room = (world / "data" / "000.tar").stat().st_size - 300_000 + downloader.SPARE
    disk = shutil.disk_usage(world)
    for free in (room - 1, room):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: disk._replace(free=free))
        if free < room:
            with pytest.raises(SystemExit, match="too small"):
                download()
    assert download() == 0


def command(mirror: MirrorServer, data_dir: Path, *flags: str) -> list[str]:
    options = ["--base_url", mirror.url, "--data_dir", str(data_dir), "--backoff", "0.05"]
    return [sys.executable, str(SCRIPT), *options, *flags]


def test_a_full_disk_ends_the_run_in_a_line_and_what_came_is_kept(mirror, data_dir, world):
    limit = ["bash", "-c", 'ulimit -f 400; exec "$@"', "-"]  # blocks of 1 kB a file
    mirror.fault("tsv", stall=300)  # nobody waits for what hangs
    ended = subprocess.run([*limit, *command(mirror, data_dir)], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1
    assert "File too large; partial files are kept" in ended.stderr.splitlines()[-1]
    assert "Traceback" not in ended.stderr
    assert (data_dir / "tiny" / "tiny.000.tar.part").stat().st_size == 400 * 1024
    assert subprocess.run(command(mirror, data_dir), capture_output=True).returncode == 0
    assert same(data_dir / "tiny" / "tiny.000.tar", world / "data" / "000.tar")
    assert mirror.requests("000.tar")[-1].range == "bytes=409600-"


def test_a_place_that_is_none_is_named(mirror, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match=r"cannot write to .*"):
        downloader.main(["--base_url", mirror.url, "--data_dir", str(tmp_path / "file")])


def test_the_rate_limit_is_for_all_files_together(download):
    started = time.monotonic()
    assert download("-t", "small", "--rate_limit", "1") == 0
    assert 1.2 < time.monotonic() - started < 30  # 1.3 MB


def peak_memory(arguments: list[str]) -> int:
    """Bytes, at most, that a command had in memory."""
    code = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL); "
    code += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)"
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_memory_does_not_grow_with_the_file(mirror, data_dir, tmp_path):
    small = peak_memory(command(mirror, data_dir))
    root = tmp_path / "big"
    write_world(root, {0: 1}, 1)
    with open(root / "data" / "000.tar", "wb") as file:  # one member of 150 MB, holes on this disk
        info = tarfile.TarInfo("000/0.flac")
        info.size = 150_000_128
        file.write(info.tobuf())
        file.truncate(512 + -(-info.size // 512) * 512 + 1024)
    mirror.root = root
    big = peak_memory(command(mirror, tmp_path / "big_downloads"))
    assert big - small < 30e6


def test_a_hundred_downloads_run_at_once(mirror, data_dir, tmp_path):
    mirror.root = write_world(tmp_path / "many", dict.fromkeys(range(116), 2), 1000)
    mirror.fault("tar", delay=2, times=-1)
    assert downloader.main(["--base_url", mirror.url, "--data_dir", str(data_dir), "-t", "medium", "-p", "100"]) == 0
    assert mirror.most_connections >= 90
    for index in range(116):
        assert same(data_dir / "medium" / f"medium.{index:03x}.tar", mirror.root / "data" / f"{index:03x}.tar")


# ------------------------------------------------------------------------------------------- interruptions, two runs


def wait_for(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "in vain"
        time.sleep(0.01)


def test_after_kill_9_the_same_command_goes_on(mirror, data_dir, world):
    mirror.fault("000.tar", stall=30, stall_after=640_000)
    process = subprocess.Popen(command(mirror, data_dir), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    part = data_dir / "tiny" / "tiny.000.tar.part"
    wait_for(lambda: part.exists() and part.stat().st_size == 640_000)
    process.kill()
    process.wait()
    assert part.read_bytes() == (world / "data" / "000.tar").read_bytes()[:640_000]
    mirror.log.clear()
    assert subprocess.run(command(mirror, data_dir), capture_output=True).returncode == 0
    assert [request.range for request in mirror.requests("000.tar")] == ["bytes=640000-"]
    assert same(data_dir / "tiny" / "tiny.000.tar", world / "data" / "000.tar")
    assert names(data_dir) == {"tiny/tiny.000.tar", "tiny/tiny.tiny.tsv"}


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_while_everything_hangs_and_every_part_is_resumable(mirror, data_dir, world, number, status):
    mirror.fault("tar", stall=300, stall_after=10_000, times=-1)
    arguments = command(mirror, data_dir, "-t", "small", "-p", "100")
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: len([1 for p in data_dir.rglob("*.part") if p.stat().st_size == 10_000]) == 12)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == status
    assert "Traceback" not in errors
    mirror.faults.clear()
    mirror.log.clear()
    assert subprocess.run(arguments, capture_output=True).returncode == 0
    assert {request.range for request in mirror.requests("tar")} == {"bytes=10000-"}
    for index in range(12):
        assert same(data_dir / "small" / f"small.{index:03x}.tar", world / "data" / f"{index:03x}.tar")


def test_a_run_that_is_stopped_makes_no_further_attempt(data_dir):
    run = downloader.Run(downloader.parse_args(["--data_dir", str(data_dir), "--backoff", "60"]))
    attempts = []

    def lose_connection(file, run) -> None:
        attempts.append(file)
        run.stopped.set()
        raise downloader.TryAgainError("connection lost")

    file = downloader.CorpusFile("http://127.0.0.1/000.tar", data_dir / "000.tar")
    with pytest.raises(downloader.GiveUpError, match="stopped"):
        downloader.retry(lose_connection, file, run)
    assert attempts == [file]


def test_two_runs_at_once_fetch_every_file_once(mirror, data_dir, world):
    mirror.fault("tar", rate=2_000_000, times=-1)
    runs = [
        subprocess.Popen(command(mirror, data_dir, "-t", "small"), stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    errors = [run.communicate(timeout=60)[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    assert sum("another run is writing" in error for error in errors) == 1
    assert sorted(request.path for request in mirror.requests("tar")) == [f"/data/{i:03x}.tar" for i in range(12)]
    for index in range(12):
        assert same(data_dir / "small" / f"small.{index:03x}.tar", world / "data" / f"{index:03x}.tar")


# ------------------------------------------------------------------------------------------------------ what is a tar


def truncated(content: bytes) -> bytes:
    return content[:300_032]


def changed_header(content: bytes) -> bytes:
    return content[:5_732] + bytes([content[5_732] ^ 1]) + content[5_733:]


def zeros_at_the_end(content: bytes) -> bytes:
    """What a power cut leaves: the length is there, the bytes are not."""
    return content[:400_000] + bytes(len(content) - 400_000)


def zeros_and_megabytes(content: bytes) -> bytes:
    return content + bytes(2 << 20)


def page(_: bytes) -> bytes:
    return b"<!DOCTYPE html><html>moved</html>" * 100


@pytest.mark.parametrize(
    "damage", [truncated, changed_header, zeros_at_the_end, zeros_and_megabytes, page, lambda _: b""]
)
def test_the_health_check_names_and_removes_damage_so_that_just_that_is_fetched(
    damage, download, mirror, data_dir, world, capsys
):
    assert download("-t", "small") == 0
    assert download("-t", "small", "--health_check") == 0
    assert "13 files intact, 0 removed, 0 missing" in capsys.readouterr().out
    tar = data_dir / "small" / "small.000.tar"
    tar.write_bytes(damage(tar.read_bytes()))
    before = names(data_dir)
    assert download("-t", "small", "--health_check") == 1
    output = capsys.readouterr().out
    assert output.startswith("removed small.000.tar: ")
    assert "12 files intact, 1 removed, 0 missing" in output
    assert names(data_dir) == before - {"small/small.000.tar"}
    mirror.log.clear()
    assert download("-t", "small") == 0
    assert {request.path for request in mirror.log} == {"/data/000.tar"}
    assert same(tar, world / "data" / "000.tar")


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_every_truncation_and_every_changed_header_is_noticed(data):
    members = data.draw(st.lists(st.binary(max_size=1500), min_size=1, max_size=5))
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "x.tar"
        write_tar(path, {f"000/{i}.flac": content for i, content in enumerate(members)})
        downloader.check_tar(path)
        content = bytearray(path.read_bytes())
        starts = [0]
        for member in members:
            starts.append(starts[-1] + 512 + -(-len(member) // 512) * 512)
        path.write_bytes(content[: data.draw(st.integers(0, starts[-1]))])
        with pytest.raises(ValueError, match=r"cut short|not a tar|no tar header"):
            downloader.check_tar(path)
        # Of the checksum's eight bytes only the digits count: no reader minds a zero or a space about them.
        place = data.draw(st.integers(0, 511).filter(lambda byte: byte not in (148, 154, 155)))
        at = data.draw(st.sampled_from(starts[:-1])) + place
        content[at] ^= 1 << data.draw(st.integers(0, 6))
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"not a tar|no tar header"):
            downloader.check_tar(path)


@pytest.mark.parametrize("style", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_usual_kind_of_tar_is_one(tmp_path, style):
    with tarfile.open(tmp_path / "x.tar", "w", format=style) as tar:
        for name in ["./000", "000/日本語.flac", "000/" + "a" * 90 + ".flac"]:
            info = tarfile.TarInfo(name)
            info.type, info.mtime = (tarfile.DIRTYPE if name == "./000" else tarfile.REGTYPE), 0.5
            tar.addfile(info)
    downloader.check_tar(tmp_path / "x.tar")


def hostile(kind: str, path: Path) -> None:
    """A tar with a sound clip and something that would like to be elsewhere."""
    info = tarfile.TarInfo("000/bad.flac")
    content = b""
    if kind == "absolute":
        info.name, content = str(path.parent / "absolute"), b"evil"
    elif kind == "parent":
        info.name, content = "../../../parent", b"evil"
    elif kind == "link":
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
    elif kind == "hard link":
        info.type, info.linkname = tarfile.LNKTYPE, "/etc/passwd"
    elif kind == "device":
        info.type, info.devmajor, info.devminor = tarfile.CHRTYPE, 1, 3
    elif kind == "larger than declared":
        content = b"evil" * 1000
    elif kind == "larger than the tar":
        info.size = 1 << 50
    elif kind == "a negative size":
        info.size = -512
    if kind not in ("larger than the tar", "a negative size"):
        info.size = 100 if kind == "larger than declared" else len(content)
    good = tarfile.TarInfo("000/good.flac")
    good.size = 4
    with open(path, "wb") as file:
        for member, data in ((good, b"good"), (info, content)):
            file.write(member.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512))
        file.write(bytes(1024))


HOSTILE = ["absolute", "parent", "link", "hard link", "device"]
IMPOSSIBLE = ["larger than declared", "larger than the tar", "a negative size"]


@pytest.mark.parametrize("kind", HOSTILE + IMPOSSIBLE)
def test_a_hostile_tar_reaches_nothing(kind, download, mirror, data_dir, tmp_path, capsys):
    mirror.root = write_world(tmp_path / "hostile", {0: 1}, 100)
    hostile(kind, mirror.root / "data" / "000.tar")
    (mirror.root / "tsv" / "tiny.tsv").write_text("000/good.flac\tよい\n000/bad.flac\tわるい\n", encoding="utf-8")
    before = names(tmp_path)
    if kind in IMPOSSIBLE:
        assert download() == 1
        assert "failed: tiny.000.tar: the downloaded file is damaged" in capsys.readouterr().err
        return
    assert download() == 0
    assert download("--health_check") == 0
    assert names(tmp_path) - before == {"downloads/tiny/tiny.000.tar", "downloads/tiny/tiny.tiny.tsv"}
    problems = loader.collections.defaultdict(list)
    (job,) = loader.list_jobs(loader.find_corpus("tiny"), problems)
    rows = list(loader.read_tar(job, problems))
    assert [(row["name"], row["audio"]["bytes"]) for row in rows] == [("000/good.flac", b"good")]


# ----------------------------------------------------------------------------------------------------------- ranges


@settings(max_examples=5, deadline=None)
@given(cuts=st.sets(st.integers(1, 11)))
def test_any_split_into_ranges_gives_the_clips_of_one_run(world, cuts):
    def clips(data_dir: Path) -> list[tuple]:
        corpus, problems = loader.find_corpus("small", str(data_dir)), loader.collections.defaultdict(list)
        rows = [row for job in loader.list_jobs(corpus, problems) for row in loader.read_tar(job, problems)]
        assert not any(problems.values())
        return [(row["name"], row["audio"]["bytes"], row["transcription"]) for row in rows]

    bounds = [0, *sorted(cuts), 12]
    with MirrorServer(world) as mirror, tempfile.TemporaryDirectory() as directory:
        once, split = Path(directory) / "once", Path(directory) / "split"
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            assert downloader.main(["--base_url", mirror.url, "--data_dir", str(once), "-t", "small"]) == 0
            for start, end in itertools.pairwise(bounds):
                flags = ["--base_url", mirror.url, "--data_dir", str(split), "-t", "small"]
                assert downloader.main([*flags, "-s", str(start), "-e", str(end)]) == 0
        assert clips(split) == clips(once)
        assert len(clips(once)) == 244
