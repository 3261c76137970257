"""The command line: settings from four places, and every mistake told in one line before anything slow happens."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from thinkserve.server import __version__, banner, config
from thinkserve.server.model_dir import StartError
from thinkserve.server.settings import Settings

ROOT = Path(__file__).resolve().parents[1]
SLOW = ("torch", "vllm", "transformers")
# Runs the command, then tells on the last line of stdout whether anything slow was imported.
PROGRAM = f"""
import atexit, sys
from thinkserve.server.cli import main
atexit.register(lambda: print(sorted({{n.split('.')[0] for n in sys.modules}} & set({SLOW!r}))))
sys.argv[0] = 'thinkserve'
main()
"""


def command(*arguments: str, **environment: str) -> tuple[int, str, str]:
    """Exit status, stdout without its last line, stderr; whatever happens, nothing slow may have been imported."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("THINKSERVE_")}
    environment = {**inherited, "PYTHONSAFEPATH": "1", "COLUMNS": "200", **environment}
    run = [sys.executable, "-c", PROGRAM, *arguments]
    done = subprocess.run(run, cwd="/", env=environment, check=False, capture_output=True, text=True, timeout=60)
    out, _, slow = done.stdout.rstrip("\n").rpartition("\n")

    assert "[]" == slow, done.stderr
    return done.returncode, out, done.stderr


