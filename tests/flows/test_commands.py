"""Test the command line: imports, output, exit statuses and error messages."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flows.cli.app import COMMANDS
from flows.cli.lazy_command import LazyCommand
from flows.cli.recipes import recipe
from flows.recipe_files import find_recipe_file
from tests.yuan.runs import STEPS, make_training_inputs, prepare_run
from yuan import tokenizer as tokenizers

ROOT = Path(__file__).parents[2]
HEAVY = {"torch", "deepspeed", "prefect", "mlflow", "sqlalchemy", "boto3", "fastapi"}


def run_cotrain(*args, home=None, **env):
    command = [sys.executable, "-m", "flows.cli.app", *args]
    full = {**os.environ, **env, **({"COTRAIN_HOME": str(home)} if home else {})}
    return subprocess.run(command, capture_output=True, text=True, env=full, cwd=ROOT, timeout=60)


@pytest.mark.parametrize(
    "argv",
    [
        ["--help"],
        ["submit", "--help"],
        ["withdraw", "--help"],
        ["round", "start", "--help"],
        ["dataset", "push", "/dev/null", "--url", "http://127.0.0.1:9", "--token", "t"],
        ["dataset", "push", __file__, "--url", "http://127.0.0.1:9", "--token", "t"],
        ["plan", "--help"],
        [
            "submit",
            "--prompt",
            "p",
            "--response",
            "r",
            "--model-version",
            "1",
            "--expected",
            "x",
            "--url",
            "http://127.0.0.1:9",
        ],
        ["plan", "--model", "tiny"],
    ],
)
def test_light_commands_load_nothing_heavy(argv):
    code = f"""
import sys
sys.argv = ["cotrain", *{argv!r}]
import feedback.client
feedback.client.MAX_REQUEST_ATTEMPTS = 1
try:
    from flows.cli.app import main
    main()
except SystemExit:
    pass
print("LOADED", sorted({HEAVY!r} & set(sys.modules)))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.stdout.splitlines()[-1] == "LOADED []"


def test_the_list_of_commands_has_each_commands_own_help():
    for name, place, help in COMMANDS:
        command = LazyCommand(name, place, help).load()
        assert command.name == name
        assert " ".join(command.help.split("\n\n")[0].split()) == help


def test_the_portal_loads_no_torch():
    code = "import feedback.run, sys; print(sorted({'torch', 'deepspeed', 'prefect', 'mlflow'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.stdout.strip() == "[]", result.stderr


def test_plan_prints_one_json_object_and_exits_by_feasibility(tmp_path):
    result = run_cotrain("plan", "--model", "tiny", "--pipeline-size", "2", "--json")
    assert result.returncode == 0
    plan = json.loads(result.stdout)
    assert plan["feasible"] is True
    assert [stage["layers"] for stage in plan["stages"]] == [2, 1]
    result = run_cotrain("plan", "--model", "2b", "--json")
    assert result.returncode == 1
    assert json.loads(result.stdout)["feasible"] is False


def test_replan_reports_the_cost_of_the_move(tmp_path):
    pool = str(ROOT / "benchmarks" / "pools" / "a100-96.toml")
    plan = run_cotrain("plan", "--model", "102b", "--pool", pool, "--json")
    (tmp_path / "plan.json").write_text(plan.stdout)
    change = ["--current", str(tmp_path / "plan.json"), "--lost", "A100-80:1", "--svg", str(tmp_path / "plan.svg")]
    result = run_cotrain("plan", "--model", "102b", "--pool", pool, "--json", *change)
    move = json.loads(result.stdout)["move"]
    assert move["kept_step_seconds"] is None and "no longer fits" in move["explanation"]
    assert (tmp_path / "plan.svg").read_text().startswith("<svg")


HOSTILE_POOL = '[[pool]]\nname = "a\\n\\u001b[31mb"\n[[pool.group]]\ndevice_class = "d\\u001b[2J"\ncount = 5\n'
HOSTILE_POOL += "memory_gib = 40\nsustained_tflops = 100\n"


