"""The command line of the server: names, units, what is refused before anything is loaded."""

import subprocess
import sys

import pytest
from mlx_hybridcache_server.flags import API_KEY_VARIABLE
from mlx_hybridcache_server.settings import Settings, build_parser, read_settings

from mlx_hybridcache.demo import BUNDLED_MODEL
from mlx_hybridcache.errors import SettingError


def settings(*argv):
    """What a command line means."""
    return read_settings(build_parser("serve"), list(argv))


def refused(capsys, *argv):
    """The last line of what argparse says."""
    with pytest.raises(SystemExit) as stopped:
        settings(*argv)
    assert stopped.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_no_flag_at_all_means_the_documented_defaults(monkeypatch):
    """The dataclass and the parser agree, and the bundled model is served."""
    monkeypatch.delenv(API_KEY_VARIABLE, raising=False)
    assert settings() == Settings()
    assert settings().model == str(BUNDLED_MODEL)


@pytest.mark.parametrize(
    ("flag", "text", "expected"),
    [
        ("--prompt-cache-bytes", "10GB", 10 * 10**9),
        ("--prompt-cache-bytes", "10G", 10 * 10**9),  # as mlx_lm.server reads it
        ("--prompt-cache-bytes", "512MiB", 512 * 2**20),
        ("--prompt-cache-bytes", "64K", 64_000),
        ("--prompt-cache-bytes", "64KiB", 65_536),
        ("--prompt-cache-bytes", "1.5GiB", 3 * 2**29),
        ("--prompt-cache-bytes", "123456", 123_456),
        ("--cache-ram", "8192", 8192 * 2**20),
        ("--cache-ram", "8GB", 8 * 10**9),
        ("--cache-ram", "-1", None),
    ],
)
def test_sizes_are_read_with_their_units(flag, text, expected):
    """A letter alone is decimal, `iB` is binary; --cache-ram counts MiB as llama.cpp does."""
    assert settings(flag, text).memory_budget == expected


def test_the_disk_and_the_systems_memory_have_sizes_of_their_own():
    """--cache-dir with 100 GB; a reserve of 512 MiB, or none."""
    found = settings("--cache-dir", "kept", "--cache-disk-bytes", "100GB")
    assert (found.cache_dir, found.disk_budget) == ("kept", 100 * 10**9)
    assert settings("--cache-dir", "kept").disk_budget is None
    assert settings("--memory-reserve", "512MiB").memory_reserve == 2**29
    assert settings("--memory-reserve", "0").memory_reserve == 0
    assert settings("--record-trace", "day.jsonl").record_trace == "day.jsonl"


def test_a_router_patch_must_be_there_before_a_model_is_loaded(tmp_path):
    """A file, or auto; a name that is no file is refused at once."""
    (tmp_path / "patch.json").write_text("{}")
    for named in ("auto", str(tmp_path / "patch.json")):
        assert settings("--canonicalize-router", named).canonicalize_router == named
    assert settings().canonicalize_router is None
    with pytest.raises(SettingError, match="no such file"):
        settings("--canonicalize-router", str(tmp_path / "nowhere.json"))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--kv-bits", "7"), "kv_bits is 7; MLX quantizes with one of 2, 3, 4, 5, 6, 8"),
        (("--kv-bits", "4", "--kv-group-size", "48"), "kv_group_size is 48"),
        (("--kv-bits", "4", "--store-kv", "8"), "leave --store-kv and --store-state out"),
        (("--kv-bits", "4", "--store-state", "int8"), "leave --store-kv and --store-state out"),
    ],
)
def test_rows_that_cannot_be_had_are_refused_before_a_model_is_loaded(flags, said):
    with pytest.raises(SettingError, match=said):
        settings(*flags)


