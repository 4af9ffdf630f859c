"""Each shell's script is made, and the shell itself then offers verbs, options, choices and files."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from hf_moe_lmc.cli.command_line import main
from hf_moe_lmc.cli.parser import SHELLS, VERBS

BASH = r"""
source "$1"
COMP_WORDS=("${@:2}") COMP_CWORD=$(($# - 2))
function=$(complete -p hf-moe-lmc | sed 's/.*-F \([^ ]*\).*/\1/')
$function hf-moe-lmc "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
printf '%s\n' "${COMPREPLY[@]}"
"""
FISH = 'source $argv[1]; complete -C "$argv[2..]"'
# An interactive zsh in a terminal of its own: the line with a tab, and what stands below it then.
ZSH = r"""
zmodload zsh/zpty
mkdir -p functions && cp "$1" functions/_hf-moe-lmc
zpty z zsh -f -i
zpty -w z 'PS1=; stty cols 300; unsetopt list_types; setopt no_list_beep no_auto_menu; fpath=($PWD/functions $fpath)
autoload -Uz compinit; compinit -u -D; zstyle ":completion:*" verbose no; PS1="rea""dy> "'
zpty -r -m z line '*ready> *'  # before that the terminal itself would take the tabs
zpty -w -n z "${*:2}"$'\t\t'
zpty -w z $'\C-u'"echo DO""NE"
zpty -r -m z line '*DONE*'
print -r -- "$line"
"""


def offered(shell: str, folder: Path, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What a shell offers for the last word."""
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"{shell} is not installed")
    assert main(["completion", shell]) == 0
    script = folder / f"hf-moe-lmc.{shell}"
    script.write_text(capsys.readouterr().out)
    line = ("hf-moe-lmc", *words)
    arguments = {
        "bash": ["--norc", "-c", BASH, "bash", str(script), *line],
        "fish": ["--no-config", "-c", FISH, str(script), " ".join(line)],
        "zsh": ["-f", "-c", ZSH, "zsh", str(script), *line],
    }[shell]
    done = subprocess.run([program, *arguments], cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("shell", SHELLS)
def test_a_script_is_made(capsys: pytest.CaptureFixture[str], shell: str) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(verb in script for verb in VERBS) and "max-tokens" in script and "scaled" in script
    if program := shutil.which(shell):
        subprocess.run([program, "-n"], input=script, text=True, check=True, timeout=60)


@pytest.mark.parametrize("shell", SHELLS)
def test_the_shell_offers_verbs_options_choices_and_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], shell: str
) -> None:
    (tmp_path / "held_out.txt").touch()
    (tmp_path / "models").mkdir()
    found = offered(shell, tmp_path, capsys, "")
    assert all(verb in found for verb in VERBS) and "--order" not in found
    found = offered(shell, tmp_path, capsys, "merge", "--o")
    assert all(option in found for option in ("--order", "--output", "--overwrite")) and "--points" not in found
    found = offered(shell, tmp_path, capsys, "merge", "--order", "")
    assert all(choice in found for choice in ("gate", "expert", "best")) and "plain" not in found
    assert "held_out.txt" in offered(shell, tmp_path, capsys, "barrier", "a", "b", "--text", "h")
    found = offered(shell, tmp_path, capsys, "inspect", "")
    assert "models" in found and "held_out.txt" not in found