def test_recipe_check_exits_by_what_fits_and_names_wrong_values(tmp_path):
    pool = "benchmarks/pools/one-a100.toml"
    fitting = run_cotrain("recipe", "check", "finetune-2b", "--pool", pool, "--json", home=tmp_path)
    estimate = json.loads(fitting.stdout)
    assert fitting.returncode == 0 and estimate["fits"] and estimate["problems"] == []
    assert estimate["nodes"][0]["host_bytes"] == sum(estimate["nodes"][0]["host_terms"].values())
    assert estimate["disk_bytes"] == sum(estimate["disk_terms"].values()) < 400 * 2**30

    changed = run_cotrain("recipe", "check", "finetune-2b", "--pool", pool, "--set", "length.steps=5", home=tmp_path)
    assert changed.returncode == 1 and changed.stdout.startswith("finetune-2b on one-a100: does not fit")
    assert "problem: the run would have 5 steps, at least 20 are needed" in changed.stdout
    large = run_cotrain("recipe", "check", "finetune-102b", "--pool", pool, "--json", home=tmp_path)
    assert large.returncode == 1 and "does not fit" in json.loads(large.stdout)["problems"][0]

    unknown = run_cotrain("recipe", "check", "finetune-2b", "--pool", pool, "--set", "length.stps=5", home=tmp_path)
    assert unknown.returncode == 2 and "did you mean 'steps'" in unknown.stderr
    wrong_id = run_cotrain("recipe", "check", "finetune-2b", "--snapshot", "latest", home=tmp_path)
    assert wrong_id.returncode == 2 and "--snapshot" in wrong_id.stderr and "64 hexadecimal" in wrong_id.stderr
    missing = run_cotrain("recipe", "check", "fintune-2b", "--pool", pool, home=tmp_path)
    assert missing.returncode == 1 and "did you mean 'finetune-2b'" in missing.stderr


SMALL_POOL = """
[[pool]]
name = "small"
disk_gib = 400
[[pool.group]]
device_class = "A100-80"
count = 1
host_memory_gib = 8
"""
CHECK = CliRunner()


def check_recipe(monkeypatch, home, name, *values, pool="benchmarks/pools/one-a100.toml"):
    """Run `recipe check --json` in this process; return its exit status and the object it prints."""
    monkeypatch.setenv("COTRAIN_HOME", str(home))
    replacements = [word for value in values for word in ("--set", value)]
    result = CHECK.invoke(recipe, ["check", name, "--pool", str(pool), "--json", *replacements])
    return result.exit_code, json.loads(result.stdout)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (["data.seq_len=9000"], "data.seq_len: must not be above the 8,192 positions of 2b, got 9,000; lower it"),
        (["length.epochs=9"], "length.epochs: must not be above max_epochs 4; lower it"),
        (["length.steps=5"], "the run would have 5 steps, at least 20 are needed; raise the length"),
        (["batch.target_steps=5"], "batch.target_steps is 5, at least 20 are needed; raise it"),
        (["batch.micro_batch_size=3"], "micro_batch_size must divide the global batch of 64 samples"),
    ],
    ids=["positions", "epochs", "steps", "target steps", "micro-batch"],
)
def test_recipe_check_gives_one_line_and_the_change_for_a_recipe_that_cannot_run(monkeypatch, tmp_path, values, reason):
    status, report = check_recipe(monkeypatch, tmp_path, "finetune-2b", *values)
    assert status == 1 and not report["fits"]
    [problem] = report["problems"]
    assert reason in problem and "\n" not in problem