def test_llama_cpp_names_mean_the_librarys_settings():
    """--ctx-checkpoints 3 --checkpoint-every-n-tokens 4096."""
    found = settings(
        *("--ctx-checkpoints", "3", "--checkpoint-every-n-tokens", "4096"),
        *("--checkpoint-min-step", "256", "--swa-full", "--slot-prompt-similarity", "0.5"),
    )
    assert (found.max_checkpoints, found.checkpoint_every) == (3, 4096)
    assert (found.checkpoint_min_step, found.swa_full) == (256, True)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--temp", "-1"], "at least 0"),
        (["--top-p", "1.5"], "from 0 to 1"),
        (["--port", "70000"], "from 0 to 65535"),
        (["--max-tokens", "0"], "at least 1"),
        (["--prompt-cache-bytes", "ten"], "not a size"),
        (["--memory-reserve", "-1"], "not a size"),
        (["--cache-dir", "kept", "--cache-disk-bytes", "ten"], "not a size"),
        (["--chat-template-args", "{"], "not JSON"),
        (["--chat-template-args", "[1]"], "not a JSON object"),
        (["--log-level", "LOUD"], "invalid choice"),
        (["--unheard-of"], "unrecognized arguments"),
        (["--prompt-cache-szie", "3", "--exat"], "did you mean --prompt-cache-size, --exact?"),
    ],
)
def test_a_value_out_of_range_stops_the_start_with_a_sentence(capsys, argv, said):
    """The last line names the flag and what was needed."""
    assert said in refused(capsys, *argv)


@pytest.mark.parametrize(
    "flag",
    [
        *("--model", "--draft-model", "--adapter-path", "--config", "--api-key"),
        *("--cache-dir", "--record-trace", "--canonicalize-router"),
    ],
)
def test_an_empty_value_is_refused(capsys, flag):
    """`--cache-dir "$UNSET"` would be the current directory, `--api-key "$UNSET"` no key at all."""
    assert f"argument {flag}: it is empty" in refused(capsys, flag, "")


def test_flags_that_contradict_each_other_are_refused():
    """Two sizes for one budget; an adapter for no model; a size for no directory."""
    with pytest.raises(SettingError, match="--cache-ram"):
        settings("--prompt-cache-bytes", "1GB", "--cache-ram", "1")
    assert settings("--prompt-cache-bytes", "1MiB", "--cache-ram", "1").memory_budget == 2**20
    with pytest.raises(SettingError, match="--model"):
        settings("--adapter-path", "somewhere")
    with pytest.raises(SettingError, match="--cache-dir"):
        settings("--cache-disk-bytes", "100GB")


def test_the_cache_is_off_at_size_zero_only():
    """No limit by default; three conversations; none."""
    assert settings().uses_cache
    assert settings("--prompt-cache-size", "3").uses_cache
    assert not settings("--prompt-cache-size", "0").uses_cache
    assert not settings("--prompt-cache-bytes", "0").uses_cache


def test_the_key_may_come_from_the_environment(monkeypatch):
    """The flag wins; an empty variable is none."""
    monkeypatch.setenv(API_KEY_VARIABLE, "secret")
    assert settings().api_key == "secret"
    assert settings("--api-key", "other").api_key == "other"
    monkeypatch.setenv(API_KEY_VARIABLE, "")
    assert settings().api_key is None


def test_quantized_keys_and_values_become_options_of_generation():
    """All three, or none; only beside a draft, as the cache itself is made with them otherwise."""
    assert settings().generation_options() == {}
    flags = ["--kv-bits", "8", "--kv-group-size", "32"]
    assert settings(*flags).generation_options() == {}
    found = settings(*flags, "--draft-model", "x").generation_options()
    assert (found["kv_bits"], found["kv_group_size"]) == (8, 32)


@pytest.mark.parametrize(
    "flags",
    [
        ["--allowed-origins", "http://["],
        ["--temp", "inf"],
        ["--request-timeout", "inf"],
        ["--prompt-cache-bytes", "9" * 400],
        ["--cache-ram", "²"],
        ["--alias", " "],
        ["--alias", "two\nlines"],
        ["--chat-template-args", '{"messages": []}'],
    ],
    ids=lambda flags: flags[0],
)
def test_what_python_cannot_read_is_refused_in_one_line(flags, capsys):
    """`urlsplit`, `float` and `int` raise, or answer, for what is no origin, no number and no size."""
    assert flags[0] in refused(capsys, *flags)


