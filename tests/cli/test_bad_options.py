"""What the command says of wrong options: one sentence, before any work, and nothing is left behind."""

from pathlib import Path
from typing import Any

import pytest
from tiny_cli_model import DIRECT

from headshare_jax.errors import HeadshareError


def test_wrong_arguments_are_refused_in_one_sentence(refused: Any) -> None:
    cases = [
        ((), "No command was given"),
        (("nonsense",), "nonsense is no command; the commands are demo"),
        (("--nonsense",), "--nonsense is no command"),
        (("inspekt", "a"), "inspekt is no command; did you mean inspect?"),
        (("share", "a", "b", "--ration", 0.3), "no option --ration; did you mean --ratio? (headshare share --help)."),
        (("share", "a", "b", "--ratio=much"), "--ratio does not take 'much' (headshare share --help)."),
        (("eval", "a", "--text", "b", "--seq-len", 3.5), "--seq-len does not take '3.5'"),
        (("plan", "a", "--topology=v5e:1x1", "--mesh", "data=3"), "--mesh needs 3 values"),
        (("plan", "a", "--topology=v5e:1x1", "--mesh", 3, 1), "--mesh needs 3 values (headshare plan --help)."),
        (("share", "a", "b", "--ratio"), "--ratio needs a value"),
        (("inspect",), "Give SRC (headshare inspect --help)."),
        (("inspect", "a", "b"), "b is one argument too many"),
        (("plan",), "Give SRC and --topology (headshare plan --help)."),
        (("plan", "a", "--topolgy", "v5e:1x1"), "no option --topolgy; did you mean --topology?"),
    ]
    for args, words in cases:
        assert words in refused(*args), args


def test_options_that_would_do_nothing_are_refused_by_name(refused: Any, model: Path) -> None:
    # Whose temperature is the model's own.
    greedy = ("generate", model, "--prompt", "a")
    share, evaluate = ("share", "absent", "out", "--ratio", 0.3), ("eval", "absent")
    post = ("postshare", "--config", "smollm2-cpu", "-o", "run")
    sweep = ("sweep", "absent", "-o", "report", "--ratios", 0.3, "--methods", "direct", "--text", __file__)
    cases = [
        (("match", "absent", "--seed", 3), "--seed does nothing without --match random; leave it out."),
        (("match", "absent", "--overwrite"), "--overwrite does nothing without --output or --plot"),
        ((*evaluate, "--tasks", "piqa", "--text-field", "body"), "--text-field does nothing without --text"),
        ((*evaluate, "--tasks", "piqa", "--seq-len", 64), "--seq-len does nothing without --text"),
        ((*evaluate, "--tasks", "piqa", "--stride", 3), "--stride does nothing without --text"),
        ((*evaluate, "--tasks", "piqa", "--max-windows", 3), "--max-windows does nothing without --text"),
        ((*evaluate, "--text", "absent.txt", "--task-folder", "tasks"), "--task-folder does nothing without --tasks"),
        ((*evaluate, "--text", "absent.txt", "--task-limit", 3), "--task-limit does nothing without --tasks"),
        ((*greedy, "--seed", 3), "--seed does nothing without a --temperature above 0"),
        ((*greedy, "--top-k", 3), "--top-k does nothing without a --temperature"),
        ((*greedy, "--top-p", 0.5), "--top-p does nothing without a --temperature"),
        ((*share, *DIRECT, "--seq-len", 64), "leave seq_len out (--seq-len)."),
        ((*share, *DIRECT, "--calibrate-tokens", 64), "leave calibrate_tokens out (--calibrate-tokens)."),
        ((*share, "--method", "direct", "--seed", 3), "leave seed out (--seed)."),
        # Their defaults do nothing either.
        (("match", "absent", "--seed", 0), "--seed does nothing without --match random"),
        ((*greedy, "--top_p=1"), "--top-p does nothing without a --temperature"),
        ((*evaluate, "--text", __file__, "--text-field", "text"), "--text-field does nothing without rows in --text"),
        ((*post, "--coordinator", "host:1"), "--coordinator does nothing without --distributed"),
        ((*post, "--processes", 2), "--processes does nothing without --coordinator"),
        ((*post, "--distributed", "--process", 0), "--process does nothing without --coordinator"),
        ((*sweep, "--calibrate-tokens", 64), "--calibrate-tokens does nothing without --calibrate"),
        ((*share, "--method", "random", "--match", "qk"), "leave it out (--match)."),
    ]
    for args, words in cases:
        assert words in refused(*args), args