def test_recipe_list_shows_brackets_and_files_whose_names_no_round_can_use(tmp_path):
    (tmp_path / "recipes").mkdir()
    shipped = find_recipe_file(tmp_path, "demo")
    text = re.sub(
        "description = .*", 'description = "[data] and [/bold] of [mixture]"', shipped.read().decode(), count=1
    )
    (tmp_path / "recipes" / "mine.toml").write_text(text)
    (tmp_path / "recipes" / os.fsdecode(b"bad\xff.toml")).write_text(text)
    listed = run_cotrain("recipe", "list", home=tmp_path)
    assert listed.returncode == 0 and "[data] and [/bold] of [mixture]" in listed.stdout
    assert "the name must be lower-case letters" in listed.stdout and "bad\\udcff.toml" in listed.stdout
    rows = json.loads(run_cotrain("recipe", "list", "--json", home=tmp_path).stdout)["recipes"]
    assert rows[-1]["name"] == "-" and rows[-1]["error"].endswith("rename the file")


def test_recipe_check_plans_for_the_pool_of_env_local(monkeypatch, tmp_path):
    pool = ROOT / "benchmarks" / "pools" / "one-a100.toml"
    (tmp_path / "env.local").write_text(f"COTRAIN_POOL={pool}\n")
    monkeypatch.setenv("COTRAIN_HOME", str(tmp_path))
    monkeypatch.delenv("COTRAIN_POOL", raising=False)
    result = CHECK.invoke(recipe, ["check", "finetune-2b", "--set", "length.epochs=1"])
    assert result.stdout.startswith("finetune-2b on one-a100:")
    assert ", 1 epoch\n" in result.stdout and "read once" in result.stdout


def test_recipe_check_compares_a_tokenizer_with_the_model_before_any_device_is_taken(monkeypatch, tmp_path):
    status, report = check_recipe(monkeypatch, tmp_path, "mini")
    folder = tmp_path / "recipes" / "tokenizer"
    assert status == 0 and f"put tokenizer.model into {folder}" in report["notes"][-1]
    folder.mkdir(parents=True)
    (folder / "tokenizer.model").write_bytes(b"no tokenizer")
    status, report = check_recipe(monkeypatch, tmp_path, "mini")
    assert status == 1 and report["problems"][0].startswith("the tokenizer of new weights of mini: ")
    tokenizers.train(["abcdefghijklmnop"], vocab_size=300).save(folder)
    status, report = check_recipe(monkeypatch, tmp_path, "mini")
    assert status == 0 and not any("tokenizer" in note for note in report["notes"])


def test_recipe_check_says_that_a_machine_with_little_memory_saves_synchronously(monkeypatch, tmp_path):
    pool = tmp_path / "pool.toml"
    pool.write_text(SMALL_POOL)
    status, report = check_recipe(monkeypatch, tmp_path, "finetune-2b", pool=pool)
    assert status == 0 and not report["is_saving_asynchronous"] and "host_memory_gib" in report["notes"][-1]
    pool.write_text(SMALL_POOL.replace("= 8", "= 1").replace("= 400", "= 50"))
    status, report = check_recipe(monkeypatch, tmp_path, "finetune-2b", pool=pool)
    memory, disk = report["problems"]
    assert status == 1 and "use fewer devices of a node" in memory and "free space, or move the home folder" in disk


def test_names_of_a_pool_are_printed_escaped_and_unused_devices_are_named(tmp_path):
    (tmp_path / "pool.toml").write_text(HOSTILE_POOL)
    arguments = ["plan", "--model", "tiny", "--pool", str(tmp_path / "pool.toml"), "--data-size", "4"]
    result = run_cotrain(*arguments, "--pipeline-size", "1")
    assert result.returncode == 0 and result.stdout.startswith("tiny on a\\n\\x1b[31mb: 1 stage x 4 replicas")
    assert "The plan leaves 1 of 5 devices unused: 1 d\\x1b[2J." in result.stdout and "\x1b" not in result.stdout
    for pool in ("no\nwhere\x1b[31m", f"{tmp_path / 'pool.toml'}:no\nwhere\x1b[31m"):
        result = run_cotrain("plan", "--model", "tiny", "--pool", pool)
        assert result.stderr.count("\n") == 1 and "\x1b" not in result.stderr


