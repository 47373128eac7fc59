"""Launch files: shells and YAML read them, their commands are ours, and what is to be started again is."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from headshare_jax.cli import COMMANDS
from headshare_jax.cli.arguments import parse
from headshare_jax.cli.exit_codes import ExitCode
from headshare_jax.train import begun

FOLDER = Path(begun.__file__).with_name("launch")
FILES = sorted(FOLDER.iterdir())
SCRIPTS = [file for file in FILES if file.suffix != ".yaml"]
RETRIED = {ExitCode.TRY_AGAIN, ExitCode.TERMINATED}
# What variables in the commands stand for.
VALUES = {"RECIPE": "llama-2-7b", "RUN": "/shared/run", "RESUME": "--resume", "SLICES": "2", "@": "--distributed"}


def commands(text: str) -> list[list[str]]:
    """Arguments of every `headshare` command in a text, its variables filled in."""
    found = re.findall(r"(?<=headshare )postshare .*", text.replace("\\\n", " "))
    names = {**VALUES, **{name.lower(): value for name, value in VALUES.items()}}
    lines = [re.sub(r"\"?\$(\w+|@)\"?", lambda name: names[name[1]], line.rstrip('" &')) for line in found]
    return [shlex.split(line) for line in lines]


@pytest.mark.parametrize("file", SCRIPTS, ids=lambda file: file.name)
def test_shells_read_them(file: Path) -> None:
    shell = file.read_text().partition("\n")[0].removeprefix("#!/bin/")
    subprocess.run([shell, "-n", file], check=True)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_their_commands_are_ours(file: Path) -> None:
    text = file.read_text()
    found = commands(text)
    assert found or "until-done.sh" in text
    for args in found:
        command: Any = parse(COMMANDS, args)
        assert (command.config, str(command.output)) == (VALUES["RECIPE"], VALUES["RUN"])
        assert command.resume
        assert command.distributed


def test_the_job_set_is_started_again_but_for_what_is_wrong_with_it() -> None:
    job_set = yaml.safe_load((FOLDER / "gke-jobset.yaml").read_text())["spec"]
    job = job_set["replicatedJobs"][0]["template"]["spec"]
    (rule,) = job["podFailurePolicy"]["rules"]
    assert set(rule["onExitCodes"]["values"]) == {ExitCode.BUG, ExitCode.REFUSED}
    assert job_set["failurePolicy"]["rules"][0]["action"] == "FailJobSet"
    assert job_set["failurePolicy"]["maxRestarts"] > 1
    assert job["parallelism"] == job["completions"] == 16 * 16 // 4


@pytest.mark.parametrize("name", ["slurm-gpus.sbatch", "until-done.sh"])
def test_scripts_name_the_codes_to_start_again(name: str) -> None:
    codes = re.search(r"^ *(?:case \$code in )?((?:\d+ \| )+\d+)\)", (FOLDER / name).read_text(), re.MULTILINE)
    assert codes is not None
    assert {str(int(code)) for code in RETRIED} <= set(codes[1].split(" | "))


def test_xla_knows_the_flags() -> None:
    flags = {flag for file in FILES for flag in re.findall(r"--xla_\w+=\w+", file.read_text())}
    assert flags
    environment = os.environ | {"XLA_FLAGS": " ".join(flags), "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", "import jax; jax.devices()"], env=environment, check=True)


def test_a_run_has_begun_where_its_recipe_is(tmp_path: Path) -> None:
    assert begun.option(str(tmp_path)) == begun.option(str(tmp_path / "absent")) == ""
    (tmp_path / "config.yaml").touch()
    assert begun.option(str(tmp_path)) == "--resume"


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In place of the command: ends with the codes in `codes`, one after another, and writes down its arguments."""
    (tmp_path / "headshare").write_text(
        f"""#!/bin/sh
cd {tmp_path}
echo "$@" >>calls
read -r code <codes
sed -i 1d codes
if [ "$code" = wait ]; then
  trap 'exit 143' TERM
  touch waiting
  while :; do sleep 0.05; done
fi
exit "$code"
"""
    )
    (tmp_path / "python3").write_text(f'#!/bin/sh\n[ ! -e {tmp_path}/calls ] || echo "--resume"\n')
    for name in ("headshare", "python3"):
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SECONDS_BETWEEN", "0")
    return tmp_path


@pytest.mark.parametrize(
    ("codes", "end"), [("75 143 137 0", 0), ("143 2", 2), ("1", 1), ("130", 130), ("75 75 75 75 75 75", 75)]
)
def test_a_run_is_started_until_it_is_done(
    codes: str, end: int, stand_in: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOST_STARTS", "6")
    (stand_in / "codes").write_text("\n".join(codes.split()) + "\n")
    done = subprocess.run(["sh", FOLDER / "until-done.sh", "recipe", "run", "--distributed"], check=False)
    assert done.returncode == end
    first, *others = (stand_in / "calls").read_text().splitlines()
    assert first == "postshare --config recipe --output run --distributed"
    assert others == ["postshare --config recipe --output run --resume --distributed"] * (len(codes.split()) - 1)


def test_a_script_that_is_told_to_stop_stops_the_run_and_starts_none(stand_in: Path) -> None:
    (stand_in / "codes").write_text("wait\n0\n")
    script = subprocess.Popen(["sh", FOLDER / "until-done.sh", "recipe", "run"])
    while not (stand_in / "waiting").exists():
        assert script.poll() is None
    script.terminate()
    assert script.wait(timeout=30) == 143
    assert len((stand_in / "calls").read_text().splitlines()) == 1
