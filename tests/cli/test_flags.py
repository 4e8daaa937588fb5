"""Flags of every command: lengths, sizes, files, addresses, and what is said of wrong ones."""

import errno
import os

import bundled
import pytest
from mlx_hybridcache_server.service import _bound
from mlx_hybridcache_server.settings import Settings, build_parser, read_settings

from mlx_hybridcache import HybridPromptCache, SettingError
from mlx_hybridcache.cli import flags
from mlx_hybridcache.cli.main import main
from mlx_hybridcache.demo import BUNDLED_MODEL
from mlx_hybridcache.errors import refusal
from mlx_hybridcache.sizes import parse_tokens

PLAN = ["plan", "--model", str(BUNDLED_MODEL)]


@pytest.mark.parametrize(
    ("written", "tokens"),
    [
        ("4096", 4096),
        ("4,096", 4096),
        ("120_000", 120_000),
        ("120k", 120_000),
        ("120K", 120_000),
        ("1.5M", 1_500_000),
        ("128Ki", 131_072),
        (" 2 k ", 2000),
    ],
)
def test_a_length_is_a_number_with_or_without_a_unit(written, tokens):
    """K and M count in thousands, Ki in 1,024s, as sizes do."""
    assert parse_tokens(written) == tokens
    assert flags.tokens(tokens)(written) == tokens  # the least that may be asked for


@pytest.mark.parametrize("written", ["", "many", "-5", "1.5", "12kb", "3G", "1e5", "0.0001k"])
def test_what_is_no_length_is_refused(written):
    """Bytes, parts of a token, other units."""
    with pytest.raises(SettingError, match="no number of tokens; write one as 4096 or 120k"):
        parse_tokens(written)


def settings(*words):
    return read_settings(build_parser("serve"), list(words))


@pytest.mark.parametrize(
    ("flag", "name"),
    [
        ("--max-prompt-tokens", "max_prompt_tokens"),
        ("--max-tokens", "max_tokens"),
        ("--prefill-step-size", "prefill_step_size"),
        ("--checkpoint-every-n-tokens", "checkpoint_every"),
        ("--checkpoint-min-step", "checkpoint_min_step"),
        ("--quantized-kv-start", "quantized_kv_start"),
    ],
)
def test_every_length_of_the_server_may_be_written_with_a_unit(flag, name):
    """`120k` was "invalid int value"."""
    assert getattr(settings(flag, "120k"), name) == 120_000


@pytest.mark.parametrize(
    "words",
    [
        ["serve", "--max-prompt-tokens", "lots"],
        ["serve", "--max-tokens", "0"],
        ["serve", "--port", "22x"],
        ["serve", "--port", "70000"],
        ["serve", "--prompt-cache-bytes", "lots"],
        ["serve", "--cache-ram", "lots"],
        ["serve", "--top-p", "2"],
        ["serve", "--request-timeout", "soon"],
        [*PLAN, "--context", "lots"],
        [*PLAN, "--context", "0"],
        [*PLAN, "--memory", "lots"],
        [*PLAN, "--memory", "8GB", "--working-set", "lots"],
        [*PLAN, "--json", "/no/such/place/plan.json"],
        ["demo", "--tokens", "lots"],
        ["demo", "--memory-budget", "lots"],
        ["verify", "--tokens", "5"],
        ["verify", "--file", "/no/such/file"],
        ["verify", "--prefill-step-size", "0"],
        ["bench", "overhead", "--prompt-tokens", "lots"],
        ["bench", "overhead", "--json", "/no/such/place/figures.json"],
        ["canonicalize", "--model", "x", "--tokens", "lots"],
        ["cache", "prune", "--cache-dir", "/", "--to", "lots"],
        ["cache", "ls", "--cache-dir", "/no/such/place"],
    ],
    ids=" ".join,
)
def test_an_error_names_its_flag(words, capsys):
    """In every command, in a sentence on the standard error, with status 2."""
    try:
        status = main(words)
    except SystemExit as ended:
        status = ended.code
    said = capsys.readouterr().err
    assert status == 2
    last = said.strip().splitlines()[-1]
    assert [word for word in words if word.startswith("--")][-1] in last
    assert "Errno" not in said
    assert "invalid" not in said