def test_the_current_plan_may_have_a_byte_order_mark_but_no_devices_of_another_pool(tmp_path):
    plan = run_cotrain("plan", "--model", "tiny", "--json").stdout
    file = tmp_path / "plan.json"
    file.write_text("\ufeff" + plan)
    assert run_cotrain("plan", "--model", "tiny", "--current", str(file)).returncode == 0
    file.write_text(plan.replace("cpu-process", "H200"))
    result = run_cotrain("plan", "--model", "tiny", "--current", str(file))
    assert result.returncode == 1 and "the plan uses devices of 'H200', and the pool has 'cpu-process'" in result.stderr


def test_a_pool_with_slow_devices_alone_is_planned():
    normal, slow = (
        json.loads(run_cotrain("plan", "--model", "tiny", *change, "--json").stdout)
        for change in ([], ["--slow", "cpu-process:2:0.5"])
    )
    assert {stage["device_class"] for stage in slow["stages"]} == {"cpu-process (slow)"}
    assert normal["step_seconds"] < slow["step_seconds"] < 2 * normal["step_seconds"] * (1 + 1e-9)


@pytest.mark.slow
def test_plan_uses_measured_rates_of_the_calibrated_pool(tmp_path):
    file = tmp_path / "pool.toml"
    result = run_cotrain("calibrate", "--seq-len", "64", "--precision", "fp32", "--out", str(file), "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["measured"]["forward_tflops"] > 0
    planned = run_cotrain("plan", "--model", "tiny", "--pool", str(file), "--precision", "fp32", "--json")
    assert "measured rates" in json.loads(planned.stdout)["explanation"]


def test_an_unknown_version_is_refused_before_torch_is_imported(tmp_path):
    code = """
import sys
from flows.cli.app import app
try:
    app(["generate", "999", "--prompt", "p"])
except SystemExit as error:
    print(error.code, "torch" in sys.modules)
"""
    env = {**os.environ, "COTRAIN_HOME": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=env)
    assert result.stdout == "1 False\n", result.stderr


@pytest.mark.parametrize("command", [["generate", "--prompt", "p"], ["export", "--out", "out"]])
def test_a_folder_of_the_published_layout_is_to_be_imported_first(tmp_path, command):
    (tmp_path / "config.json").write_text('{"model_type": "yuan", "hidden_size": 64}')
    result = run_cotrain(*command, str(tmp_path))
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert f"import it first: `cotrain import {tmp_path} --out FOLDER`" in result.stderr


def test_doctor_reports_that_no_stack_was_ever_started(tmp_path):
    result = run_cotrain("doctor", home=tmp_path / "home")
    assert result.returncode == 1 and f"the stack in {tmp_path / 'home'} is not up" in result.stdout


@pytest.mark.parametrize(
    ("argv", "status", "message"),
    [
        (["plan", "--model", "tiny", "--lost", "cpu-process"], 2, "a change is written CLASS:N"),
        (["plan", "--model", "tiny", "--lost", "gpu:1"], 2, "use one that it has: cpu-process"),
        (["plan", "--model", "tiny", "--slow", "cpu-process:1:half"], 2, "SHARE must be a number between 0"),
        (["plan", "--model", "tiny", "--slow", "gpu:1:0.5"], 2, "'--slow': pool 'cpu-2' has 2 cpu-process"),
        (["plan", "--model", "tiny", "--slow", "cpu-process:0:0.5"], 2, "N must be a whole number from 1"),
        (["plan", "--model", "tiny", "--slow", "cpu-process:1:nan"], 2, "must be above 0 and below 1, got nan"),
        (
            ["plan", "--model", "tiny", "--slow", "cpu-process:1"],
            2,
            "CLASS:N:SHARE, got 'cpu-process:1'; write it as in",
        ),
        (
            ["plan", "--model", "tiny", "--slow", "cpu-process:1:0.5", "--slow", "cpu-process:1:0.2"],
            2,
            "name all slow devices of a class in one change",
        ),
        (
            ["plan", "--model", "tiny", "--svg", "nowhere/x.svg"],
            1,
            "--svg nowhere/x.svg cannot be written: No such file",
        ),
        (
            ["plan", "--model", "tiny", "--current", "/dev/zero"],
            1,
            "--current /dev/zero cannot be read: is not a regular",
        ),
        (["plan"], 2, "cotrain: missing option '--model'; see `cotrain plan --help`"),
        (
            ["plan", "--model", "tiny", "--lost-steps", "x"],
            2,
            "invalid value for '--lost-steps': must be an integer, got 'x'; write digits alone",
        ),
        (
            ["submit", "--prompt", "p", "--response", "r", "--model-version", "1", "--checker", "{"],
            2,
            "--checker: must be",
        ),
        (["plan", "--model", "tiny", "--lost", "cpu-process:2"], 2, "remove fewer than 2"),
        (["plan", "--model", "tiny", "--added", "cpu-process:" + "9" * 5000], 2, "N must be a whole number from 1"),
        (["plan", "--model", "tiny", "--lost-steps", "9" * 400], 2, "--lost-steps"),
        (["plan", "--model", "tiny", "--pool", ""], 2, "'--pool': must name a pool file"),
        (["plan", "--model", "tiny", "--current", "nowhere.json"], 1, "--current nowhere.json cannot be read"),
        (["plan", "--model", "tiny", "--current", "docs"], 1, "--current docs cannot be read: Is a directory"),
        (["plan", "--model", "tiny", "--current", "Makefile"], 1, "--current Makefile: must be JSON"),
        (["plan", "--model", "tiny", "--objective", "speed"], 2, "'speed' is not one of 'time', 'memory'"),
        (["plan", "--model", "tiny", "--pipeline-size", "5"], 2, "use at most 4 stages"),
        (["recipe", "check", "demo", "--set", "data.seq_len=" + "[" * 5000], 2, "data.seq_len: must not be nested so"),
        (
            ["recipe", "check", "demo", "--set", "length.steps=" + "9" * 5000],
            2,
            "length.steps: must have no integer of",
        ),
        (["plan", "--model", "3b"], 2, "must be one of tiny, mini, 2b, 51b, 102b"),
        (["plan", "--model", "tiny", "--pool", "nowhere.toml"], 1, "cannot read the pool file"),
        (["submit", "--prompt", "p", "--response", "r", "--model-version", "x"], 2, "a version must be 7 or v7"),
        (["submit", "--prompt", "p", "--response", "r", "--model-version", "1"], 2, "a correction needs expected"),
        (["round", "status"], 1, "run `cotrain up`"),
        (["logs", "nothing"], 1, "there is no log of 'nothing'"),
        (["status"], 1, "is not up"),
        (["generate", "./typo"], 1, "there is no folder ./typo; give a model folder"),
        (["export", "~/typo", "--out", "out"], 1, "there is no folder ~/typo; give a model folder"),
        (["generate", "Makefile"], 1, "Makefile is a file; give the model folder"),
        (["demo", "--skills", "nowhere.py"], 2, "does not exist"),
        (["logs", "keeper", "-n", "4000000000"], 2, "less than or equal to 1000000"),
        (["dataset", "push", "/dev/zero", "--token", "t"], 2, "must be a regular file, got /dev/zero"),
        (
            ["withdraw", "report", "a\x1b\n", "--reason", "r", "--token", "t"],
            2,
            "an id must have 32 hexadecimal digits",
        ),
        (
            ["withdraw", "report", "0" * 32, "--reason", " ", "--token", "t"],
            2,
            "must not be empty, white space or invisible",
        ),
        (
            ["withdraw", "account", " ", "--reason", "r", "--token", "t"],
            2,
            "must not be empty, white space or invisible",
        ),
        (
            ["withdraw", "dataset", "1" * 100_000, "--reason", "r", "--token", "t"],
            2,
            "an id must have 32 hexadecimal digits",
        ),
    ],
)
def test_invalid_command_prints_an_actionable_error(tmp_path, argv, status, message):
    result = run_cotrain(*argv, home=tmp_path)
    assert result.returncode == status
    assert message in result.stdout + result.stderr
    assert result.stderr.count("\n") == (0 if argv == ["status"] else 1)


@pytest.mark.parametrize(
    ("url", "token", "message"),
    [
        ("127.0.0.1:9", "t", "must begin with http://"),
        ("http://127.0.0.1:9", "t\nx", "'--token': must have visible ASCII characters only"),
    ],
)
def test_invalid_url_or_token_is_not_reported_as_unreachable_portal(tmp_path, url, token, message):
    file = tmp_path / "rows.jsonl"
    file.write_text("{}")
    result = run_cotrain("dataset", "push", str(file), "--url", url, "--token", token)
    assert result.returncode == 2 and message in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("argv", "place"),
    [
        (["withdraw", "report", "0" * 32, "--reason", b"\xff", "--token", "t"], "argument 5, after --reason, must be"),
        (["withdraw", "dataset", "0" * 32, b"--reason=a\xff", "--token", "t"], "got --reason=a\\xff"),
        (["pool", "lose", "cpu-process/1", "--reason", b"\xe5\x8a"], "argument 5, after --reason, must be"),
        (["generate", b"\xff"], "argument 2 must be text in UTF-8, got \\xff"),
        (["dataset", "push", b"/dev/null/\xff.jsonl", "--token", "t"], "argument 3 must be"),
    ],
)
def test_an_argument_that_is_not_utf8_is_named(tmp_path, argv, place):
    result = run_cotrain(*argv, home=tmp_path)
    assert result.returncode == 2 and "codec" not in result.stderr
    assert place in result.stderr and result.stderr.count("\n") == 1


