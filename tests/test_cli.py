"""Every command, given every option wrongly: one line that names the option or the value, before any work."""

import importlib
import math
import signal
import sys
from pathlib import Path

import pytest

from config import Number, Parser, UserError, output_folder, output_stem
from tests.conftest import ROOT

# what each needs to get as far as its options
COMMANDS = {
    "scripts.acceptance": [], "scripts.bench": [], "scripts.coord_check": [], "scripts.evidence": [],
    "scripts.export": ["runs/none", "out"], "scripts.faults": [], "scripts.page": ["results/ramp/ramp-adamw-seed0"],
    "scripts.plan": ["configs/gpt_3b.py"], "scripts.plot": ["results/ramp/ramp-adamw-seed0"],
    "scripts.report": ["--check"], "scripts.reproduce": [], "scripts.sample": ["runs/none"], "scripts.soak": [],
    "scripts.without_gpu": [],
    "scripts.sweep": ["configs/sweeps/table2_small.py"], "data.text": ["README.md", "--name=x"], "data.openwebtext": [],
    "data.nemotron_cc": [], "data.fineweb_edu": [],
}  # fmt: skip
FOLDERS = {"out", "record", "runs_dir"}  # where something is written


class Seen(Exception):
    pass


class Begins(BaseException):
    """The command was at work for seconds."""


def options(name: str, monkeypatch) -> list:
    """The command's options, asked of its parser."""

    def caught(parser, *args, **kwargs):
        raise Seen(parser)

    with monkeypatch.context() as patch:
        patch.setattr(Parser, "parse_args", caught)
        patch.setattr(Parser, "parse_known_args", caught)
        patch.setattr(sys, "argv", [name])
        with pytest.raises(Seen) as seen:
            importlib.import_module(name).main()
    return [action for action in seen.value.args[0]._actions if action.option_strings and action.dest != "help"]


def wrongs(option) -> list[str]:
    if option.choices:
        return ["nonsense", ""]
    if isinstance(option.type, Number):
        low, high = option.type.low, option.type.high
        return ["x", "", "1e400", "nan", str(low - 1), *([str(high + 1)] if high < math.inf else [])]
    assert option.type in (None, Path, output_folder, output_stem), (
        f"{option.dest}: any {option.type.__name__} is taken"
    )
    return ["README.md/here"] if option.dest in FOLDERS else []


def test_no_command_is_left_out():
    found = [p for folder in ("scripts", "data") for p in (ROOT / folder).glob("*.py") if "run_cli(" in p.read_text()]
    without_options = {"data.stdlib", "data.shards", "scripts.client"}  # the last takes the fields of train.py
    assert {f"{p.parent.name}.{p.stem}" for p in found} - without_options == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_wrong_options_are_refused_before_any_work(name, monkeypatch, tmp_path):
    main, failed = importlib.import_module(name).main, []

    def begins(*_):
        raise Begins

    monkeypatch.chdir(ROOT)
    signal.signal(signal.SIGALRM, begins)
    for option in options(name, monkeypatch):
        for value in wrongs(option):
            text = f"{option.option_strings[-1]}={value}"
            monkeypatch.setattr(sys, "argv", [name, *COMMANDS[name], text])
            signal.alarm(5)
            try:
                failed.append(f"{text}: returned {main()}")
            except (UserError, OSError) as error:
                line = str(error)
                if len(line.splitlines()) != 1 or not (option.dest in line or (value and value in line)):
                    failed.append(f"{text}: {line!r}")
            except SystemExit as error:
                failed.append(f"{text}: exit {error.code}")
            except Begins:
                failed.append(f"{text}: begins to work")
            except Exception as error:
                failed.append(f"{text}: {type(error).__name__}: {error}")
            finally:
                signal.alarm(0)
    assert not failed, "\n".join(failed)