@pytest.mark.parametrize("words", [[], ["bench"], ["cache"]], ids=" ".join)
def test_a_bare_command_lists_what_there_is(words, capsys):
    """Each command with what it is for, on the standard output, with status 0."""
    assert main(words) == 0
    shown = capsys.readouterr()
    expected = {
        (): ["serve", "demo", "verify", "plan", "canonicalize", "cache", "bench"],
        ("bench",): ["overhead", "ttft", "policies"],
        ("cache",): ["ls", "stats", "verify", "prune", "clear", "pin", "export", "import"],
    }[tuple(words)]
    listed = [line.split()[0] for line in shown.out.splitlines() if line.startswith("    ")]
    assert set(expected) <= set(listed)
    assert shown.err == ""


def test_a_host_that_is_another_machines_is_said_to_be_that():
    """203.0.113.7 is nobody's: it is not that the port is in use."""
    with pytest.raises(SettingError) as told:
        _bound(Settings(host="203.0.113.7", port=0))
    assert str(told.value).startswith("--host 203.0.113.7 is no address of this machine.")
    assert "port" not in str(told.value)


def test_a_port_in_use_is_still_said_to_be_that():
    """With both flags; the second server of a port learns it."""
    with _bound(Settings(port=0)) as first:
        first.listen()
        port = first.getsockname()[1]
        with pytest.raises(SettingError, match=rf"--port {port}: .*in use.*choose another"):
            _bound(Settings(port=port))


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.ENOENT, "/x/y does not exist, or the directory that it is to be in does not."),
        (errno.EACCES, "/x/y: this user has no permission for that."),
        (errno.EISDIR, "/x/y is a directory, where a file is needed."),
        (errno.ENOTDIR, "/x/y is no directory, or a part of that path is a file."),
        (errno.EEXIST, "/x/y exists already."),
        (errno.ENOSPC, "/x/y: No space left on device."),
        (errno.EROFS, "/x/y: Read-only file system."),
    ],
)
def test_what_the_system_refuses_is_a_sentence(number, said):
    """The file first, then why; no error number."""
    assert refusal(OSError(number, os.strerror(number), "/x/y")) == said


def test_a_write_to_a_full_disk_names_no_file_and_is_a_sentence_too():
    """What the system raises then knows of a number alone."""
    assert refusal(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))).startswith(
        "The disk is full: "
    )


def test_a_command_says_so_of_files(tmp_path, capsys):
    """A missing archive, a directory in its place, a file in a directory's place, no text."""
    file, binary = tmp_path / "file", tmp_path / "binary"
    file.write_text("x")
    binary.write_bytes(bytes(range(128, 256)))
    for words, said in (
        (
            ["cache", "import", tmp_path / "none.tar", "--cache-dir", tmp_path / "new"],
            "none.tar does",
        ),
        (["cache", "import", tmp_path, "--cache-dir", tmp_path / "new"], "is no file."),
        (["cache", "ls", "--cache-dir", file], "is no directory"),
        (["cache", "import", file, "--cache-dir", file], "is no directory"),
        (["verify", "--file", tmp_path], "is a directory, where a file is needed."),
        (["verify", "--file", binary], "is no text in UTF-8"),
        ([*PLAN, "--json", tmp_path], "is a directory; name a file."),
    ):
        assert main([str(word) for word in words]) == 2, words
        shown = capsys.readouterr().err
        assert said in shown, words
        assert shown.count("\n") == 1
        assert "Errno" not in shown


def test_a_cache_directory_that_is_a_file_is_said_to_be_that(tmp_path):
    """In the library too: what is in the way, without an error number."""
    file = tmp_path / "file"
    file.write_text("x")
    model, tokenizer = bundled.load()
    with pytest.raises(SettingError) as told:
        HybridPromptCache(model, tokenizer, memory_budget="50MB", cache_dir=file)
    assert str(file) in str(told.value)
    assert "Errno" not in str(told.value)


def test_a_plan_names_its_sizes_in_one_system(capsys):
    """What its flags set is what its text says: GiB in both, read back as such."""
    assert main([*PLAN, "--memory", "8GB", "--context", "1k"]) == 0
    shown = capsys.readouterr().out
    assert "GB " not in shown.replace("8GB", "")
    size = shown.split("--prompt-cache-bytes ")[1].split()[0]
    assert size.endswith("GiB")
    budget = float(shown.split("running requests: ")[1].split(" GiB")[0])
    assert 0 <= round(budget - float(size.removesuffix("GiB")), 3) <= 0.1