def test_a_variable_that_is_not_utf8_is_named():
    result = run_cotrain("status", COTRAIN_HOME=b"/tmp/\xff")
    assert result.returncode == 2 and "variable COTRAIN_HOME must be text in UTF-8, got /tmp/\\xff" in result.stderr


@pytest.mark.parametrize("command", ["doctor", "status", "up", "down"])
def test_home_that_is_a_file_is_reported_without_traceback(tmp_path, command):
    (tmp_path / "file").touch()
    result = run_cotrain(command, home=tmp_path / "file")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "got the file" in result.stdout + result.stderr


def test_unreachable_portal_is_reported(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a", "answer": "b"}\n')
    result = run_cotrain("dataset", "push", str(file), "--url", "http://127.0.0.1:9", "--token", "t")
    assert result.returncode == 1
    assert "the server at http://127.0.0.1:9 does not answer" in result.stderr


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_home_is_reported(tmp_path):
    tmp_path.chmod(0o500)
    result = run_cotrain("up", home=tmp_path / "home")
    assert result.returncode == 1
    assert "cannot be written" in result.stderr


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train")
    return prepare_run(folder / "run", make_training_inputs(folder / "parent"))


@pytest.mark.slow
def test_train_finishes_a_run_and_a_second_call_changes_nothing(run_folder):
    for _ in range(2):
        result = run_cotrain("train", str(run_folder.path / "run.json"), "--json")
        assert result.returncode == 0, result.stderr
        assert json.loads(result.stdout)["state"] == "finished"
    assert [row.step for row in run_folder.read_metrics()] == list(range(1, STEPS + 1))


def test_train_rejects_an_edited_run_json_in_one_line(run_folder):
    text = (run_folder.path / "run.json").read_text()
    (run_folder.path / "run.json").write_text(text.replace('"seed": 5', '"seed": 6'))
    result = run_cotrain("train", str(run_folder.path))
    (run_folder.path / "run.json").write_text(text)
    assert result.returncode == 1 and "it was edited manually" in result.stderr and len(result.stderr.splitlines()) == 1


def test_logs_print_the_last_lines_with_control_characters_escaped(tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "flows.log").write_text("first\n" * 5000 + "\x1b]52;c;aGk=\x07 加\n")
    result = run_cotrain("logs", "flows", "-n", "2", home=tmp_path)
    assert result.stdout == "first\n\\x1b]52;c;aGk=\\x07 加\n"
