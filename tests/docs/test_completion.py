"""The scripts of docs/shell-completion.md complete, in a real shell."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fedpeft.errors import SettingsInvalid
from fedpeft.process.settings import ProcessSettings
from fedpeft_client.settings import Settings as Client
from fedpeft_server.settings import Settings as Server

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "shell-completion.md").read_text(encoding="utf-8")
ASK = """
set -e
source {script}
COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
complete=($(complete -p {program}))
function=""; for ((i = 0; i < ${{#complete[@]}}; i++)); do
    if [ "${{complete[i]}}" = -F ]; then function="${{complete[i + 1]}}"; fi
done
$function {program} "${{COMP_WORDS[COMP_CWORD]}}" "${{COMP_WORDS[COMP_CWORD - 1]}}" || true
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


def script(cls: type[ProcessSettings], shell: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        cls.read(["--print-completion", shell])
    assert ended.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("cls", "typed", "wanted"),
    [
        (Server, "--max-", {"--max-update-bytes", "--max-transfers", "--max-clients"}),
        (Client, "--dry", {"--dry-run"}),
    ],
)
def test_bash_completes_flags(
    cls: type[ProcessSettings], typed: str, wanted: set[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "script"
    path.write_text(script(cls, "bash", capsys), encoding="utf-8")
    ask = ASK.format(script=path, words=f"{cls.program} {typed}", program=cls.program)
    done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, timeout=30)
    assert wanted <= set(done.stdout.split()), done.stderr
    assert all(word.startswith(typed) for word in done.stdout.split())


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_every_shell_of_the_page_gets_a_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert shell in PAGE
    assert "fedpeft-client" in script(Client, shell, capsys)


@pytest.mark.parametrize("arguments", [["--print-completion"], ["--print-completion", "elvish"]])
def test_another_shell_is_refused_with_the_ones_there_are(arguments: list[str]) -> None:
    with pytest.raises(SettingsInvalid, match="--print-completion needs the name of a shell, bash, zsh or tcsh"):
        Server.read(arguments)


def test_the_commands_for_bash_are_those_of_the_page(tmp_path: Path) -> None:
    bash = shutil.which("bash")
    assert bash is not None
    (block,) = [b.split("```")[0] for b in PAGE.split("```sh\n")[1:] if "--print-completion" in b]
    environment = {"HOME": str(tmp_path), "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}
    subprocess.run([bash, "-ec", block], env=environment, check=True, timeout=60)
    made = tmp_path / ".local" / "share" / "bash-completion" / "completions"
    assert {p.name for p in made.iterdir() if p.stat().st_size > 500} == {"fedpeft-server", "fedpeft-client"}
