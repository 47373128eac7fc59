"""`make fuzz`: inputs of all kinds for a while, in processes that are ended where they take too much, and a summary.

The environment variables FUZZ_MINUTES (30) and FUZZ_WORKERS (the number of processors) say how long and how wide; what
fails is written to the folder FUZZ_OUTPUT (build/fuzz), and `python tests/fuzz/long.py --repeat FILE` repeats it.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
sys.path.insert(0, str(TESTS))
# A process makes way for a new one after so many seconds or bytes, so that nothing that JAX keeps counts for an input.
_RENEWED_SECONDS, _RENEWED_BYTES = 600, 3 * 2**30
_EXAMPLES = 20
# An input that is still running then is ended.
_PATIENCE = 90
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_backend_optimization_level=0",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "PIP_NO_INDEX": "1",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=Path, help="an input that failed")
    parser.add_argument("--worker", type=int, nargs=2, metavar=("NUMBER", "SEED"), help=argparse.SUPPRESS)
    parser.add_argument("--kinds", nargs="+", help="of inputs; all by default")
    given = parser.parse_args()
    output = Path(os.environ.get("FUZZ_OUTPUT", "build/fuzz")).resolve()
    os.environ.update(ENVIRONMENT, HEADSHARE_CACHE=str(output / "cache"))
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(output / "compiled"))
    output.mkdir(parents=True, exist_ok=True)
    if given.repeat:
        _repeat(given.repeat, output)
    elif given.worker:
        _work(*given.worker, given.kinds, output)
    else:
        _supervise(output, given.kinds)


def _repeat(file: Path, output: Path) -> None:
    from fuzz.oracle import Input, try_input
    from fuzz.seeds import Seeds

    given = Input.from_json(file.read_text())
    seeds = Seeds(output / "seeds")
    for seed in given.seeds:
        seeds.path(seed)
    with tempfile.TemporaryDirectory() as folder:
        outcome = try_input(given, seeds.folder, Path(folder) / "in")
    print(f"{given.kind}: headshare {' '.join(map(repr, given.args))}\n{outcome.said}\n{outcome}")


def _work(number: int, seed: int, kinds: list[str] | None, output: Path) -> None:
    """Tries inputs, one kind after another, and writes down each before and after."""
    import warnings

    import hypothesis
    from hypothesis import HealthCheck, Phase, given, settings

    from fuzz.inputs import KINDS
    from fuzz.named import NAMED, SLOW
    from fuzz.oracle import Input, try_input
    from fuzz.seeds import Seeds

    warnings.filterwarnings("error", category=RuntimeWarning)
    # What asks for more is refused by the system, before the machine suffers.
    resource.setrlimit(resource.RLIMIT_DATA, (8 * 2**30, resource.RLIM_INFINITY))
    seeds, current = Seeds(output / f"seeds-{number}"), output / f"current-{number}.json"
    begin, memory = time.monotonic(), 0

    def attempt(given: Input) -> None:
        nonlocal memory
        current.write_text(given.to_json())
        folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
        for name in given.seeds:
            seeds.path(name)
        outcome = try_input(given, seeds.folder, folder / "in")
        shutil.rmtree(folder, ignore_errors=True)
        memory = max(memory, outcome.memory)
        _record(
            output, number, given.kind, outcome.code, outcome.seconds, outcome.memory, outcome.problem, outcome.said
        )

    if seed == number:
        for case in (*NAMED, *SLOW):
            attempt(case.given)
    for turn in range(10**9):
        for kind in kinds or KINDS:
            if time.monotonic() - begin > _RENEWED_SECONDS or memory > _RENEWED_BYTES:
                return

            @hypothesis.seed(seed + 7919 * turn)
            @settings(
                max_examples=_EXAMPLES,
                database=None,
                phases=[Phase.generate],
                deadline=None,
                suppress_health_check=list(HealthCheck),
            )
            @given(drawn=KINDS[kind](seeds))
            def attempt_all(drawn: Input) -> None:
                attempt(drawn)

            attempt_all()


def _record(
    output: Path, number: int, kind: str, code: int | None, seconds: float, memory: int, problem: str | None, said: str
) -> None:
    row = {"kind": kind, "code": code, "seconds": seconds, "memory": memory, "problem": problem}
    if problem is not None:
        file = output / "failures" / f"{number}-{time.time_ns()}.json"
        file.parent.mkdir(exist_ok=True)
        shutil.copyfile(output / f"current-{number}.json", file)
        row |= {"file": str(file), "said": said[-3000:]}
    with (output / f"tried-{number}.jsonl").open("a") as log:
        log.write(json.dumps(row) + "\n")


def _supervise(output: Path, kinds: list[str] | None) -> None:
    """Keeps the processes at work until the time is over, and sums up."""
    minutes, workers = (
        float(os.environ.get(f"FUZZ_{name}", default))
        for name, default in (("MINUTES", 30), ("WORKERS", os.cpu_count() or 1))
    )
    for old in (*output.glob("tried-*.jsonl"), *output.glob("current-*.json"), *output.glob("failures/*")):
        old.unlink()
    seed, end = int(time.time()), time.monotonic() + 60 * minutes
    running: dict[int, subprocess.Popen[bytes]] = {}
    starts: Counter[int] = Counter()
    while time.monotonic() < end:
        for number in range(int(workers)):
            process, current = running.get(number), output / f"current-{number}.json"
            if process is None or process.poll() is not None:
                if process is not None and process.returncode:
                    _ended(output, number, f"the process ended with {process.returncode}")
                first = number if not starts[number] and number == 0 else seed + 104729 * number + starts[number]
                words = [
                    sys.executable,
                    __file__,
                    "--worker",
                    str(number),
                    str(first),
                    *(["--kinds", *kinds] if kinds else []),
                ]
                running[number] = subprocess.Popen(
                    words, stdout=subprocess.DEVNULL, stderr=(output / f"said-{number}.txt").open("wb")
                )
                starts[number] += 1
                current.unlink(missing_ok=True)
            elif current.exists() and time.time() - current.stat().st_mtime > _PATIENCE:
                process.kill()
                process.wait()
                _ended(output, number, f"it took more than {_PATIENCE} s", process=None)
                del running[number]
        time.sleep(1)
    for process in running.values():
        process.kill()
        process.wait()
    print(_summary(output, minutes, seed))


def _ended(output: Path, number: int, problem: str, **_: Any) -> None:
    current = output / f"current-{number}.json"
    if not current.exists():
        sys.exit(f"A process could not begin: {(output / f'said-{number}.txt').read_text()[-3000:]}")
    said = (output / f"said-{number}.txt").read_text(errors="replace")
    _record(output, number, json.loads(current.read_text())["kind"], None, float(_PATIENCE), 0, problem, said)
    current.unlink()


def _summary(output: Path, minutes: float, seed: int) -> str:
    rows = [json.loads(line) for file in output.glob("tried-*.jsonl") for line in file.read_text().splitlines()]
    by_kind = defaultdict(list)
    for row in rows:
        by_kind[row["kind"]].append(row)
    failures = [row for row in rows if row["problem"] is not None]
    lines = [
        f"{len(rows)} inputs of {len(by_kind)} kinds in {minutes:g} minutes, seed {seed}: {len(failures)} failures.",
        "",
        "| kind | inputs | done (0) | refused (2) | other | slowest, s | most memory, GiB | failures |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for kind, tried in sorted(by_kind.items()):
        codes = Counter(row["code"] for row in tried)
        slowest, memory = max(row["seconds"] for row in tried), max(row["memory"] for row in tried) / 2**30
        other = ", ".join(f"{count} x {code}" for code, count in codes.items() if code not in (0, 2))
        bad = sum(row["problem"] is not None for row in tried)
        lines.append(
            f"| {kind} | {len(tried)} | {codes[0]} | {codes[2]} | {other} | {slowest:.1f} | {memory:.2f} | {bad} |"
        )
    told = Counter((row["kind"], row["problem"], _signature(row["said"])) for row in failures)
    files = {(row["kind"], row["problem"], _signature(row["said"])): row["file"] for row in failures}
    lines += [
        "",
        *(
            f"- {count} x {kind}: {problem}: {said} ({files[kind, problem, said]})"
            for (kind, problem, said), count in told.most_common()
        ),
    ]
    text = "\n".join(lines) + "\n"
    (output / "summary.md").write_text(text)
    return text


def _signature(said: str) -> str:
    lines = said.strip().splitlines()
    return lines[-1][:200] if lines else ""


if __name__ == "__main__":
    main()