@pytest.mark.parametrize("flag", ["--help", "--version"])
def test_help_and_version_import_no_mlx(flag):
    """They answer at once: neither MLX, nor transformers, nor a web framework is looked at."""
    script = (
        "import sys\n"
        "from mlx_hybridcache.server import main\n"
        "try:\n    main([sys.argv[1]])\n"
        "except SystemExit as end:\n    assert end.code == 0\n"
        "slow = {'mlx', 'mlx_lm', 'transformers', 'fastapi', 'numpy'} & set(sys.modules)\n"
        "assert not slow, slow\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, flag], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


# From elsewhere


@pytest.fixture
def file(tmp_path):
    """Writes a file of flags; the words that name it."""

    def write(text):
        path = tmp_path / "server.toml"
        path.write_text(text)
        return "--config", str(path)

    return write


def test_flags_come_from_variables_and_a_file_in_their_order(file, monkeypatch):
    """A flag before a variable before the file; each kind of value in each."""
    monkeypatch.setenv("MLX_HYBRIDCACHE_PORT", "8001")
    monkeypatch.setenv("MLX_HYBRIDCACHE_PROMPT_CACHE_BYTES", "2GB")
    monkeypatch.setenv("MLX_HYBRIDCACHE_EXACT", "true")
    monkeypatch.setenv("MLX_HYBRIDCACHE_SHOW_PROMPTS", "0")
    monkeypatch.setenv("MLX_HYBRIDCACHE_NOBODY_KNOWS", "x")
    monkeypatch.setenv("MLX_HYBRIDCACHE_MAX_QUEUE", "")
    where = file(
        """
        port = 8002
        max-queue = 7
        temp = 0.5
        alias = ["a", "b"]
        allowed_hosts = ["box.example", "other.example"]
        show-prompts = true
        swa-full = true
        allow-model-switching = false
        chat-template-args = {enable_thinking = false}
        """
    )
    found = settings(*where)
    assert (found.port, found.max_queue, found.temp) == (8001, 7, 0.5)
    assert (found.memory_budget, found.exact, found.show_prompts) == (2 * 10**9, True, False)
    assert (found.swa_full, found.allow_model_switching) == (True, False)
    assert found.aliases == ("a", "b")
    assert found.allowed_hosts == ("box.example", "other.example")
    assert found.chat_template_args == {"enable_thinking": False}
    own = settings(*where, "--port", "8003", "--alias=c", "--show-prompts")
    assert (own.port, own.aliases, own.show_prompts) == (8003, ("c",), True)
    assert settings(*where, "--port", "8080").port == 8080  # though it is the default


def test_the_file_itself_may_be_a_variable(file, monkeypatch):
    """And a flag names another one."""
    _, path = file("port = 8005")
    monkeypatch.setenv("MLX_HYBRIDCACHE_CONFIG", path)
    assert settings().port == 8005
    assert settings("--config", "/dev/null").port == 8080


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prot = 1", "prot is no flag"),
        ("config = 'x'", "config is no flag"),
        ("exact = 1", "exact is a switch"),
        ("port = true", "port is no switch"),
        ("port = ", "is not TOML"),
    ],
)
def test_a_file_that_cannot_be_followed_is_refused(file, text, said):
    """By the name of what is wrong in it."""
    with pytest.raises(SettingError, match=said):
        settings(*file(text))
    with pytest.raises(SettingError, match="No such file"):
        settings("--config", "/no/such/file")


def test_a_variable_that_cannot_be_followed_is_refused(monkeypatch, capsys):
    """A switch by its name; a value as the flag's would be."""
    monkeypatch.setenv("MLX_HYBRIDCACHE_EXACT", "maybe")
    with pytest.raises(SettingError, match="MLX_HYBRIDCACHE_EXACT is 'maybe'"):
        settings()
    monkeypatch.delenv("MLX_HYBRIDCACHE_EXACT")
    monkeypatch.setenv("MLX_HYBRIDCACHE_PORT", "many")
    assert "argument --port: 'many' is no whole number" in refused(capsys)