def test_a_message_names_only_options_that_the_command_has(
    refused: Any, monkeypatch: pytest.MonkeyPatch, model: Path
) -> None:
    def refuse(path: str) -> Any:
        raise HeadshareError("That will not do; give another.", option=("src", "within_shards", "overwrite"))

    monkeypatch.setattr("headshare_jax.convert.locate", refuse)
    said = {
        "generate": "That will not do; give another.",
        "match": "That will not do; give another (--overwrite).",
        "share": "That will not do; give another (--within-shards, --overwrite).",
    }
    for command, sentence in said.items():
        args = {"share": ("out", "--ratio", 0.3, *DIRECT), "generate": ("a prompt",)}.get(command, ())
        assert refused(command, model, *args) == f"headshare: {sentence}"


def test_every_value_is_looked_at_before_any_work(refused: Any, tmp_path: Path) -> None:
    """None of the models is there, so what is refused first is the option."""
    generate, share = ("generate", "absent", "--prompt", "a"), ("share", "absent", "out")
    evaluate, demo = ("eval", "absent", "--text", __file__), ("demo", "absent", "-o", "out")
    plan = ("plan", "absent", "--topology", "v5e:2x2")
    cases = [
        ((*generate, "--max-new-tokens", "1" + 30 * "0"), "--max-new-tokens must be at least 1 and at most 2147483647"),
        ((*generate, "--max-new-tokens", 0), "--max-new-tokens must be at least 1"),
        ((*generate, "--temperature", "inf"), "--temperature must be at least 0, not inf."),
        ((*generate, "--temperature", 1, "--seed", -1), "--seed must be at least 0"),
        ((*generate, "--dtype", ""), "--dtype is empty; give it a value."),
        ((*generate, "--dtype", "None"), "--dtype does not take 'None'; it takes float32, bfloat16, float16."),
        ((*generate, "--compute-dtype", "float31"), "--compute-dtype does not take 'float31'; did you mean float32?"),
        (("generate", "absent", "--prompt", "a", "\udcff"), "--prompt must be UTF-8, unlike byte 1 of '\\udcff'."),
        ((*share, "--ratio", "nan"), "--ratio must be at least 0 and below 1, not nan."),
        ((*share, "--ratio", "None"), "--ratio does not take 'None'"),
        ((*share, "--budget", 0), "--budget must be above 0 and at most 1, not 0.0."),
        ((*share, "--ratio", 0.3, "--method", "fited"), "--method does not take 'fited'; did you mean fitted?"),
        ((*share, "--ratio", 0.3, "--tie", "vq"), "(--tie)."),
        ((*share, "--ratio", 0.3, "--within-shards", 0), "--within-shards must be at least 1"),
        ((*share, "--map", tmp_path), "is no file; give a file."),
        ((*share, "--map", ""), "--map does not take ''"),
        ((*share, "--ratio", 0.3, "--save-map", "out"), "--save-map is or lies in DST"),
        ((*share, "--ratio", 0.3, "--plot", "out/map.png"), "--plot is or lies in DST"),
        ((*share, "--ratio", 0.3, "--calibrate", tmp_path), "is a folder; give a text file (--calibrate)."),
        ((*evaluate, "--stride", 0), "--stride must be at least 1"),
        ((*evaluate, "--seq-len", 1), "--seq-len must be at least 2"),
        ((*evaluate, "--max-windows", 0), "--max-windows must be at least 1"),
        (("eval", "absent", "--text", "/dev/zero"), "is no file, but a device or a pipe; give a text file (--text)."),
        ((*demo, "--ratio", 1.5), "--ratio must be at least 0 and below 1"),
        ((*plan, "--ratio", 2), "--ratio must be at least 0 and below 1"),
        ((*plan, "--stage", "train"), "--stage does not take 'train'"),
        (("plan", "absent", "--topology", "v9:1x1"), "is no TPU topology"),
        (("inspect", "absent", "--shards", 0), "--shards must be at least 1"),
        (("convert", "absent", "out.gguf", "--to", "gguf", "--quantize", "q9"), "is not one of"),
        (("postshare", "--config", "/dev/null", "-o", "run"), "/dev/null is no file; give a .yaml file"),
    ]
    for args, words in cases:
        assert words in refused(*args), args


def test_names_are_taken_in_capitals_too(headshare: Any, model: Path, tmp_path: Path) -> None:
    assert headshare("convert", model, tmp_path / "out.gguf", "--to", "GGUF", "--json")["format"] == "gguf"
