"""The loader over tars and a tsv: as a builder, as the next stage imports it, and as a script."""

import collections
import hashlib
import importlib.util
import inspect
import io
import itertools
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import tracemalloc
from array import array
from pathlib import Path

import datasets
import huggingface_hub
import pyarrow.parquet as pq
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

import reazonspeech_manual_dataloader as loader

SCRIPT = Path(loader.__file__)
AUDIO = datasets.Audio(sampling_rate=16000, decode=False)


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def write_download(directory: Path, target: str, tars: dict[int, list[tuple[str, bytes]]], lines: list[str]) -> None:
    """What the downloader leaves: tars with (name, content) pairs, and the tsv's lines."""
    directory.mkdir(parents=True)
    for index, members in tars.items():
        write_tar(directory / f"{target}.{index:03x}.tar", members)
    text = "".join(f"{line}\n" for line in lines)
    (directory / f"{target}.{target}.tsv").write_text(text, encoding="utf-8", newline="")


def random_corpus(tars: int, clips: int, size: int = 300) -> tuple[dict, list[str]]:
    """Members by tar, in an order that is not that of the names, and the lines of the tsv, which is."""
    rng = random.Random(0)
    members = {
        index: [(f"{index:03x}/{rng.randbytes(6).hex()}.flac", rng.randbytes(size)) for _ in range(clips)]
        for index in range(tars)
    }
    return members, sorted(f"{name}\t{name} の文" for pairs in members.values() for name, _ in pairs)


@pytest.fixture
def data_dir(tmp_path, monkeypatch) -> Path:
    path = tmp_path / "downloads"
    monkeypatch.setenv("REAZONSPEECH_DATA_DIR", str(path))
    return path


@pytest.fixture
def tiny(data_dir, corpus) -> Path:
    """The sandbox's corpus, downloaded."""
    for target, tsv, tar in (("tiny", "tiny", "000"), ("test", "all", "fff")):
        (data_dir / target).mkdir(parents=True)
        os.link(corpus / "tsv" / f"{tsv}.tsv", data_dir / target / f"{target}.{tsv}.tsv")
        os.link(corpus / "data" / f"{tar}.tar", data_dir / target / f"{target}.{tar}.tar")
    return data_dir / "tiny"


@pytest.fixture
def small(data_dir) -> Path:
    """Twelve tars of seven clips."""
    write_download(data_dir / "small", "small", *random_corpus(12, 7))
    return data_dir / "small"