def model_in(folder: Path) -> Path:
    """A directory that looks like a model: enough for every check before the engine."""
    folder.mkdir()
    header = json.dumps({"w": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode()
    (folder / "config.json").write_text('{"architectures": ["Qwen3ForCausalLM"]}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
    return folder


def test_the_command_explains_itself() -> None:
    """Without arguments as with --help: all commands."""
    expected = command("--help")

    assert expected == command()
    assert all(name in expected[1] for name in ("serve", "check", "strategies", "vectors", "openapi", "config"))
    assert (0, "") == (expected[0], expected[2])


def test_every_setting_is_an_option_except_secrets_and_nested_ones() -> None:
    """`serve --help` names them all, with their descriptions."""
    status, out, _ = command("serve", "--help")
    no_option = {"model", "admin_keys", "api_keys", "presets", "effort_map", "role_kv_gib", "remote"}
    options = {name for name in Settings.model_fields if f"--{name.replace('_', '-')} " in out}

    assert status == 0
    assert set(Settings.model_fields) - no_option == options


def test_the_help_tells_the_defaults() -> None:
    """Numbers, lists and switches alike; the renderer of the help takes nothing of them for markup."""
    _, out, _ = command("serve", "--help")

    assert "Port to bind; 0 picks a free one. (default: 8000)" in out
    assert "(default: /health, /livez, /readyz, /version)" in out
    assert "(default: True)" in out


def test_the_version_is_printed() -> None:
    """One line, nothing else."""
    assert (0, __version__, "") == command("--version")


def test_strategies_are_listed() -> None:
    """With parameters and defaults."""
    status, out, _ = command("strategies")

    assert status == 0
    assert "short-m-at-k" in out
    assert "k=8" in out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["frobnicate"], "No such command 'frobnicate'."),
        (["serve", "--prot", "1"], "No such option: --prot (Possible options: --host, --port)"),
        (["serve", "--port", "many"], "Invalid value for '--port'"),
        (["serve", "--port", "70000"], "Setting port (--port): input should be less than or equal to 65535"),
        (["serve", "/nowhere"], "Model directory not found: /nowhere"),
        (["serve", "--config", "/nowhere.yaml"], "Cannot read the configuration /nowhere.yaml: No such file or dir"),
        (["serve", "--default-strategy", "majorty"], "Unknown strategy 'majorty'. Did you mean 'majority'?"),
        (["serve", "--default-strategy", "best-of-n"], "default_strategy needs a model that is not configured: reward"),
        (["serve", "--default-strategy", "majority", "--max-chains", "4"], "default_strategy runs 8 chains; max"),
        (["serve", "--tensor-parallel-size", "2"], "tensor_parallel_size needs a GPU"),
        (["serve", "--api-keys-file", "/nowhere"], "Cannot read api_keys_file /nowhere: No such file or directory"),
        (["serve", "--guide", "/nowhere"], "Model directory not found: /nowhere"),
        (["serve", "--guide", "http://me@host"], "guide: not the address of a server"),
        (["serve", "--reward", "none/at/all"], "Model directory not found: none/at/all"),
        (["serve", "my models/qwen"], "Model directory not found: my models/qwen"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(arguments: list[str], expected: str, tmp_path: Path) -> None:
    """Status 2, a sentence that names what is wrong, and nothing slow imported on the way."""
    if arguments[0] == "serve" and arguments[1].startswith("--"):
        arguments = [*arguments, str(model_in(tmp_path / "m"))]

    status, out, error = command(*arguments)

    assert (2, "", 1) == (status, out, error.count("\n"))
    assert error.startswith(f"thinkserve: {expected}")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("prot: 1", "Unknown setting prot in {file}. Did you mean 'port'?"),
        ("port: many", "Setting port ({file}): input should be a valid integer"),
        ("[1, 2]", "The configuration {file} must be a mapping of settings"),
        ("port: [", "Not a YAML file: {file}, line "),
        ("api_keys: secret", "api_keys does not belong into {file}: set THINKSERVE_API_KEYS"),
        ("presets: {p: {strategy: nope}}", "Unknown strategy 'nope'."),
        ("presets: {p: {stratgy: single}}", "Unknown setting presets.p.stratgy ({file}). Did you mean 'strategy'?"),
        ("presets: {p: {strategy: majority, params: {kk: 3}}}", "Unknown parameter presets.p.params.kk. Did you mean"),
        ("presets: {p: {strategy: majority, params: {k: 2024-01-01}}}", "presets.p.params.k: Input should be a valid"),
        ("presets: {m: {strategy: single}}", "preset name 'm' is not a slug, or is the name of a served model"),
        ("role_kv_gib: {target: 1}", "Setting role_kv_gib.target.[key] ({file}): input should be 'guide', 'reward' or"),
        ("role_kv_gib: {guide: 0}", "Setting role_kv_gib.guide ({file}): input should be greater than 0"),
        ("remote: {guide: {modle: x}}", "Unknown setting remote.guide.modle ({file}). Did you mean 'model'?"),
        ("{guide: 'http://h', remote: {guide: {key_env: NO_KEY}}}", "guide: the environment variable NO_KEY holds no"),
        ("{guide: 'http://h', remote: {guide: {ca_file: /nowhere}}}", "guide: cannot use the ca_file /nowhere: No"),
        ("{effort_map: {low: p}, presets: {p: {strategy: single, over: [{name: trimr}]}}}", "effort_map.low needs a"),
        ("effort_map: {low: quick}", "effort_map: low names the unknown preset 'quick'"),
    ],
)  # fmt: skip
def test_a_mistake_in_the_file_is_one_line_that_names_the_file(content: str, expected: str, tmp_path: Path) -> None:
    """Unknown keys at any depth, wrong types, presets that cannot work."""
    file = tmp_path / "thinkserve.yaml"
    file.write_text(content)

    status, out, error = command("serve", str(model_in(tmp_path / "m")), "--config", str(file))

    assert (2, "", 1) == (status, out, error.count("\n"))
    assert error.removeprefix("thinkserve: ").startswith(expected.format(file=file))


def test_a_mistake_in_the_environment_is_one_line_that_names_the_variable() -> None:
    """Unknown names too: a variable of ours that nothing reads is a mistake."""
    unknown, malformed = command("serve", THINKSERVE_PROT="1"), command("serve", THINKSERVE_ALLOWED_HOSTS="a,b")

    assert (2, "thinkserve: Unknown setting THINKSERVE_PROT. Did you mean 'THINKSERVE_PORT'?\n") == unknown[::2]
    assert malformed[2].startswith("thinkserve: Setting THINKSERVE_ALLOWED_HOSTS must be JSON")


def test_variables_that_something_else_reads_are_no_mistakes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernels look up in the environment may be set for the server."""
    read = set(re.findall(r'"(THINKSERVE_\w+)"', (ROOT / "kernels" / "cpu.py").read_text()))
    assert {"THINKSERVE_KERNELS", "THINKSERVE_CACHE"} == read
    for name in read:
        monkeypatch.setenv(name, "0")

    assert not config.load({}, None).origin


def test_a_variable_below_a_setting_that_has_nothing_below_it_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slip of this kind must not leave the server without keys."""
    monkeypatch.setenv("THINKSERVE_REMOTE__GUIDE__RETRIES", "1")
    assert 1 == config.load({}, None).settings.remote["guide"].retries
    monkeypatch.setenv("THINKSERVE_API_KEYS__FILE", "keys")
    with pytest.raises(StartError, match=r"THINKSERVE_API_KEYS__FILE\. Did you mean 'THINKSERVE_API_KEYS_FILE'"):
        config.load({}, None)


def test_a_taken_port_is_told_before_the_engine_starts(tmp_path: Path) -> None:
    """With the address, in one line."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        status, out, error = command("serve", str(model_in(tmp_path / "m")), "--port", str(port))

    assert (2, "", 1) == (status, out, error.count("\n"))
    assert f"127.0.0.1:{port}" in error


def test_sources_override_each_other_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Command line over environment over file over default, setting by setting."""
    file = tmp_path / "thinkserve.yaml"
    file.write_text("port: 1\nhost: file\nserved_name: file\n")
    monkeypatch.setenv("THINKSERVE_PORT", "2")
    monkeypatch.setenv("THINKSERVE_HOST", "environment")

    found = config.load({"port": 3}, file)

    assert (3, "environment", "file", 64) == (
        found.settings.port, found.settings.host, found.settings.served_name, found.settings.max_chains,
    )  # fmt: skip
    assert {"port": "--port", "host": "THINKSERVE_HOST", "served_name": str(file)} == found.origin


def test_a_variable_below_a_setting_leaves_the_file_s_other_entries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One field of one remote model from the environment, the rest of the block from the file."""
    file = tmp_path / "config.yaml"
    file.write_text("remote:\n  guide: {retries: 7, model: big}\n  verifier: {retries: 3}\n")
    monkeypatch.setenv("THINKSERVE_REMOTE__GUIDE__RETRIES", "1")
    remote = config.load({}, file).settings.remote
    assert (1, "big", 3) == (remote["guide"].retries, remote["guide"].model, remote["verifier"].retries)


def test_the_effective_configuration_can_be_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`config show` is a YAML file that gives the same settings; the secret is starred out of it."""
    monkeypatch.setenv("THINKSERVE_API_KEYS", "top-secret")
    first = config.load({"port": 5, "dtype": "float32"}, None)
    shown = config.redacted(first)
    file = tmp_path / "again.yaml"
    file.write_text(shown)

    assert "top-secret" not in shown
    assert "port: 5  # --port\n" in shown
    assert first.settings == config.load({}, file).settings


def test_a_secret_is_never_an_option() -> None:
    """Other users of the machine can read command lines."""
    status, _, error = command("serve", "--api-keys", "k")

    assert status == 2
    assert error.startswith("thinkserve: No such option: --api-keys")


def test_keys_that_cannot_be_used_are_told_before_the_weights_load(tmp_path: Path) -> None:
    """An empty list, a file of comments, and a key that would be both kinds."""
    model, file = str(model_in(tmp_path / "m")), tmp_path / "keys"
    file.write_text("# none yet\n")
    wrong = [
        (command("serve", model, THINKSERVE_API_KEYS=" , "), "api keys are configured, but there is none"),
        (command("serve", model, "--admin-keys-file", str(file)), "admin keys are configured, but there is none"),
        (command("serve", model, THINKSERVE_API_KEYS="k", THINKSERVE_ADMIN_KEYS="k"), "An admin key is also an API"),
    ]

    for (status, _, error), expected in wrong:
        assert (2, 1) == (status, error.count("\n"))
        assert error.startswith(f"thinkserve: {expected}")


def test_check_tells_what_is_wrong_and_what_is_right(tmp_path: Path) -> None:
    """Status 1 with the reason, status 0 when a server would start."""
    model = model_in(tmp_path / "m")

    bad, good = command("check", "/nowhere", "--port", "0"), command("check", str(model), "--port", "0")

    assert (1, True) == (bad[0], "no  model         Model directory not found: /nowhere" in bad[1])
    assert (0, True) == (good[0], f"ok  model         m (Qwen3ForCausalLM, 0.0 MB) in {model}" in good[1])


def test_check_lists_the_models_of_all_roles(tmp_path: Path) -> None:
    """Each with what it is for; a helper that does not fit is told as well."""
    model, helper = str(model_in(tmp_path / "m")), str(model_in(tmp_path / "h"))

    good = command("check", model, "--port", "0", "--guide", helper, "--verifier", helper)
    bad = command("check", model, "--port", "0", "--reward", helper)

    assert f"ok  guide, verifier  h (Qwen3ForCausalLM, 0.0 MB) in {helper}" in good[1]
    assert 1 == bad[0]
    assert "is no process reward model" in bad[1]


def test_the_question_to_copy_survives_a_shell() -> None:
    """What the banner prints is one line that a POSIX shell splits back into curl's arguments."""
    line = banner.curl("http://127.0.0.1:8000", "it's:race", keyed=True)
    script = f'curl() {{ printf "%s\\n" "$@"; }}; API_KEY=k; {line}'
    words = subprocess.run(["sh", "-c", script], check=True, capture_output=True, text=True).stdout.splitlines()

    assert "\n" not in line
    assert "http://127.0.0.1:8000/v1/chat/completions" in words
    assert "Authorization: Bearer k" in words
    assert "it's:race" == json.loads(words[words.index("-d") + 1])["model"]


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", "http://127.0.0.1:8"),
        ("0.0.0.0", "http://127.0.0.1:8"),
        ("::", "http://[::1]:8"),
        ("h", "http://h:8"),
    ],
)
def test_the_address_shown_can_be_opened(host: str, expected: str) -> None:
    """A server that listens everywhere is reached at the loopback address."""
    assert expected == banner.address(host, 8)


def test_settings_are_refused_when_their_file_is_no_text(tmp_path: Path) -> None:
    """Bytes that are not UTF-8 are not a traceback."""
    file = tmp_path / "x.yaml"
    file.write_bytes(b"\xff\xfe\x00")

    with pytest.raises(StartError, match="Not a YAML file"):
        config.load({}, file)
