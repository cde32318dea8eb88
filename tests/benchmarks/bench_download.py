"""How fast the corpus is downloaded, checked and loaded, on files as large as ReazonSpeech's clips make them.

    python -m tests.benchmarks.bench_download [--megabytes 300] [--rounds 5]

Prints a Markdown table of medians, each of pairs of runs that follow each other, on the loopback interface and with
the files in the page cache: the disk and the network, which are slower, are not in these figures.

- download: the whole run of the downloader (sizes, plan, download, check, sync) against `curl` writing the same files
- check: `--health_check`'s walk through a tar against `cat` of the same file
- load: clips a second of the builder, to Arrow files, and of the script, to parquet shards, with two workers
  against one
"""

import argparse
import contextlib
import io
import os
import random
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

CLIP = 105_000  # bytes, ReazonSpeech's mean


def write_corpus(root: Path, tars: int, size: int) -> int:
    """Tars of so many bytes each, of one FLAC of noise under many names; gives the number of clips."""
    import numpy as np
    import soundfile

    flac = io.BytesIO()
    noise = np.random.default_rng(0).integers(-(2**15), 2**15, int(CLIP / 2), dtype=np.int16)
    soundfile.write(flac, noise, 16000, format="FLAC", subtype="PCM_16")
    content, rng = flac.getvalue(), random.Random(0)
    (root / "data").mkdir(parents=True)
    (root / "tsv").mkdir()
    names = [[f"{i:03x}/{rng.randbytes(6).hex()}.flac" for _ in range(size // len(content))] for i in range(tars)]
    for index, members in enumerate(names):
        with tarfile.open(root / "data" / f"{index:03x}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for name in members:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    lines = [f"{name}\t今日は朝から雨が降っています。\n" for members in names for name in members]
    for target in ("tiny", "small"):
        text = "".join(line for line in lines if target == "small" or line.startswith("000/"))
        (root / "tsv" / f"{target}.tsv").write_text(text, encoding="utf-8")
    return len(lines)


def seconds(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        action()
    return time.perf_counter() - started


def table_row(
    name: str, amount: float, unit: str, ours: Callable[[], object], baseline: Callable[[], object], rounds: int
) -> str:
    """Medians of both rates and of baseline / ours in time, after a pair of runs that is not counted."""
    pairs = [(seconds(ours), seconds(baseline)) for _ in range(rounds + 1)][1:]
    our_time = statistics.median(pair[0] for pair in pairs)
    baseline_time = statistics.median(pair[1] for pair in pairs)
    ratio = statistics.median(pair[1] / pair[0] for pair in pairs)
    return f"| {name} | {amount / our_time:,.0f} {unit} | {amount / baseline_time:,.0f} {unit} | {ratio:.2f} |"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--megabytes", type=int, default=300, help="of the corpus, in four tars")
    parser.add_argument("--rounds", type=int, default=5, help="pairs of runs")
    args = parser.parse_args(argv)

    with tempfile.TemporaryDirectory(prefix="bench-download-") as scratch, contextlib.ExitStack() as stack:
        scratch = Path(scratch)
        os.environ["HF_HOME"] = str(scratch / "hf")
        import datasets

        import reazonspeech_manual_dataloader as loader
        import reazonspeech_manual_downloader as downloader

        datasets.disable_progress_bars()
        root, downloads = scratch / "mirror", scratch / "downloads"
        clips = write_corpus(root, 4, args.megabytes * 1_000_000 // 4)
        tars = sorted((root / "data").glob("*.tar"))
        size = sum(tar.stat().st_size for tar in tars) / 1e6
        command = [sys.executable, "-m", "tests.sandbox.mirror", root]  # a process of its own
        mirror = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        stack.callback(mirror.terminate)
        url = mirror.stdout.readline().strip()

        def download(*flags: str) -> None:
            shutil.rmtree(downloads, ignore_errors=True)
            downloader.main(["--base_url", url, "--data_dir", str(downloads), *flags])

        def curl(*names: str) -> None:
            shutil.rmtree(scratch / "curl", ignore_errors=True)
            urls = [word for name in names for word in (f"{url}/data/{name}", "-o", scratch / "curl" / name)]
            subprocess.run(["curl", "-sS", "--parallel", "--create-dirs", *urls], check=True)

        def build(workers: int) -> None:
            shutil.rmtree(scratch / "hf", ignore_errors=True)
            builder = loader.ReazonSpeech(config_name="small", cache_dir=str(scratch / "hf"), data_dir=str(downloads))
            builder.download_and_prepare(num_proc=workers)

        def write(workers: int) -> None:
            shutil.rmtree(scratch / "out", ignore_errors=True)
            flags = ["-t", "small", "--data_dir", str(downloads), "--output_dir", str(scratch / "out")]
            loader.main([*flags, "--preprocessing_num_workers", str(workers)])

        def check() -> None:
            for tar in tars:
                downloader.check_tar(tar)

        def cat() -> None:
            subprocess.run(["cat", *tars], stdout=subprocess.DEVNULL, check=True)

        four = ["-t", "small", "-e", "4", "-p", "4"]
        names = [tar.name for tar in tars]
        rows = [
            table_row(
                "download of 1 tar, curl",
                size / 4,
                "MB/s",
                lambda: download("-t", "tiny"),
                lambda: curl(names[0]),
                args.rounds,
            ),
            table_row(
                "download of 4 at once, curl",
                size,
                "MB/s",
                lambda: download(*four),
                lambda: curl(*names),
                args.rounds,
            ),
            table_row("check of 4 tars, cat", size, "MB/s", check, cat, args.rounds),
        ]
        seconds(lambda: download(*four))
        rows += [
            table_row("builder, 2 workers and 1", clips, "clips/s", lambda: build(2), lambda: build(1), args.rounds),
            table_row(
                "parquet shards, 2 workers and 1", clips, "clips/s", lambda: write(2), lambda: write(1), args.rounds
            ),
        ]
    print("| | ours | baseline | ratio |\n| --- | --- | --- | --- |")
    print("\n".join(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