def load(config: str, cache: Path, num_proc: int | None = None, **config_kwargs) -> datasets.Dataset:
    """Load a configuration as the next stage does, from the file's path."""
    spec = importlib.util.spec_from_file_location("a_loader_by_path", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # `datasets` imports a builder's module by its name
    spec.loader.exec_module(module)
    (builder_class,) = [
        value
        for value in vars(module).values()
        if inspect.isclass(value)
        and issubclass(value, datasets.GeneratorBasedBuilder)
        and value.__module__ == module.__name__
    ]
    builder = builder_class(config_name=config, cache_dir=str(cache), **config_kwargs)
    builder.download_and_prepare(num_proc=num_proc)
    dataset = builder.as_dataset(split="test" if config == "test" else "train")
    return dataset.cast_column("audio", AUDIO)


def rows(dataset) -> list[tuple[str, bytes, str]]:
    return [(row["name"], row["audio"]["bytes"], row["transcription"]) for row in dataset]


def digests(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.glob("*.parquet")}


# ------------------------------------------------------------------------------------------------------- the builder


def test_the_rows_are_the_clips_of_the_tar_with_their_own_bytes(tiny, clips, tmp_path):
    dataset = load("tiny", tmp_path)
    assert dataset.column_names == ["name", "audio", "transcription"]
    assert dataset.features["audio"] == AUDIO
    assert rows(dataset) == [(clip["name"], clip["audio"], clip["transcription"]) for clip in clips]
    assert [row["audio"]["path"] for row in dataset] == [clip["name"] for clip in clips]
    assert soundfile.info(io.BytesIO(dataset[0]["audio"]["bytes"])).samplerate == 16000


def test_the_test_configuration_has_a_test_split(tiny, corpus, tmp_path):
    dataset = load("test", tmp_path)
    assert len(dataset) == 8
    assert all(name.startswith("fff/") for name in dataset["name"])


def test_order_and_content_do_not_depend_on_the_number_of_processes(small, tmp_path):
    members, lines = random_corpus(12, 7)
    texts = dict(line.split("\t") for line in lines)
    expected = [(name, content, texts[name]) for pairs in members.values() for name, content in pairs]
    for num_proc in (None, 2, 5):
        assert rows(load("small", tmp_path / f"{num_proc}", num_proc)) == expected


def test_a_tar_that_is_added_or_replaced_later_is_noticed(small, tmp_path):
    last = small / "small.00b.tar"
    content = last.read_bytes()
    last.unlink()
    assert len(load("small", tmp_path)) == 11 * 7
    last.write_bytes(content)
    assert len(load("small", tmp_path)) == 12 * 7
    members, _ = random_corpus(12, 7)
    write_tar(last, [(name, bytes(len(content))) for name, content in members[11]])
    assert load("small", tmp_path)[-1]["audio"]["bytes"] == bytes(300)


def test_ranges_are_loaded_one_by_one_or_all_together(data_dir, tmp_path):
    members, lines = random_corpus(12, 2)
    for start, end in ((0, 5), (5, 10), (10, 12)):
        tars = {index: members[index] for index in range(start, end)}
        write_download(data_dir / f"all_{start}_{end}", "all", tars, lines)
    middle = load("all", tmp_path, dataset_dir_suffix="5_10")
    assert {name[:3] for name in middle["name"]} == {"005", "006", "007", "008", "009"}
    names = [name for pairs in members.values() for name, _ in pairs]
    assert load("all", tmp_path, 2)["name"] == names
    assert load("all", tmp_path, data_dir=str(data_dir), dataset_dir_suffix="10_12")["name"] == names[-4:]


def test_tars_that_are_absent_are_reported(small, tmp_path, caplog):
    (small / "small.003.tar").unlink()
    load("small", tmp_path)
    assert "small: 11 of 12 tars found; missing: 003" in caplog.text


def test_what_can_not_be_used_is_left_out_counted_and_named(data_dir, tmp_path, caplog, capsys):
    clip = ("000/aaaaaaaaaaaa.flac", b"first")
    members = [
        clip,
        ("./000/bbbbbbbbbbbb.flac", b"with a dot"),
        ("000/no_text.flac", b"x"),
        ("000/empty.flac", b""),
        (clip[0], b"second"),
    ]
    lines = [
        "000/aaaaaaaaaaaa.flac\tあ",
        "000/bbbbbbbbbbbb.flac\tい",
        "000/empty.flac\tう",
        "000/no_member.flac\tえ",
        "000/aaaaaaaaaaaa.flac\tお",
        "000/no_tab.flac",
        "000/two.flac\ttabs\tin it",
        "something else",
        "",
        "001/another_tar.flac\tか",
    ]
    write_download(data_dir / "tiny", "tiny", {0: members}, lines)
    with open(data_dir / "tiny" / "tiny.tiny.tsv", "ab") as file:
        file.write(b"000/not_utf8.flac\t\xff\n")
    expected = [("000/aaaaaaaaaaaa.flac", b"first", "あ"), ("000/bbbbbbbbbbbb.flac", b"with a dot", "い")]
    problems = [
        "1 members without a transcript (000/no_text.flac)",
        "1 transcripts without a member (000/no_member.flac)",
        "1 empty clips (tiny.000.tar: 000/empty.flac)",
        "1 duplicate lines (tiny.tiny.tsv line 5: 000/aaaaaaaaaaaa.flac)",
        "1 duplicate members (tiny.000.tar byte 3584: 000/aaaaaaaaaaaa.flac)",
    ]
    assert rows(load("tiny", tmp_path)) == expected
    for problem in [
        *problems,
        "1 malformed lines (tiny.tiny.tsv line 8)",
        "3 malformed lines (tiny.tiny.tsv line 6, tiny.tiny.tsv line 7, tiny.tiny.tsv line 11)",
    ]:
        assert problem in caplog.text
    assert loader.main(["-t", "tiny"]) == 0
    output = capsys.readouterr().out
    (left_out,) = re.findall(r"left out: (.*)", output)
    for problem in [*problems, "4 malformed lines"]:
        assert problem in left_out
    assert "no audio" not in left_out
    kept = "2 clips that are no audio (000/aaaaaaaaaaaa.flac, 000/bbbbbbbbbbbb.flac)"
    assert f"not decodable, but kept: {kept}\n" in output


def test_directories_in_a_tar_are_nothing_that_is_left_out(data_dir, tmp_path, caplog):
    write_download(data_dir / "tiny", "tiny", {0: []}, ["000/a.flac\tあ"])
    with tarfile.open(data_dir / "tiny" / "tiny.000.tar", "w") as tar:
        for name, kind, content in (("./000", tarfile.DIRTYPE, b""), ("./000/a.flac", tarfile.REGTYPE, b"x")):
            info = tarfile.TarInfo(name)
            info.type, info.size = kind, len(content)
            tar.addfile(info, io.BytesIO(content))
    assert rows(load("tiny", tmp_path)) == [("000/a.flac", b"x", "あ")]
    assert "left out" not in caplog.text


def test_an_empty_transcription_stays_a_row(data_dir, tmp_path):
    write_download(data_dir / "tiny", "tiny", {0: [("000/a.flac", b"x")]}, ["000/a.flac\t"])
    assert rows(load("tiny", tmp_path)) == [("000/a.flac", b"x", "")]


def test_a_truncated_tar_is_refused_before_the_work_and_named(small, tmp_path):
    os.truncate(small / "small.004.tar", 2000)
    with pytest.raises(SystemExit, match=r"truncated: .*small\.004\.tar \(2,000 bytes\); run .*--health_check"):
        load("small", tmp_path)


@pytest.mark.parametrize("num_proc", [None, 2])
def test_a_damaged_tar_is_named_with_the_byte(small, tmp_path, num_proc):
    tar = small / "small.004.tar"
    content = bytearray(tar.read_bytes())
    content[2 * 1024 + 150] ^= 0xFF  # in the third header
    tar.write_bytes(content)
    with pytest.raises(Exception) as error:  # datasets wraps it
        load("small", tmp_path, num_proc)
    chain = f"{error.getrepr(chain=True)}"
    assert re.search(r"small\.004\.tar: byte 2,048: neither a header nor the end of the archive; run .*", chain)


def test_a_member_of_negative_size_ends_the_reading(tmp_path):
    good, bad = tarfile.TarInfo("000/good.flac"), tarfile.TarInfo("000/bad.flac")
    bad.size = -512  # which leads back to its own header
    tar = tmp_path / "x.tar"
    tar.write_bytes(good.tobuf() + bad.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    job = loader.TarJob(tar, tsv=Path(os.devnull), line_ranges=array("q"))
    with pytest.raises(loader.BrokenTarError, match=r"x\.tar: byte 512: .*; run .*--health_check"):
        list(loader.read_tar(job, collections.defaultdict(list)))


def test_nothing_here_is_a_line_that_says_how_to_get_it(data_dir, tmp_path):
    with pytest.raises(SystemExit, match=r"no medium\.\*\.tar in .*reazonspeech_manual_downloader\.py -t medium"):
        load("medium", tmp_path)
    write_download(data_dir / "tiny", "tiny", {0: []}, [])
    (data_dir / "tiny" / "tiny.tiny.tsv").unlink()
    with pytest.raises(SystemExit, match=r"no tiny\.tiny\.tsv in"):
        load("tiny", tmp_path)


def test_neither_ffmpeg_nor_torchcodec_is_loaded(tiny, tmp_path):
    code = (
        "import sys, reazonspeech_manual_dataloader as l; b = l.ReazonSpeech(sys.argv[1], config_name='tiny');"
        "b.download_and_prepare(); d = b.as_dataset(split='train');"
        "d.cast_column('audio', l.datasets.Audio(decode=False))[0];"
        "assert not {'torchcodec', 'av', 'torchaudio', 'ffmpeg'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True, cwd=SCRIPT.parent, capture_output=True)


# ----------------------------------------------------------------------------------------------- memory, any order


@settings(max_examples=40, deadline=None)
@given(order=st.permutations(range(20)), dots=st.sets(st.integers(0, 19)))
def test_the_lines_of_the_tsv_may_stand_in_any_order(order, dots):
    members, lines = random_corpus(4, 5)
    with tempfile.TemporaryDirectory() as directory:
        tsv = Path(directory) / "x.tsv"
        tsv.write_text("".join(f"{'./' if i in dots else ''}{lines[i]}\n" for i in order), encoding="utf-8")
        problems = collections.defaultdict(list)
        line_ranges = loader.locate_transcripts(tsv, [1, 3], problems)
        assert sorted(line_ranges) == [1, 3]
        for index in line_ranges:
            texts = loader.read_transcripts(tsv, line_ranges[index], problems)
            assert texts == {name: f"{name} の文" for name, _ in members[index]}
        assert not problems


def test_the_tsv_is_not_held_in_memory(tmp_path):
    tsv = tmp_path / "all.tsv"
    with open(tsv, "w", encoding="utf-8") as file:
        for index in range(200):
            file.writelines(
                f"{index:03x}/{clip:012x}.flac\tこれは長い文です。これは長い文です。\n" for clip in range(250)
            )
    assert tsv.stat().st_size > 3e6
    tracemalloc.start()
    line_ranges = loader.locate_transcripts(tsv, list(range(200)), {})
    texts = loader.read_transcripts(tsv, line_ranges[199], {})
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(texts) == 250
    assert peak < 1.5e6  # of which 1 MiB is the file's buffer


def test_one_clip_is_in_memory_at_a_time(tmp_path):
    members = [(f"000/{i}.flac", bytes(1_000_000)) for i in range(40)]
    write_download(tmp_path / "tiny", "tiny", {0: members}, [f"{name}\t文" for name, _ in members])
    del members
    problems = collections.defaultdict(list)
    (job,) = loader.list_jobs(loader.find_corpus("tiny", str(tmp_path)), problems)
    tracemalloc.start()
    count = sum(len(row["audio"]["bytes"]) for row in loader.read_tar(job, problems))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 40_000_000
    assert peak < 3e6


# -------------------------------------------------------------------------------------------------------- the script


def test_the_statistics_are_those_of_the_clips(tiny, clips, capsys):
    assert loader.main(["-t", "tiny"]) == 0
    output = capsys.readouterr().out
    lengths = [soundfile.info(io.BytesIO(clip["audio"])).duration for clip in clips]
    characters = sum(len(clip["transcription"]) for clip in clips)
    assert (
        f"24 clips, {sum(len(clip['audio']) for clip in clips) / 1e9:.3f} GB, {sum(lengths) / 3600:.2f} hours" in output
    )
    assert f"{characters} characters; left out: 1 transcripts without a member" in output or (
        f"{characters} characters; left out: 1 members without a transcript" in output
    )
    histogram = {int(low): int(n) for low, n in re.findall(r"^ *(\d+) to +\S+ s +(\d+)", output, re.MULTILINE)}
    bounds = [*loader.DURATIONS, 1e9]
    assert histogram == {
        low: sum(low <= length < high for length in lengths) for low, high in itertools.pairwise(bounds)
    }


def test_a_clip_of_whole_seconds_is_counted_from_there_and_one_that_is_no_audio_from_0(data_dir, capsys):
    five = io.BytesIO()
    soundfile.write(five, [0.0] * 80_000, 16_000, format="FLAC")
    members = [("000/five.flac", five.getvalue()), ("000/none.flac", b"x")]
    write_download(data_dir / "tiny", "tiny", {0: members}, [f"{name}\tは" for name, _ in members])
    assert loader.main(["-t", "tiny"]) == 0
    counted = re.findall(r"^ *(\d+) to +\S+ s +1 ", capsys.readouterr().out, re.MULTILINE)
    assert counted == ["0", "5"]


def test_the_written_dataset_is_the_loaded_one(tiny, clips, tmp_path):
    out = tmp_path / "out"
    assert loader.main(["-t", "tiny", "--output_dir", str(out)]) == 0
    dataset = datasets.load_dataset(str(out), "tiny", split="train", cache_dir=str(tmp_path / "cache"))
    assert dataset.features["audio"] == datasets.Audio(sampling_rate=16000)  # who loads it gets decoded audio
    assert rows(dataset.cast_column("audio", AUDIO)) == [
        (clip["name"], clip["audio"], clip["transcription"]) for clip in clips
    ]
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*") if not path.name.startswith(".")) == [
        "README.md",
        "loading.tiny.train.json",
        "tiny",
        "tiny/train-00000-of-00001.parquet",
    ]
    record = json.loads((out / "loading.tiny.train.json").read_text())
    assert (record["status"], record["clips"]) == ("complete", 24)
    assert {kind: len(places) for kind, places in record["problems"].items()} == {
        "members without a transcript": 1,
        "transcripts without a member": 1,
    }


def test_the_record_and_the_statistics_name_the_lines_that_belong_to_no_tar(data_dir, tmp_path, capsys):
    lines = ["000/clip.flac\tは", "something else", "000/no_tab.flac"]
    write_download(data_dir / "tiny", "tiny", {0: [("000/clip.flac", b"x")]}, lines)
    assert loader.main(["-t", "tiny", "--output_dir", str(tmp_path / "out")]) == 0
    record = json.loads((tmp_path / "out" / "loading.tiny.train.json").read_text())
    assert sorted(record["problems"]["malformed lines"]) == ["tiny.tiny.tsv line 2", "tiny.tiny.tsv line 3"]
    assert "left out: 2 malformed lines (" in capsys.readouterr().out


def test_the_shards_do_not_depend_on_the_number_of_processes_or_on_interruptions(small, tmp_path):
    for workers in ("1", "3"):
        out = str(tmp_path / workers)
        assert loader.main(["-t", "small", "--output_dir", out, "--preprocessing_num_workers", workers]) == 0
    one, three = tmp_path / "1" / "small", tmp_path / "3" / "small"
    assert len(digests(one)) == 12
    assert digests(one) == digests(three)
    before = {path.name: path.stat().st_mtime_ns for path in one.glob("*.parquet")}
    (one / "train-00004-of-00012.parquet").unlink()
    assert loader.main(["-t", "small", "--output_dir", str(tmp_path / "1")]) == 0
    assert digests(one) == digests(three)
    after = {path.name: path.stat().st_mtime_ns for path in one.glob("*.parquet")}
    assert {name for name in before if before[name] != after[name]} == {"train-00004-of-00012.parquet"}
    told = [json.loads((tmp_path / run / "loading.small.train.json").read_text()) for run in ("1", "3")]
    for name in ("clips", "counts", "problems"):  # of the whole dataset, not of what the last run has made
        assert told[0][name] == told[1][name]
    made = pq.ParquetFile(one / "train-00004-of-00012.parquet").metadata.num_rows
    assert round(told[0]["clips_per_second"] * told[0]["wall_seconds"]) == made < told[0]["clips"]


def test_the_record_of_a_complete_run_is_kept_when_nothing_is_left_to_do(small, tmp_path):
    records = []
    for _ in range(2):
        assert loader.main(["-t", "small", "--output_dir", str(tmp_path / "out")]) == 0
        records.append((tmp_path / "out" / "loading.small.train.json").read_text())
    assert records[1] == records[0]


def test_a_shard_that_was_damaged_is_written_anew(small, tmp_path):
    flags = ["-t", "small", "--output_dir", str(tmp_path / "out")]
    assert loader.main(flags) == 0
    before = digests(tmp_path / "out" / "small")
    os.truncate(tmp_path / "out" / "small" / "train-00004-of-00012.parquet", 1000)
    assert loader.main(flags) == 0
    assert digests(tmp_path / "out" / "small") == before


@pytest.fixture(scope="module")
def medium(tmp_path_factory) -> Path:
    """A download of forty tars, and what the script writes of it when nothing disturbs it."""
    root = tmp_path_factory.mktemp("medium")
    write_download(root / "downloads" / "medium", "medium", *random_corpus(40, 20, 30_000))
    flags = ["-t", "medium", "--data_dir", str(root / "downloads"), "--output_dir", str(root / "whole")]
    assert loader.main([*flags, "--preprocessing_num_workers", "2"]) == 0
    return root


def interrupted(arguments: list, files: Path, pattern: str, number: int) -> int:
    """Start a process, send it a signal when two such files are there; gives its exit status."""
    process = subprocess.Popen([sys.executable, *arguments], stderr=subprocess.PIPE, text=True, cwd=SCRIPT.parent)
    end = time.monotonic() + 60
    while len(list(files.rglob(pattern))) < 2:
        assert time.monotonic() < end
        time.sleep(0.001)
    process.send_signal(number)
    _, errors = process.communicate()  # until the workers, which have the same stderr, are gone as well
    assert number == signal.SIGKILL or "Traceback" not in errors  # a worker may miss who was killed
    return process.returncode


@pytest.mark.parametrize(("number", "status"), [(signal.SIGKILL, -9), (signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_after_an_end_in_the_middle_the_same_command_goes_on(medium, tmp_path, number, status):
    flags = ["-t", "medium", "--data_dir", str(medium / "downloads"), "--output_dir", str(tmp_path)]
    assert interrupted([SCRIPT, *flags], tmp_path, "*.parquet", number) == status
    shards = tmp_path / "medium"
    done = {path.name: path.stat().st_mtime_ns for path in shards.glob("*.parquet")}
    assert 2 <= len(done) < 40
    assert loader.main([*flags, "--preprocessing_num_workers", "3"]) == 0
    assert digests(shards) == digests(medium / "whole" / "medium")
    assert {name: (shards / name).stat().st_mtime_ns for name in done} == done
    assert [path.name for path in shards.iterdir() if path.name.endswith(".partial")] == []


def test_a_killed_worker_ends_the_run_in_a_line_and_the_same_command_goes_on(medium, tmp_path):
    flags = ["-t", "medium", "--data_dir", str(medium / "downloads"), "--output_dir", str(tmp_path)]
    command = [sys.executable, SCRIPT, *flags, "--preprocessing_num_workers", "2"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    try:
        while len(list(tmp_path.rglob("*.parquet"))) < 2:
            assert process.poll() is None
            time.sleep(0.001)
        workers = children.read_text().split()
        assert len(workers) == 2
        os.kill(int(workers[0]), signal.SIGKILL)  # as the kernel does when memory is short
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 1
    assert "Traceback" not in errors
    line = errors.splitlines()[-1]
    assert re.search(r"a worker process was killed.*--preprocessing_num_workers.*Run the same command again", line)
    done = len(digests(tmp_path / "medium"))
    assert 2 <= done < 40
    assert loader.main(flags) == 0
    assert digests(tmp_path / "medium") == digests(medium / "whole" / "medium")


def test_after_kill_9_the_builder_builds_anew(medium, tmp_path):
    code = f"import {loader.__name__} as l; l.ReazonSpeech(config_name='medium', data_dir='{medium}/downloads', "
    code += f"cache_dir='{tmp_path}').download_and_prepare(num_proc=2)"
    assert interrupted(["-c", code], tmp_path, "*.arrow", signal.SIGKILL) == -9
    dataset = load("medium", tmp_path, 2, data_dir=str(medium / "downloads"))
    members, _ = random_corpus(40, 20, 30_000)
    assert dataset["name"][:] == [name for pairs in members.values() for name, _ in pairs]


def test_other_files_than_those_of_the_shards_are_refused_until_told(small, tmp_path, capsys):
    flags = ["-t", "small", "--output_dir", str(tmp_path / "out")]
    last = small / "small.00b.tar"
    content = last.read_bytes()
    last.unlink()
    assert loader.main(flags) == 0
    last.write_bytes(content)
    with pytest.raises(SystemExit, match=r"loading\.small\.train\.json was made .*--overwrite_output_dir"):
        loader.main(flags)
    foreign = tmp_path / "out" / "small" / "notes.txt"
    foreign.write_text("mine")
    assert loader.main([*flags, "--overwrite_output_dir"]) == 0
    assert len(digests(tmp_path / "out" / "small")) == 12
    assert foreign.read_text() == "mine"
    os.utime(last, (1, 1))  # as if it had been rewritten
    with pytest.raises(SystemExit, match=r"00000-of-00012\.parquet was made with other settings: files was"):
        loader.main([*flags, "--dry_run"])


def test_a_broken_tar_keeps_the_others_and_no_card_promises_it(small, tmp_path):
    tar = small / "small.004.tar"
    sound = tar.read_bytes()
    tar.write_bytes(sound[:2048] + b"\1" + sound[2049:])
    out = tmp_path / "out"
    with pytest.raises(SystemExit, match=r"small\.004\.tar: byte 2,048"):
        loader.main(["-t", "small", "--output_dir", str(out)])
    assert len(digests(out / "small")) == 11
    assert not (out / "README.md").exists()
    assert json.loads((out / "loading.small.train.json").read_text())["status"] == "running"


def test_a_run_outlives_its_terminal(tiny, tmp_path):
    command = [sys.executable, loader.__file__, "-t", "tiny", "--output_dir", str(tmp_path / "out")]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    run.stdout.close()  # who reads has gone
    run.stderr.close()
    while not (tmp_path / "out" / ".tiny.lock").exists():
        assert run.poll() is None
        time.sleep(0.001)
    run.send_signal(signal.SIGHUP)
    assert run.wait() == 0
    assert json.loads((tmp_path / "out" / "loading.tiny.train.json").read_text())["status"] == "complete"


def test_a_card_keeps_the_configurations_that_it_lists(tiny, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    files = "data_files: [{split: train, path: other/train-*}]"
    card = f"---\nlanguage: ja\nconfigs:\n- config_name: other\n  {files}\n---\nMine.\n"
    (out / "README.md").write_text(card)
    for target in ("tiny", "test", "tiny"):
        assert loader.main(["-t", target, "--output_dir", str(out)]) == 0
    card = huggingface_hub.DatasetCard.load(out / "README.md")
    assert card.text.strip() == "Mine."
    assert [(entry["config_name"], entry["data_files"]) for entry in card.data["configs"]] == [
        (config, [{"split": split, "path": f"{config}/{split}-*"}])
        for config, split in (("other", "train"), ("tiny", "train"), ("test", "test"))
    ]


@pytest.mark.parametrize("flags", [["-t", "huge"], ["--push_to_hub"], ["--hub_model_id", "acme/x"], ["--output", "x"]])
def test_a_wrong_flag_is_refused_in_a_line(flags, capsys):
    with pytest.raises(SystemExit) as error:
        loader.main(flags)
    assert error.value.code == 2
    assert ": error: " in capsys.readouterr().err.splitlines()[-1]


# ----------------------------------------------------------------------------------------------------------- the Hub


def test_what_is_pushed_comes_back_the_same_and_is_private(tiny, clips, hub, tmp_path):
    for target in ("tiny", "test"):
        flags = ["-t", target, "--output_dir", str(tmp_path / target), "--hub_model_id", "acme/loader-corpus"]
        assert loader.main(flags) == 0
    dataset = datasets.load_dataset("acme/loader-corpus", "tiny", split="train", cache_dir=str(tmp_path / "cache"))
    dataset = dataset.cast_column("audio", AUDIO)
    assert rows(dataset) == [(clip["name"], clip["audio"], clip["transcription"]) for clip in clips]
    held_out = datasets.load_dataset("acme/loader-corpus", "test", split="test", cache_dir=str(tmp_path / "cache"))
    assert len(held_out) == 8
    info = huggingface_hub.HfApi().dataset_info("acme/loader-corpus")
    assert info.private
    assert {file.rfilename for file in info.siblings} - {".gitattributes"} == {
        "README.md",
        *("loading.tiny.train.json", "tiny/train-00000-of-00001.parquet"),
        *("loading.test.test.json", "test/test-00000-of-00001.parquet"),
    }


def test_a_push_that_fails_says_what_to_run_and_that_only_pushes(tiny, hub, tmp_path):
    flags = ["-t", "tiny", "--output_dir", str(tmp_path / "out"), "--hub_model_id", "acme/loader-failing"]
    hub.fault(r"/commit/", method="POST", times=-1, status=403)
    with pytest.raises(SystemExit, match=r"the push to acme/loader-failing failed: .*All data is in .*same command"):
        loader.main(flags)
    shard = tmp_path / "out" / "tiny" / "train-00000-of-00001.parquet"
    before = shard.stat().st_mtime_ns
    hub.faults.clear()
    assert loader.main(flags) == 0
    assert shard.stat().st_mtime_ns == before
    assert len(datasets.load_dataset("acme/loader-failing", "tiny", split="train", cache_dir=str(tmp_path))) == 24


@pytest.mark.parametrize(
    ("token", "repository"), [("hf_read", "acme/loader-x"), ("hf_write", "others/loader-x"), ("hf_write", "a b")]
)
def test_a_push_that_will_not_be_allowed_is_refused_before_the_work(
    token, repository, tiny, hub, tmp_path, monkeypatch
):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(SystemExit, match=r"preparing the dataset repository .*hf auth login"):
        loader.main(["-t", "tiny", "--output_dir", str(tmp_path / "out"), "--hub_model_id", repository])
    assert not (tmp_path / "out").exists()


def test_push_to_hub_false_keeps_it_local(tiny, hub, tmp_path):
    flags = ["--output_dir", str(tmp_path / "out"), "--hub_model_id", "acme/loader-local", "--push_to_hub", "False"]
    assert loader.main(flags) == 0
    assert hub.log == []


def test_a_dry_run_tells_what_a_run_would_do_and_changes_nothing(tiny, clips, tmp_path, capsys):
    flags = ["-t", "tiny", "--output_dir", str(tmp_path / "out")]
    assert loader.main([*flags, "--dry_run", "--hub_model_id", "acme/loader-plan"]) == 0
    told = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert re.fullmatch(rf"1 tars, 0\.00\d GB, about {len(clips)} clips, 0\.\d\d h", told["input"])
    assert (told["done"], told["pushes"]) == ("0 of 1 shards", "acme/loader-plan (private)")
    assert re.fullmatch(r"1 tars, 0\.00\d GB", told["left"])
    assert re.fullmatch(rf"about 0:00:0\d \(from a sample of {len(clips)} clips\)", told["time"])
    assert not (tmp_path / "out").exists()
    assert not huggingface_hub.repo_exists("acme/loader-plan", repo_type="dataset")
    assert loader.main(flags) == 0
    assert loader.main([*flags, "--dry_run"]) == 0
    output = capsys.readouterr().out
    assert "done: 1 of 1 shards\nleft: 0 tars" in output
    assert "pushes: nothing" in output


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--dry_run"], "cannot write a sample: .*File too large; set TMPDIR to a directory with 1 GB of free space"),
        ([], "cannot write the dataset: .*File too large; complete shards are kept. Run the same command again"),
    ],
)
def test_a_full_disk_ends_the_run_in_a_line_and_the_same_command_goes_on(small, tmp_path, more, said):
    flags = ["-t", "small", "--output_dir", str(tmp_path / "out"), "--preprocessing_num_workers", "1"]
    assert loader.main(flags) == 0
    whole = digests(tmp_path / "out" / "small")
    paths = sorted((tmp_path / "out" / "small").glob("*.parquet"))[:2]
    paths[1].unlink()
    kept = paths[0].stat().st_mtime_ns
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_500, limits[1]))  # bytes that a file may have
    try:
        with pytest.raises(SystemExit, match=said) as error:
            loader.main([*flags, *more])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(error.value)
    assert paths[0].stat().st_mtime_ns == kept
    assert loader.main(flags) == 0
    assert digests(tmp_path / "out" / "small") == whole


@pytest.mark.parametrize(
    ("present", "missing"),
    [(["tiny.000.tar"], "tiny.tiny.tsv"), (["tiny.tiny.tsv"], r"tiny\.\*\.tar"), ([], r"tiny\.\*\.tar")],
)
def test_what_is_missing_of_a_download_is_named(tmp_path, present, missing):
    (tmp_path / "tiny").mkdir()
    for name in present:
        (tmp_path / "tiny" / name).write_bytes(b"")
    with pytest.raises(
        SystemExit, match=f"no {missing} in {tmp_path}/tiny; download it with: python .*downloader.py -t tiny"
    ):
        loader.main(["-t", "tiny", "--data_dir", str(tmp_path)])
